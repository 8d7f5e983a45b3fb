r"""Run a command in a terminal of a given width, and save the screen that it leaves as an SVG picture.

    python tools/terminal_screenshot.py --out .github/quickstart.svg --width 112 --without '^data: ' -- \
        ropepp-lit fit --config recipes/quickstart.yaml

The command runs on a pseudo-terminal, so it draws what it draws for people. Its output goes through a small terminal
emulator (carriage return, cursor up and down, erasing, colours), so that progress bars appear as they were left. Needs
rich. The exit code is that of the command; nothing is saved where it fails.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

_TOKEN = re.compile(
    r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()][0-9A-B]|\x1b.|[\r\n\b]|[^\x00-\x1f\x7f]",
    re.DOTALL,
)


class Screen:
    """A terminal of unlimited height.

    Args:
        width: Columns; longer lines are wrapped.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: list[list[tuple[str, str]]] = [[]]
        self._row = self._column = 0
        self._style = ""

    def write(self, text: str) -> None:
        """Draw the output of a command."""
        for token in _TOKEN.finditer(text):
            if token[2]:
                self._control(token[1], token[2])
            elif token[0] == "\r":
                self._column = 0
            elif token[0] == "\n":
                self._move(1)
            elif token[0] == "\b":
                self._column = max(0, self._column - 1)
            elif not token[0].startswith("\x1b"):
                self._put(token[0])

    def _control(self, arguments: str, command: str) -> None:
        number = int(arguments) if arguments.isdigit() else 0
        row = self._rows[self._row]
        if command == "m":
            self._style = "" if arguments in ("", "0") else f"{self._style}\x1b[{arguments}m"
        elif command in "AB":
            self._move((number or 1) * (-1 if command == "A" else 1))
        elif command in "CDG":
            column = {"C": self._column + (number or 1), "D": self._column - (number or 1), "G": (number or 1) - 1}
            self._column = max(0, column[command])
        elif command in "KJ":
            if number == 0:
                del row[self._column :]
            else:
                row[:] = [(" ", "")] * self._column if number == 1 else []
            if command == "J":
                del self._rows[self._row + 1 :]

    def _move(self, rows: int) -> None:
        self._row = max(0, self._row + rows)
        self._rows += [[] for _ in range(self._row + 1 - len(self._rows))]

    def _put(self, character: str) -> None:
        if self._column >= self._width:
            self._column = 0
            self._move(1)
        row = self._rows[self._row]
        row += [(" ", "")] * (self._column + 1 - len(row))
        row[self._column] = (character, self._style)
        self._column += 1

    def lines(self) -> list[str]:
        """The rows as text with ANSI codes for colours, without blank rows at the end."""
        lines = []
        for row in self._rows:
            line, before = "", ""
            for character, style in row:
                line += (f"\x1b[0m{style}" if style != before else "") + character
                before = style
            lines.append(line.rstrip() + ("\x1b[0m" if before else ""))
        while lines and not lines[-1].strip():
            lines.pop()
        return lines


def run(command: list[str], *, width: int) -> tuple[Screen, int]:
    """Run a command on a pseudo-terminal; returns what it leaves on the screen, and its exit code."""
    screen, decoder = Screen(width), codecs.getincrementaldecoder("utf-8")("replace")
    own, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width)}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        while True:
            try:
                data = os.read(own, 65536)
            except OSError:  # Linux reports that the other end is closed as EIO
                break
            if not data:
                break
            screen.write(decoder.decode(data))
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
    os.close(own)
    return screen, process.returncode


def picture(lines: list[str], *, width: int, title: str) -> str:
    """The lines as an SVG of a terminal window, which looks the same on light and dark pages."""
    with open(os.devnull, "w", encoding="utf-8") as null:
        console = Console(record=True, width=width, file=null, force_terminal=True, color_system="truecolor")
        for line in lines:
            console.print(Text.from_ansi(line), soft_wrap=True)
        return console.export_svg(title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="SVG file")
    parser.add_argument("--width", type=int, default=100, help="columns of the terminal")
    parser.add_argument("--without", metavar="REGEX", help="leave out rows that match, such as those with local paths")
    parser.add_argument("command", nargs="+", help="command and its arguments, after --")
    options = parser.parse_args()
    screen, code = run(options.command, width=options.width)
    if code:
        sys.exit(code)
    lines = [line for line in screen.lines() if options.without is None or not re.search(options.without, line)]
    prompt = f"\x1b[1m$ {shlex.join(options.command)}\x1b[0m"
    options.out.write_text(picture([prompt, *lines], width=options.width, title="ropepp-lit"), encoding="utf-8")


if __name__ == "__main__":
    main()
