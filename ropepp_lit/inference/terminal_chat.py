"""A conversation in the terminal, or of lines from a pipe."""

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
  /reset      begin a new conversation
  /save FILE  write the messages into a new file of JSON lines, which prepare --format chat reads
  /help       show this
Ctrl-C ends a reply, or clears the line; Ctrl-D ends the conversation. A message that begins with / needs a space before
it."""

_CONTROLS = {code: REPLACEMENT for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A model may write characters that a terminal takes for commands."""


def notify(text: str) -> None:
    """Print a notice, on stderr, so that piped output holds replies alone."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def talk(conversation: Conversation) -> None:
    """Read messages from stdin and print replies, until the input ends."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # some builds of Python lack it
            import readline  # noqa: F401  (input() edits lines by it)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(f"[{conversation.status}] > " if is_terminal else "")
            _answer(conversation, line)
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


def _answer(conversation: Conversation, line: str) -> None:
    """Do what a line asks for."""
    if line.startswith("/"):
        _obey(conversation, line)
    elif line.strip():
        reply = conversation.ask(line.strip())
        try:
            for part in reply:
                print(part.translate(_CONTROLS) if sys.stdout.isatty() else part, end="", flush=True)
            print(flush=True)
        finally:
            reply.close()


def _obey(conversation: Conversation, line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/help":
        print(HELP)
    elif name == "/reset":
        conversation.reset()
        notify("a new conversation")
    elif name == "/save":
        if not rest.strip():
            raise UsageError("/save needs the name of a file")
        conversation.save(rest.strip())
        notify(f"saved: {rest.strip()}")
    else:
        raise UsageError(f"no command {name}; /help lists them")
