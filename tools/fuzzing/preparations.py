"""Unfinished preparations and finished parts of one: created, and continued or merged as `prepare` does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fuzzing.models import TEXTS
from ropepp_lit.commands import prepare as prepare_command
from ropepp_lit.data import encoders, preparation
from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.parts import Part, merge
from ropepp_lit.data.preparation import PrepareSettings
from ropepp_lit.data.prepare import prepare

SETTINGS = {"tokenizer": "bytes", "validation_fraction": 0.3, "chunk_bytes": 512}


@contextlib.contextmanager
def _small_parts() -> Iterator[None]:
    """Cut a few kilobytes into several segments."""
    sizes = mock.patch.multiple(preparation, SEGMENT_BYTES=600, CUT_BYTES=1200)
    with sizes, mock.patch.object(encoders, "BATCH_BYTES", 300):
        yield


def _write_source(folder: Path) -> str:
    folder.mkdir(parents=True)
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(4) for text in TEXTS))
    return str(path)


def make_unfinished(folder: Path) -> None:
    """Interrupt a preparation after its third segment."""
    source = _write_source(folder)
    commit = preparation.Preparation._commit

    def commit_three(self: Any, writer: Any, number: int, *arguments: Any, **options: Any) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return commit(self, writer, number, *arguments, **options)

    with (
        _small_parts(),
        mock.patch.object(preparation.Preparation, "_commit", commit_three),
        contextlib.suppress(KeyboardInterrupt),
    ):
        prepare([source], PrepareSettings(**SETTINGS, dedup=True), out=folder / "shards", show_progress=False)
    (folder / ".shards.lock").unlink(missing_ok=True)


def read_unfinished(folder: Path, changed: Path) -> Any:
    """Continue the preparation, and verify its result."""
    with _small_parts():
        settings = PrepareSettings(**SETTINGS, dedup=True)
        prepare([str(folder / "text.jsonl")], settings, out=folder / "shards", show_progress=False)
    return _verified(folder / "shards")


def make_parts(folder: Path) -> None:
    """Prepare a source in two parts."""
    source = _write_source(folder)
    second = folder / "second.jsonl"
    second.write_text("".join(json.dumps({"text": f"second {text}"}) + "\n" for text in TEXTS))
    for number in (1, 2):
        with _small_parts():
            prepare([source, str(second)], PrepareSettings(**SETTINGS), out=folder / f"part-{number}",
                    part=Part(number, 2), show_progress=False)  # fmt: skip
        (folder / f".part-{number}.lock").unlink(missing_ok=True)


def read_parts(folder: Path, changed: Path) -> Any:
    """Merge the parts, and verify the result."""
    merge([folder / "part-1", folder / "part-2"], out=folder / "shards")
    return _verified(folder / "shards")


def _verified(shards: Path) -> Any:
    """Return what the shards contain, once `prepare --verify` has accepted them."""
    prepare_command.prepare(verify=str(shards))
    manifest = Manifest.read(shards)
    return {
        "tokens": {name: tokens.digest for name, tokens in manifest.splits.items()},
        "documents": {name: tokens.documents for name, tokens in manifest.splits.items()},
        "skipped": manifest.skipped,
        "vocabulary": (manifest.vocab_size, manifest.bos_token_id, manifest.eos_token_id),
    }
