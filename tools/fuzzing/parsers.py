"""Parsers of `fit` and `plan` that are built once: that takes longer than everything else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from lightning.pytorch.cli import LightningCLI

_PARSERS: dict[type, dict[str, Any]] = {}


@contextlib.contextmanager
def kept_parsers() -> Iterator[None]:
    """Build the parser of each subcommand once."""
    made = LightningCLI.setup_parser

    def setup_parser(cli: Any, *arguments: Any, **options: Any) -> None:
        if type(cli) not in _PARSERS:
            before = set(vars(cli))
            made(cli, *arguments, **options)
            _PARSERS[type(cli)] = {name: value for name, value in vars(cli).items() if name not in before}
        vars(cli).update(_PARSERS[type(cli)])

    with mock.patch.object(LightningCLI, "setup_parser", setup_parser):
        yield
