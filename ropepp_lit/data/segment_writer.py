"""Write the segments of a preparation: documents as litdata's token chunks, and their totals."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
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

from ropepp_lit.data.manifest import INDEX, Chunk, TokenSet
from ropepp_lit.data.trained_tokens import is_trained, token_ids
from ropepp_lit.errors import UsageError
from ropepp_lit.files import checksum, write_whole
from ropepp_lit.json_files import read_json, sealed, unsealed
from ropepp_lit.text.sources import Cursor

SPLITS = ("train", "validation")
"""Names of the splits, which are the names of their folders."""

MAX_REASONS = 50
"""Maximum number of skip reasons that a segment counts separately."""

MAX_CHUNK_BYTES = 2**32 - 1
"""Maximum bytes of a chunk: litdata's header has 32-bit offsets."""


@dataclass
class Segment:
    """Record of a finished segment: the unit of progress in which a preparation is written and resumed."""

    cursor: list[Any]
    """Position in the document stream after the segment."""
    documents_read: int
    """Number of documents read, including skipped ones."""
    splits: dict[str, TokenSet]
    """Chunks and totals of each split."""
    skipped: dict[str, int]
    """Number of skipped documents by reason."""
    examples: list[str]
    """The first skipped documents, with the reason."""
    index_config: dict[str, Any]
    """litdata's description of the chunks; empty if there are none."""
    is_last: bool
    """Whether this is the last segment of a part of the stream (`--part`)."""
    notices: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of kept documents by notice."""
    digests_sha256: str = ""
    """SHA-256 of the file of document digests; empty without `--dedup`."""

    @classmethod
    def read(cls, path: Path) -> Segment:
        """Read a record written by :meth:`write`.

        Raises:
            UsageError: The file is damaged.
        """
        try:
            values = unsealed(read_json(path), required=True)
            values["splits"] = {name: TokenSet.from_dict(split) for name, split in values["splits"].items()}
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{path}: damaged; remove {path.parent.parent} to start over") from error

    def write(self, path: Path) -> None:
        """Write the record to a file that appears only when it is complete."""
        write_whole(path, json.dumps(sealed(dataclasses.asdict(self))))

    def write_digests(self, path: Path, digests: list[int]) -> None:
        """Write the 64-bit digests of documents, and set their SHA-256; call this before :meth:`write`."""
        data = np.asarray(digests, dtype=np.uint64).tobytes()
        path.write_bytes(data)
        self.digests_sha256 = hashlib.sha256(data).hexdigest()

    def read_digests(self, path: Path) -> list[int]:
        """Read what :meth:`write_digests` wrote.

        Raises:
            UsageError: The file is missing or damaged.
        """
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != self.digests_sha256:
            raise UsageError(f"{path}: damaged; remove {path.parent.parent} to start over")
        return np.frombuffer(data, dtype=np.uint64).tolist()


class SegmentWriter:
    """Writes the documents of one segment with litdata.

    Args:
        folder: Folder of the splits; chunks are first written into `writing/` in it.
        number: Number of the segment, for the chunks' names.
        dtype: numpy's name of the stored tokens' dtype.
        marks_trained_tokens: Whether documents are stored as returned by :func:`~.trained_tokens.mark`.
        chunk_bytes: Maximum size of a chunk's file; a larger document gets its own chunk.
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
        """Hashes of the kept documents, if duplicates are skipped."""
        self.num_bytes = 0
        """UTF-8 bytes of the kept documents."""

    def skip(self, reason: str, where: str | None) -> None:
        """Count a skipped document."""
        self._read += 1
        if (
            reason not in self._skipped and len(self._skipped) >= MAX_REASONS
        ):  # messages of templates can quote contents
            reason = "for other reasons"
        self._skipped[reason] = self._skipped.get(reason, 0) + 1
        if where is not None and len(self._examples) < 20:
            self._examples.append(f"{where}: {reason}")

    def add(self, split: str, data: bytes, stored: np.ndarray, notices: Sequence[str] = ()) -> None:
        """Write a document.

        Args:
            split: `train` or `validation`.
            data: UTF-8 text of the document.
            stored: [tokens], integers: token ids, or the result of :func:`~.trained_tokens.mark`.
            notices: Notices about the document.
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

    def finish(self, cursor: Cursor, *, is_last: bool) -> Segment:
        """Move the chunks to their final names, and return the record of the segment."""
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
        return Segment(
            cursor=list(cursor),
            documents_read=self._read,
            splits=self._sets,
            skipped=self._skipped,
            examples=self._examples,
            index_config=config,
            is_last=is_last,
            notices=self._notices,
        )


class _Chunks:
    """Chunks of one split. Each has its own litdata cache, because litdata excludes the header from the chunk size."""

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
        # Not litdata's merged index: if a launcher sets WORLD_SIZE, litdata waits forever for the index of each rank.
        (own_index,) = folder.glob(f"*.{INDEX}")
        index = json.loads(own_index.read_text())
        (chunk,) = index["chunks"]
        self._finished.append((folder / chunk["filename"], chunk, index["config"]))
        self._cache = None
        self._documents = 0

    def finish(self) -> list[tuple[Path, dict[str, Any], dict[str, Any]]]:
        """Return each chunk's file, and litdata's index entries for the chunk and its format."""
        self._close()
        return self._finished


def write_index(folder: Path, tokens: TokenSet, config: dict[str, Any]) -> None:
    """Write litdata's index of a folder of token chunks, so that litdata's loaders can read it."""
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
