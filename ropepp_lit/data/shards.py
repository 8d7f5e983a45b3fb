"""Read token shards: litdata's chunk files, each a header with the documents' offsets followed by the tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ropepp_lit.data.manifest import INDEX, MANIFEST, Chunk, Manifest
from ropepp_lit.data.plan import WINDOW_CHUNKS, ChunkSlice
from ropepp_lit.data.remote import RemoteFolder
from ropepp_lit.data.trained_tokens import split_pair, token_ids
from ropepp_lit.errors import UsageError
from ropepp_lit.files import checksum
from ropepp_lit.json_files import read_json

MAX_MAPS = 4 * WINDOW_CHUNKS
"""Maximum number of chunks that a process keeps memory-mapped: several windows of chunks."""


class TokenShards:
    """The tokens of one split, memory-mapped.

    Sizes are checked on creation, and a chunk's checksum when the chunk is first read.

    Args:
        folder: Folder of the manifest.
        manifest: Manifest of the folder.
        split: `train` or `validation`.
        chunks: Some of the split's chunks; None means all.
        remote: Object store from which chunks are fetched on demand; None means that they are in the folder.

    Raises:
        UsageError: A chunk is missing or its size differs from the manifest, or the index has other chunks.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        split: str,
        chunks: list[Chunk] | None = None,
        *,
        remote: RemoteFolder | None = None,
    ) -> None:
        if split not in manifest.splits:
            raise UsageError(f"{folder / MANIFEST}: has no split {split!r}; remove {folder} to prepare it again")
        self.folder, self.chunks = folder / split, manifest.splits[split].chunks if chunks is None else chunks
        self._remote, self.is_remote = remote, remote is not None
        self._dtype, self._is_marked = np.dtype(manifest.dtype), manifest.marks_trained_tokens
        self._maps: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._checked: set[int] = set()
        self._fetching: tuple[list[int], ThreadPoolExecutor] | None = None
        if remote is not None:
            return
        for chunk in self.chunks:
            path = self.folder / chunk.filename
            expected = self._file_bytes(chunk)
            actual = path.stat().st_size if path.exists() else None
            if actual != expected:
                problem = "missing" if actual is None else f"{actual} bytes instead of {expected}"
                raise UsageError(f"{path}: {problem}; the shards are damaged: remove {folder} to prepare them again")
        if chunks is None and (index_problem := find_index_problem(folder, manifest, split)):
            raise UsageError(f"{index_problem}; the shards are damaged: remove {folder} to prepare them again")

    def read(self, slices: list[ChunkSlice], out: np.ndarray, starts: np.ndarray | None = None) -> int:
        """Write the concatenated tokens of slices to the beginning of an array.

        Args:
            slices: Slices from a :class:`~ropepp_lit.data.plan.BlockPlan` or
                :class:`~ropepp_lit.data.packing.PackedPlan` over these chunks.
            out: [tokens or more], integers. If the shards mark trained tokens, the others are written as complements,
                as stored (:mod:`ropepp_lit.data.trained_tokens`).
            starts: [tokens or more], bool: set to true where a document starts; other elements are not changed.

        Returns:
            The number of tokens.

        Raises:
            UsageError: A chunk is damaged or cannot be fetched.
        """
        end = 0
        for chunk, start, num_tokens in slices:
            tokens, offsets = self.open_chunk(chunk)
            out[end : end + num_tokens] = tokens[start : start + num_tokens]
            if starts is not None:
                # Search keys of the offsets' dtype: with others numpy would convert all offsets of the chunk.
                bounds = np.array((start, start + num_tokens), dtype=np.int64) * self._dtype.itemsize + offsets[0]
                first, last = offsets[:-1].searchsorted(bounds.astype(offsets.dtype))
                starts[(offsets[first:last] - bounds[0]) // self._dtype.itemsize + end] = True
            end += num_tokens
        return end

    def documents(self) -> Iterator[np.ndarray]:
        """Iterate over the token ids of each document in stored order; of a pair, over those of the chosen answer.

        Raises:
            UsageError: See :meth:`read`.
        """
        for index in range(len(self.chunks)):
            tokens, offsets = self.open_chunk(index)
            ends = (offsets[1:-1].astype(np.int64) - offsets[0]) // self._dtype.itemsize
            for document in np.split(tokens, ends):
                yield token_ids(split_pair(document)[0]) if self._is_marked else document

    def prefetch(self, chunks: list[int]) -> None:
        """Fetch chunks in the background that will be read later."""
        if self._fetching and self._fetching[0] == chunks:
            return
        executor = self._fetching[1] if self._fetching else ThreadPoolExecutor(max_workers=1)
        self._fetching = chunks, executor
        for index in chunks:
            if index not in self._maps:
                executor.submit(self._path, index)  # errors are raised when the chunk is read

    def open_chunk(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a chunk's tokens as stored, and litdata's offsets.

        Offsets are byte positions in the file: the start of each document, and the end of the last one.

        Raises:
            UsageError: See :meth:`read`.
        """
        if index not in self._maps:
            chunk, path = self.chunks[index], self._path(index)
            header = self._header_bytes(chunk)
            contents = np.asarray(np.memmap(path, np.uint8, mode="r"))  # plain arrays are faster to slice
            offsets, tokens = contents[4:header].view(np.uint32), contents[header:].view(self._dtype)
            is_valid = contents[:4].view(np.uint32)[0] == chunk.documents
            is_valid = is_valid and (offsets[0], offsets[-1]) == (header, len(contents))
            is_valid = is_valid and bool((offsets[1:] > offsets[:-1]).all())
            if not is_valid or ((offsets - offsets[0]) % self._dtype.itemsize).any():
                raise UsageError(
                    f"{path}: its header does not have valid offsets of {chunk.documents} documents; "
                    f"the shards are damaged: remove {self.folder.parent} to prepare them again"
                )
            self._maps[index] = tokens, offsets
            if len(self._maps) > MAX_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(index)
        return self._maps[index]

    def _path(self, index: int) -> Path:
        """Return the path of a chunk's file, after checking its content."""
        chunk, path, is_new = self.chunks[index], self.folder / self.chunks[index].filename, False
        if self._remote is not None:
            name = f"{self.folder.name}/{chunk.filename}"
            path, is_new = self._remote.fetch_chunk(name, self._file_bytes(chunk))
        if index in self._checked and not is_new:
            return path
        if checksum(path) != chunk.sha256:
            where = str(self.folder.parent)
            if self._remote is not None:
                path.unlink()
                if not is_new:  # the cached file belongs to an older set of this name
                    return self._path(index)
                where = self._remote.url
            raise UsageError(
                f"{path}: its checksum differs from the manifest; the shards are damaged: "
                f"remove {where} to prepare them again"
            )
        self._checked.add(index)
        return path

    def _file_bytes(self, chunk: Chunk) -> int:
        return self._header_bytes(chunk) + chunk.tokens * self._dtype.itemsize

    @staticmethod
    def _header_bytes(chunk: Chunk) -> int:
        """Return the size of litdata's header: the number of documents, their offsets and the end, each a uint32."""
        return 4 * (chunk.documents + 2)

    def __getstate__(self) -> dict:
        # Worker processes map the files themselves.
        return {**self.__dict__, "_maps": OrderedDict(), "_checked": set(), "_fetching": None}


def find_index_problem(folder: Path, manifest: Manifest, split: str) -> str | None:
    """Return the problem of litdata's index of a split; None if it lists the manifest's chunks."""
    index = folder / split / INDEX
    try:
        listed = [chunk["filename"] for chunk in read_json(index)["chunks"]]
    except (OSError, ValueError, KeyError, TypeError):
        listed = None
    if listed == [chunk.filename for chunk in manifest.splits[split].chunks]:
        return None
    return f"{index}: missing, damaged, or its chunks differ from the manifest"
