"""Stream datasets by the library `datasets`, from the Hugging Face Hub or a local folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ropepp_lit.errors import UsageError
from ropepp_lit.text.formats import first_line

HUB = "hf:"
"""Prefix of the name of a Hugging Face dataset."""

STATE_ROWS = 1000
"""Rows between two saved states of a stream, from which it can resume without reading the rows before."""


@dataclass(frozen=True)
class HubDataset:
    """A split of a Hugging Face dataset."""

    name: str
    """Name as specified: `hf:NAME[@REVISION]`, `…:SPLIT` or `…:CONFIG:SPLIT`."""
    path: str
    revision: str | None
    config: str | None
    split: str

    num_bytes = 0
    """Size; 0 because it is unknown."""

    @classmethod
    def from_name(cls, name: str, *, key: str) -> HubDataset:
        """Parse the name of a dataset.

        Raises:
            UsageError: The name has another form; the message begins with `key`.
        """
        path, *rest = name.removeprefix(HUB).split(":")
        revision = None
        if not Path(path).expanduser().is_dir():
            path, _, revision = path.partition("@")
        if not path or (revision == "" and "@" in name) or len(rest) > 2:
            raise UsageError(
                f"{key}: {name}: write {HUB}NAME, {HUB}NAME:SPLIT or {HUB}NAME:CONFIG:SPLIT, "
                "with NAME@REVISION for a specific revision"
            )
        if revision and Path(path).expanduser().is_dir():
            raise UsageError(f"{key}: {name}: {path} is a local folder, which has no revisions; remove @{revision}")
        return cls(name, path, revision or None, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train")

    @property
    def folder(self) -> Path | None:
        """Folder of a local dataset; None for a dataset on the Hub."""
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None

    @cached_property
    def commit(self) -> str:
        """Commit hash on the Hub, which all reads use.

        Raises:
            UsageError: The Hub has no such dataset or revision, or does not respond.
        """
        if self.revision and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self.revision
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.path, revision=self.revision, timeout=20).sha)
        except Exception as error:  # errors of httpx and huggingface_hub
            raise UsageError(f"{self.name}: {first_line(error)}; check the name and the connection") from error

    def rows(self, skip: int, state: dict | None) -> Iterator[tuple[dict, dict | None]]:
        """Iterate over the dataset's rows, in order.

        Args:
            skip: Number of rows at the beginning to skip.
            state: State that an earlier call yielded with one of the skipped rows; rows before it are not read.

        Yields:
            A row, and a state of the stream (JSON) from which a later call can resume.

        Raises:
            UsageError: There is no such dataset, or it cannot be read to its end.
        """
        try:
            import datasets
        except ImportError as error:
            raise UsageError(
                f"{self.name}: requires the library datasets: pip install 'ropepp-lit[datasets]'"
            ) from error
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
        except Exception as error:  # of datasets, fsspec, aiohttp, httpx, pyarrow: no common base class
            # Not a record that can be skipped: all rows after it would be lost.
            line, where = first_line(error), f"row {number + 1}" if number else "its beginning"
            remedy = "prepare its files directly, after `hf download`"
            if number:
                remedy = f"run the same command again (finished segments are kept), or {remedy}"
            elif "script" not in line:  # a dataset's own loading code is never run
                remedy = f"check its name, configuration and split and the connection, or {remedy}"
            raise UsageError(f"{self.name}: at {where}: {type(error).__name__}: {line}; {remedy}") from error
