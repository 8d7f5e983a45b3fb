"""Tests of tools/terminal_screenshot.py: its terminal emulator, and the picture of a real command."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("rich")

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        ("a\r\nb\r\n\r\n", ["a", "b"]),
        ("10%\r20%\r\n", ["20%"]),
        ("long text\rshort\x1b[K", ["short"]),
        ("long text\r         \rend", ["end"]),  # a progress bar that is removed
        ("one\r\ntwo\x1b[A\rONE\x1b[B\rTWO", ["ONE", "TWO"]),
        ("abc\b\bX", ["aXc"]),
        ("123456789012", ["1234567890", "12"]),
        ("a\x1b[2Kb", [" b"]),
        ("a\r\nb\r\nc\x1b[2A\x1b[J", ["a"]),
        ("\x1b[32mgreen\x1b[0m x", ["\x1b[0m\x1b[32mgreen\x1b[0m x"]),
        ("\x1b]0;title\x07\x1b(Bx", ["x"]),
        ("é█\x1b[31m!", ["é█\x1b[0m\x1b[31m!\x1b[0m"]),
    ],
)
def test_screen(monkeypatch, output, lines):
    monkeypatch.syspath_prepend(TOOLS)
    from terminal_screenshot import Screen

    screen = Screen(width=10)
    screen.write(output)
    assert screen.lines() == lines


CODE = """
import os, sys
assert sys.stdout.isatty() and os.get_terminal_size().columns == 40
print("local path")
print("50%", end="\\r")
print("\\x1b[32mdone\\x1b[0m of", sys.argv[1])
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_picture_of_a_command(tmp_path, code):
    picture = tmp_path / "picture.svg"
    command = [
        sys.executable,
        TOOLS / "terminal_screenshot.py",
        "--out",
        picture,
        "--width",
        "40",
        "--without",
        "^local",
    ]
    finished = subprocess.run([*command, "--", sys.executable, "-c", CODE, str(code)], check=False, capture_output=True)
    assert finished.returncode == code
    assert picture.exists() == (code == 0)
    if code == 0:
        text = "".join(ElementTree.parse(picture).getroot().itertext()).replace("\xa0", " ")
        assert "done of 0" in text
        assert text.count("local path") == text.count("50%") == 1  # in the command line, not in its output
