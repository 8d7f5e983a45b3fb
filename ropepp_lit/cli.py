"""The command `ropepp-lit`: finds the subcommand's code by its first word, imports only that, and tells errors."""

from __future__ import annotations

import importlib
import os
import sys

from ropepp_lit import __version__
from ropepp_lit.errors import UsageError

SUBCOMMANDS = {
    "fit": ("train a model by a recipe", "ropepp_lit.train.cli"),
    "validate": ("measure a checkpoint on held-out text", "ropepp_lit.train.cli"),
    "plan": ("say what a recipe will do and cost", "ropepp_lit.train.plan"),
    "prepare": ("turn text into token shards", "ropepp_lit.commands.prepare"),
    "import": ("turn a Hugging Face folder into a checkpoint", "ropepp_lit.commands.convert"),
    "export": ("turn a checkpoint into a Hugging Face folder", "ropepp_lit.commands.convert"),
    "upcycle": ("turn a RoPE checkpoint into a RoPE++ one", "ropepp_lit.commands.convert"),
    "generate": ("let a checkpoint write", "ropepp_lit.commands.generate"),
    "evaluate": ("measure checkpoints at long context", "ropepp_lit.commands.evaluate"),
    "figures": ("draw the figures of the method", "ropepp_lit.commands.figures"),
}
"""What each subcommand does, and the module whose `main(arguments)` does it; the subcommand is the first argument."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: Words behind `ropepp-lit`; empty means those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"ropepp-lit {__version__}")
        return
    if "" not in sys.path:
        sys.path.insert(0, "")  # a scheme in a file of the user's own is found in the current folder
    try:
        if arguments[0] not in SUBCOMMANDS:
            raise UsageError(f"no subcommand {arguments[0]!r}; choose one of {', '.join(SUBCOMMANDS)}")
        importlib.import_module(SUBCOMMANDS[arguments[0]][1]).main(arguments)
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"ropepp-lit: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


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
