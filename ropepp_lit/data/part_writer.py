"""One part of a preparation: its documents as litdata's token chunks, and what is counted over them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata.streaming import Cache, TokensLoader

from ropepp_lit.data.shards import INDEX, Chunk, TokenSet
from ropepp_lit.data.trained_tokens import is_trained, token_ids
from ropepp_lit.errors import UsageError
from ropepp_lit.files import checksum, write_whole
from ropepp_lit.json_files import read_json, sealed, unsealed
from ropepp_lit.text.sources import Cursor

SPLITS = ("train", "validation")

MAX_REASONS = 50
"""Reasons to leave documents out that a part counts one by one."""

MAX_CHUNK_BYTES = 2**32 - 1
"""Litdata's header counts a chunk's bytes in 32 bits."""


@dataclass
class Part:
    """What a finished part contains, and where the stream goes on."""

    cursor: list[Any]
    documents_read: int
    splits: dict[str, TokenSet]
    skipped: dict[str, int]
    examples: list[str]
    index_config: dict[str, Any]
    """litdata's description of the chunks; empty where the part has none."""
    is_last: bool
    """Whether it is the last one of a share of the stream (`--part`)."""
    notices: dict[str, int] = dataclasses.field(default_factory=dict)
    """What people should know of documents that are kept, and of how many it is true."""
    digests_sha256: str = ""
    """SHA-256 of the file of the documents' digests; empty without `--dedup`."""

    @classmethod
    def read(cls, path: Path) -> Part:
        """Read what :meth:`write` wrote.

        Raises:
            UsageError: it is damaged.
        """
        try:
            values = unsealed(read_json(path), required=True)
            values["splits"] = {name: TokenSet.from_dict(split) for name, split in values["splits"].items()}
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{path}: damaged; remove {path.parent.parent} to begin anew") from error

    def write(self, path: Path) -> None:
        """Write the part into a file that appears only when it is complete."""
        write_whole(path, json.dumps(sealed(dataclasses.asdict(self))))


class PartWriter:
    """Writes the documents of one part by litdata.

    Args:
        folder: Of the splits; chunks are written into `writing/` there first.
        number: Of the part, for the chunks' names.
        dtype: numpy's name of the stored tokens' type.
        marks_trained_tokens: Whether the tokens are those that :func:`~.trained_tokens.mark` returned.
        chunk_bytes: Size of a chunk's file at most; a document that is larger has a chunk of its own.
    """

    def __init__(self, folder: Path, number: int, *, dtype: str, marks_trained_tokens: bool, chunk_bytes: int) -> None:
        self._folder, self._number, self._chunk_bytes = folder, number, chunk_bytes
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._marks = marks_trained_tokens
        self._writing = folder / "writing"
        shutil.rmtree(self._writing, ignore_errors=True)
        self._chunks = {name: _Chunks(self._writing / name, chunk_bytes) for name in SPLITS}
        self._sets = {name: TokenSet() for name in SPLITS}
        self._skipped: dict[str, int] = {}
        self._notices: dict[str, int] = {}
        self._examples: list[str] = []
        self._read = 0
        self.digests: list[int] = []
        """Hashes of the documents that were kept, where repeats are left out."""
        self.num_bytes = 0
        """UTF-8 bytes of the documents that were kept."""

    def skip(self, reason: str, where: str | None) -> None:
        """Count a document that is left out."""
        self._read += 1
        if reason not in self._skipped and len(self._skipped) >= MAX_REASONS:  # messages of templates can name contents
            reason = "for other reasons"
        self._skipped[reason] = self._skipped.get(reason, 0) + 1
        if where is not None and len(self._examples) < 20:
            self._examples.append(f"{where}: {reason}")

    def add(self, split: str, data: bytes, stored: np.ndarray, notices: Sequence[str] = ()) -> None:
        """Write a document.

        Args:
            split: `train` or `validation`.
            data: Its text in UTF-8.
            stored: [tokens], integers: token ids, or those that :func:`~.trained_tokens.mark` returned.
            notices: What people should know of it.
        """
        self._chunks[split].add(torch.from_numpy(stored).to(self._dtype))
        self._sets[split].add(
            tokens=len(stored),
            num_bytes=len(data),
            gzip_bytes=len(gzip.compress(data, compresslevel=9)) if split == "validation" else 0,
            max_token_id=int(token_ids(stored).max()),
            trained_tokens=int(is_trained(stored).sum()) if self._marks else 0,
        )
        for notice in notices:
            self._notices[notice] = self._notices.get(notice, 0) + 1
        self._read += 1
        self.num_bytes += len(data)

    def finish(self, cursor: Cursor, *, is_last: bool) -> Part:
        """Give the chunks their names, and return what was written."""
        config: dict[str, Any] = {}
        for name, chunks in self._chunks.items():
            totals = self._sets[name]
            for number, (written, chunk, chunk_config) in enumerate(chunks.finish()):
                config = {**chunk_config, "chunk_bytes": self._chunk_bytes}
                target = self._folder / name / f"chunk-{self._number:06}-{number:04}.bin"
                totals.chunks.append(
                    Chunk(
                        filename=target.name,
                        documents=chunk["chunk_size"],
                        tokens=chunk["dim"],
                        sha256=checksum(written),
                    )
                )
                os.replace(written, target)
            counted = sum(chunk.documents for chunk in totals.chunks), sum(chunk.tokens for chunk in totals.chunks)
            assert counted == (totals.documents, totals.tokens), f"litdata wrote {counted} documents and tokens"
        counted_over = self._sets, self._skipped, self._examples, config, is_last, self._notices
        return Part(list(cursor), self._read, *counted_over)


class _Chunks:
    """The chunks of one split, each by a litdata cache of its own: litdata does not count its header as size."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._cache: Cache | None = None
        self._documents = self._bytes = 0
        self._finished: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []

    def add(self, ids: torch.Tensor) -> None:
        size = ids.numel() * ids.itemsize + 4  # the header has an offset of 4 bytes for each document
        if self._documents and self._bytes + size > self._max_bytes:
            self._close()
        if self._cache is None:
            path = self._folder / f"{len(self._finished):06}"
            self._cache = Cache(str(path), chunk_bytes=2 * MAX_CHUNK_BYTES, item_loader=TokensLoader())
            self._documents, self._bytes = 0, 8
        self._cache[self._documents] = ids
        self._documents += 1
        self._bytes += size

    def _close(self) -> None:
        if self._cache is None:
            return
        folder = self._folder / f"{len(self._finished):06}"
        self._cache.done()
        # Not litdata's merged index: where a launcher sets WORLD_SIZE, litdata waits for one of each rank, for ever.
        (own_index,) = folder.glob(f"*.{INDEX}")
        index = json.loads(own_index.read_text())
        (chunk,) = index["chunks"]
        self._finished.append((folder / chunk["filename"], chunk, index["config"]))
        self._cache = None
        self._documents = 0

    def finish(self) -> list[tuple[Path, dict[str, Any], dict[str, Any]]]:
        """Each chunk's file, and litdata's entries for it and for its format."""
        self._close()
        return self._finished


def write_index(folder: Path, tokens: TokenSet, config: dict[str, Any]) -> None:
    """Litdata's index of a folder of token chunks, so that its own loaders read them too."""
    chunks = [
        {
            "chunk_bytes": (folder / chunk.filename).stat().st_size,
            "chunk_size": chunk.documents,
            "dim": chunk.tokens,
            "filename": chunk.filename,
        }
        for chunk in tokens.chunks
    ]
    write_whole(folder / INDEX, json.dumps({"chunks": chunks, "config": config, "updated_at": "0"}))
