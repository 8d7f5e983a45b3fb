"""Interactive chat in the terminal, or with messages from a pipe."""

from __future__ import annotations

import contextlib
import io
import sys

from ropepp_lit.errors import UsageError
from ropepp_lit.inference.conversation import Conversation
from ropepp_lit.text.conversations import RowError
from ropepp_lit.text.stream import REPLACEMENT

HELP = """\
Each line is a message to the model.
  /reset      start a new conversation
  /save FILE  write the messages to a new JSON Lines file for prepare --format chat
  /help       show this help
Ctrl-C stops a reply, or clears the line; Ctrl-D ends the chat. A message that starts with / needs a space before it."""

_CONTROLS = {code: REPLACEMENT for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Replacements of control characters, which a terminal would interpret."""


def notify(text: str) -> None:
    """Print a notice on stderr, so that piped output contains only replies."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def talk(conversation: Conversation) -> None:
    """Read messages from stdin and print replies until the end of the input."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # missing in some builds of Python
            import readline  # noqa: F401  (enables line editing in input())
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(f"[{conversation.status}] > " if is_terminal else "")
            _process_line(conversation, line)
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
        except (UsageError, RowError) as error:
            notify(str(error))


def _process_line(conversation: Conversation, line: str) -> None:
    """Run a command, or print the reply to a message."""
    if line.startswith("/"):
        _run_command(conversation, line)
    elif line.strip():
        reply = conversation.ask(line.strip())
        try:
            for part in reply:
                print(part.translate(_CONTROLS) if sys.stdout.isatty() else part, end="", flush=True)
            print(flush=True)
        finally:
            reply.close()


def _run_command(conversation: Conversation, line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/help":
        print(HELP)
    elif name == "/reset":
        conversation.reset()
        notify("new conversation")
    elif name == "/save":
        if not rest.strip():
            raise UsageError("/save requires a file name")
        conversation.save(rest.strip())
        notify(f"saved: {rest.strip()}")
    else:
        raise UsageError(f"no command {name}; /help lists them")
