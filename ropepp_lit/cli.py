"""The command `ropepp-lit`: finds the subcommand's code by its first word, imports only that, and tells errors."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

from ropepp_lit import __version__
from ropepp_lit.errors import DISK_ERRORS, LostProcessError, UsageError
from ropepp_lit.own_modules import find_in_current_folder, leave_current_folder
from ropepp_lit.terminal import prepare_streams, quiet_full_disk_in_threads

SUBCOMMANDS = {
    "fit": ("train a model by a recipe", "ropepp_lit.train.cli"),
    "validate": ("measure a checkpoint on held-out text", "ropepp_lit.train.cli"),
    "plan": ("say what a recipe will do and cost", "ropepp_lit.train.plan"),
    "prepare": ("turn text into token shards", "ropepp_lit.commands.prepare"),
    "import": ("turn a Hugging Face folder into a checkpoint", "ropepp_lit.commands.convert"),
    "export": ("turn a checkpoint into a Hugging Face folder", "ropepp_lit.commands.convert"),
    "upcycle": ("turn a RoPE checkpoint into a RoPE++ one", "ropepp_lit.commands.convert"),
    "generate": ("let a checkpoint write", "ropepp_lit.commands.generate"),
    "chat": ("talk with a checkpoint in the terminal", "ropepp_lit.commands.chat"),
    "serve": ("serve a checkpoint over HTTP, as OpenAI's API does", "ropepp_lit.commands.serve"),
    "evaluate": ("measure checkpoints at long context", "ropepp_lit.commands.evaluate"),
    "figures": ("draw the figures of the method", "ropepp_lit.commands.figures"),
    "doctor": ("report packages, devices and what is broken", "ropepp_lit.commands.doctor"),
}
"""What each subcommand does, and the module whose `main(arguments)` does it; the subcommand is the first argument."""


PRINTING = ("generate", "chat", "plan", "doctor")
"""Subcommands that only print; they end when nobody reads on, and the others go on."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Exits with 2 after a user's mistake, 1 where another process of a run is lost, 130 after Ctrl-C, and 141 where a
    command that only prints loses its reader, as in `ropepp-lit generate … | head`.

    Args:
        arguments: Words behind `ropepp-lit`; empty means those of the process.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        prepare_streams(ends_with_reader=not arguments or arguments[0].startswith("-") or arguments[0] in PRINTING)
        quiet_full_disk_in_threads()
        try:
            folder = os.getcwd()
        except OSError:
            _fail("the current folder does not exist any more; change to another one", 2, arguments)
        leave_current_folder()
        package = os.path.dirname(os.path.abspath(__file__))
        if os.path.dirname(package) != folder:
            os.environ["PYTHONSAFEPATH"] = "1"  # Python processes that are started do not put their folder first
    try:
        _run(arguments)
    except LostProcessError as error:
        _fail(str(error), 1, arguments, on_every_rank=True)
    except UsageError as error:
        _fail(str(error), 2, arguments)
    except KeyboardInterrupt:
        _fail("interrupted", 130, arguments)
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        _fail(f"{error.filename or 'disk'}: {error.strerror}", 2, arguments)
    sys.stdout.flush()  # here, where a reader that has gone is no error


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"ropepp-lit {__version__}")
        return
    find_in_current_folder()
    if arguments[0] not in SUBCOMMANDS:
        raise UsageError(f"no subcommand {arguments[0]!r}; choose one of {', '.join(SUBCOMMANDS)}")
    importlib.import_module(SUBCOMMANDS[arguments[0]][1]).main(arguments)


def _fail(problem: str, code: int, arguments: list[str], *, on_every_rank: bool = False) -> NoReturn:
    # All ranks of a run find the same mistake. Alone, LOCAL_RANK is left over from another program.
    is_rank = arguments[:1] in (["fit"], ["validate"]) and "WORLD_SIZE" in os.environ
    if on_every_rank or not is_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"ropepp-lit: error: {' '.join(problem.split())}", file=sys.stderr)
    sys.exit(code)


def _help() -> str:
    lines = [f"  {name:<10} {text}" for name, (text, _) in SUBCOMMANDS.items()]
    return "\n".join(
        (
            "usage: ropepp-lit SUBCOMMAND [options]",
            "",
            "Train language models with RoPE++ (arXiv 2512.07525).",
            "",
            "subcommands:",
            *lines,
            "",
            "options:",
            "  -h, --help  show this",
            "  --version   show the version",
            "",
            "Each subcommand answers --help. To begin: ropepp-lit fit --config recipes/quickstart.yaml",
        )
    )
