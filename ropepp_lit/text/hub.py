"""Datasets that the library `datasets` streams: from the Hub, or a folder that it can read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ropepp_lit.errors import UsageError
from ropepp_lit.text.formats import line_of

HUB = "hf:"
"""What the name of a Hugging Face dataset begins with."""

STATE_ROWS = 1000
"""Rows between two states of a stream, each a place from which it goes on without reading what comes before."""


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset."""

    name: str
    """As it was given: `hf:NAME[@REVISION]`, `…:SPLIT` or `…:CONFIG:SPLIT`."""
    path: str
    revision: str | None
    config: str | None
    split: str

    num_bytes = 0
    """Not known."""

    @classmethod
    def from_name(cls, name: str, *, key: str) -> HubDataset:
        """Read a name.

        Raises:
            UsageError: it has another form; the message names `key`.
        """
        path, *rest = name.removeprefix(HUB).split(":")
        revision = None
        if not Path(path).expanduser().is_dir():
            path, _, revision = path.partition("@")
        if not path or (revision == "" and "@" in name) or len(rest) > 2:
            raise UsageError(
                f"{key}: {name}: write {HUB}NAME, {HUB}NAME:SPLIT or {HUB}NAME:CONFIG:SPLIT, "
                "with NAME@REVISION for a certain revision"
            )
        if revision and Path(path).expanduser().is_dir():
            raise UsageError(f"{key}: {name}: {path} is a folder here, which has no revisions; leave @{revision} out")
        return cls(name, path, revision or None, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train")

    @property
    def folder(self) -> Path | None:
        """The dataset's folder where it is not on the Hub."""
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None

    @cached_property
    def commit(self) -> str:
        """The Hub's commit, by which all is read.

        Raises:
            UsageError: the Hub has no such dataset or revision, or does not answer.
        """
        if self.revision and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self.revision
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.path, revision=self.revision, timeout=20).sha)
        except Exception as error:  # httpx's, and the Hub's own
            raise UsageError(f"{self.name}: {line_of(error)}; check the name and the connection") from error

    def rows(self, skip: int, state: dict | None) -> Iterator[tuple[dict, dict | None]]:
        """The dataset's rows, in order.

        Args:
            skip: Leave out so many rows from the beginning.
            state: A state that an earlier call gave with one of these rows, so that rows before it are not read.

        Yields:
            A row, and a state of the stream (JSON) from which a later call may begin.

        Raises:
            UsageError: no such dataset, or it cannot be read to its end.
        """
        try:
            import datasets
        except ImportError as error:
            raise UsageError(f"{self.name}: needs the library datasets: pip install 'ropepp-lit[datasets]'") from error
        number = 0
        try:
            stream = datasets.load_dataset(
                self.path, self.config, split=self.split, streaming=True, revision=None if self.folder else self.commit
            )
            if state is not None:
                number = state["rows"]
                stream.load_state_dict(state["stream"])
            for row in stream:
                number += 1
                if number % STATE_ROWS == 0:
                    state = {"rows": number, "stream": stream.state_dict()}
                if number > skip:
                    yield row, state
        except UsageError:
            raise
        except Exception as error:  # of datasets, fsspec, aiohttp, httpx, pyarrow: there is no common class
            # Not a record that could be left out: everything behind it would be lost.
            line, where = line_of(error), f"row {number + 1}" if number else "its beginning"
            remedy = "prepare its files by themselves, after `hf download`"
            if number:
                remedy = f"run the same command again (finished parts are kept), or {remedy}"
            elif "script" not in line:  # code that a dataset brings is not run
                remedy = f"check its name, configuration and split and the connection, or {remedy}"
            raise UsageError(f"{self.name}: at {where}: {type(error).__name__}: {line}; {remedy}") from error
