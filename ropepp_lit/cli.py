"""Entry point of the command `ropepp-lit`: imports and runs a subcommand, and reports errors in one line."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

from ropepp_lit import __version__
from ropepp_lit.errors import DISK_ERRORS, EXIT_CODES, LostProcessError, UsageError, did_you_mean
from ropepp_lit.own_modules import find_in_current_folder, leave_current_folder
from ropepp_lit.terminal import prepare_streams, quiet_full_disk_in_threads

SUBCOMMANDS = {
    "fit": ("train a model from a recipe", "ropepp_lit.train.cli"),
    "validate": ("compute the validation loss of a checkpoint", "ropepp_lit.train.cli"),
    "plan": ("estimate the memory, time and cost of a recipe", "ropepp_lit.train.plan"),
    "prepare": ("tokenize text into shards", "ropepp_lit.commands.prepare"),
    "import": ("convert a Hugging Face model to a checkpoint", "ropepp_lit.commands.convert"),
    "export": ("convert a checkpoint to a Hugging Face model", "ropepp_lit.commands.convert"),
    "upcycle": ("convert a RoPE checkpoint to RoPE++", "ropepp_lit.commands.convert"),
    "generate": ("generate text from a prompt or a file of prompts", "ropepp_lit.commands.generate"),
    "chat": ("chat with a model in the terminal", "ropepp_lit.commands.chat"),
    "serve": ("serve a model over HTTP with an OpenAI-compatible API", "ropepp_lit.commands.serve"),
    "evaluate": ("evaluate checkpoints at long context", "ropepp_lit.commands.evaluate"),
    "figures": ("draw the figures of the method", "ropepp_lit.commands.figures"),
    "doctor": ("check the installation and report the devices", "ropepp_lit.commands.doctor"),
}
"""Description of each subcommand, and the module whose `main(arguments)` runs it; arguments[0] is the subcommand."""


PRINTING = ("generate", "chat", "plan", "doctor")
"""Subcommands that only print. They exit when stdout is closed; the other subcommands continue."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Exits with 2 after a user's mistake, 1 if another process of a distributed run was lost, 130 after Ctrl-C, and 141
    if stdout of a subcommand that only prints is closed, as in `ropepp-lit generate … | head`.

    Args:
        arguments: Arguments after `ropepp-lit`; None means `sys.argv`.
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
            os.environ["PYTHONSAFEPATH"] = "1"  # child Python processes do not put the current folder on sys.path
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
    sys.stdout.flush()  # here, where a closed pipe is not an error


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"ropepp-lit {__version__}")
        return
    find_in_current_folder()
    if arguments[0] not in SUBCOMMANDS:
        near = did_you_mean(arguments[0], SUBCOMMANDS)
        raise UsageError(f"no subcommand {arguments[0]!r}; choose one of {', '.join(SUBCOMMANDS)}{near}")
    importlib.import_module(SUBCOMMANDS[arguments[0]][1]).main(arguments)


def _fail(problem: str, code: int, arguments: list[str], *, on_every_rank: bool = False) -> NoReturn:
    # All ranks of a run find the same mistake. LOCAL_RANK without WORLD_SIZE is left over from another program.
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
            "  -h, --help  show this help",
            "  --version   show the version",
            "",
            EXIT_CODES,
            "Options of a subcommand: ropepp-lit SUBCOMMAND --help",
            "First run:               ropepp-lit fit --config recipes/quickstart.yaml",
        )
    )
