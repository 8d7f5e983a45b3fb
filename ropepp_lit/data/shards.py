"""Token shards on disk: litdata's token chunks and a manifest that tells what they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ropepp_lit.data.manifest_values import check_values
from ropepp_lit.data.plan import WINDOW_CHUNKS, Span
from ropepp_lit.data.remote import RemoteFolder
from ropepp_lit.data.trained_tokens import split_pair, token_ids
from ropepp_lit.errors import UsageError
from ropepp_lit.files import checksum, inside, read_text, write_whole
from ropepp_lit.json_files import CHECKSUM, read_json, sealed, unsealed
from ropepp_lit.text.identity import opening_of, tokenizer_digest

FORMAT_VERSION = 1
MANIFEST, TOKENIZER, INDEX = "manifest.json", "tokenizer.json", "index.json"

MAX_MAPS = 4 * WINDOW_CHUNKS
"""Chunks that a process keeps mapped: those of the window it reads, and some more."""


@dataclass(kw_only=True)
class Chunk:
    """One file of tokens."""

    filename: str
    documents: int
    tokens: int
    sha256: str


@dataclass(kw_only=True)
class TokenSet:
    """The chunks of one split, and the totals over its documents."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of the documents' text."""
    gzip_bytes: int = 0
    """Bytes of the documents under `gzip -9`, each by itself; counted for validation."""
    max_token_id: int = 0
    lengths: list[list[int]] = field(default_factory=lambda: [[0, 0] for _ in range(40)])
    """Documents, and their tokens, by length: place n counts documents of 2^n to 2^(n+1) - 1 tokens."""
    trained_tokens: int = 0
    """Tokens that are trained, where the shards mark them (:mod:`ropepp_lit.data.trained_tokens`)."""
    longest: int = 0
    """Tokens of the longest document; 0 in folders of earlier versions."""
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, *, tokens: int, num_bytes: int, gzip_bytes: int, max_token_id: int, trained_tokens: int = 0) -> None:
        """Count a document."""
        self.documents += 1
        self.tokens += tokens
        self.bytes += num_bytes
        self.gzip_bytes += gzip_bytes
        self.max_token_id = max(self.max_token_id, max_token_id)
        self.trained_tokens += trained_tokens
        self.longest = max(self.longest, tokens)
        place = self.lengths[tokens.bit_length() - 1]
        place[0] += 1
        place[1] += tokens

    def predicted(self, *, documents_apart: bool) -> int:
        """Tokens that count as labels: those that are trained where that is marked, else all but first ones.

        Args:
            documents_apart: The first token of each document is not predicted, instead of that of the first alone.
        """
        return self.trained_tokens or self.tokens - (self.documents if documents_apart else 1)

    @property
    def digest(self) -> str:
        """Names the tokens and their order: equal for equal chunks, wherever they and their text lie."""
        return hashlib.sha256("".join(chunk.sha256 for chunk in self.chunks).encode()).hexdigest()

    @classmethod
    def sum(cls, parts: Sequence[TokenSet]) -> TokenSet:
        """The documents of parts together."""
        total = cls()
        for part in parts:
            total.documents += part.documents
            total.tokens += part.tokens
            total.bytes += part.bytes
            total.gzip_bytes += part.gzip_bytes
            total.max_token_id = max(total.max_token_id, part.max_token_id)
            total.trained_tokens += part.trained_tokens
            total.longest = max(total.longest, part.longest)
            total.lengths = [[a + c, b + d] for (a, b), (c, d) in zip(total.lengths, part.lengths, strict=True)]
            total.chunks += part.chunks
        return total

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenSet:
        """What `dataclasses.asdict` wrote."""
        if not isinstance(values["chunks"], list):
            raise ValueError("chunks is not a list")
        return cls(**{**values, "chunks": [Chunk(**chunk) for chunk in values["chunks"]]})


def bytes_per_token(sets: Sequence[TokenSet], weights: Sequence[float], *, documents_apart: bool) -> float | None:
    """UTF-8 bytes of text per predicted token; None where only some tokens are trained.

    Args:
        sets: That are mixed.
        weights: Of each, by tokens.
        documents_apart: See :meth:`TokenSet.predicted`.
    """
    if any(tokens.trained_tokens for tokens in sets):
        return None
    pairs = list(zip(weights, sets, strict=True))
    num_bytes = sum(weight * tokens.bytes / tokens.tokens for weight, tokens in pairs)
    return num_bytes / sum(
        weight * tokens.predicted(documents_apart=documents_apart) / tokens.tokens for weight, tokens in pairs
    )


@dataclass(kw_only=True)
class Manifest:
    """What a folder of token shards holds."""

    format_version: int
    fingerprint: str
    """Names the sources and settings that the shards were made from."""
    sources: list[str]
    """As they were given."""
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int
    opening: list[int]
    """Tokens before every document's text."""
    dtype: str
    """numpy's name of the tokens' type: uint16 up to 65,536 tokens of vocabulary, else int32."""
    skipped: dict[str, int]
    """Documents left out, by reason."""
    examples: list[str]
    """The first of those that could not be read, and where they are."""
    splits: dict[str, TokenSet]
    """By name: `train`, and `validation` where documents were held out."""
    tokenizer_digest: str | None = None
    """Of tokenizer.json (:func:`~ropepp_lit.text.identity.tokenizer_digest`); None in folders of earlier versions."""
    marks_trained_tokens: bool = False
    """Whether only some tokens are trained, and the shards mark which (:mod:`ropepp_lit.data.trained_tokens`)."""
    holds_pairs: bool = False
    """Whether a document is a pair of answers, a chosen and a rejected one (see there too)."""
    chat_template: str | None = None
    """The Jinja template that the conversations were rendered by; None where they are not conversations."""
    end_of_turn: list[int] = field(default_factory=list)
    """Tokens that end an assistant's turn by that template; a model stops writing at them."""
    notices: dict[str, int] = field(default_factory=dict)
    """What people should know of documents that are kept, and of how many it is true."""

    @property
    def largest_token_id(self) -> int:
        """Of the tokens that occur."""
        return max(self.eos_token_id, *(tokens.max_token_id for tokens in self.splits.values()))

    def write(self, folder: Path) -> None:
        """Write the manifest with a checksum of itself; it appears in the folder only when it is complete."""
        write_whole(folder / MANIFEST, json.dumps(sealed(dataclasses.asdict(self)), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path, *, url: str | None = None) -> Manifest:
        """Read the manifest of a folder.

        Args:
            folder: Where it lies.
            url: Where it was fetched from, for messages.

        Raises:
            UsageError: there is none, or it is not one of ours, or it names files outside its folder.
        """
        path, (where, remedy) = folder / MANIFEST, _told(folder, url)
        try:
            stored = read_json(path)
            if (version := stored["format_version"]) != FORMAT_VERSION:
                raise UsageError(
                    f"{where}/{MANIFEST}: format_version {version!r}, and this version reads {FORMAT_VERSION}; {remedy}"
                )
            values = {name: value for name, value in stored.items() if name != CHECKSUM}
            splits = {name: TokenSet.from_dict(split) for name, split in values.pop("splits").items()}
            manifest = cls(**{"opening": opening_of(values), **values}, splits=splits)
            for split, tokens in splits.items():
                inside(folder, split, source=f"{where}/{MANIFEST}")
                for chunk in tokens.chunks:
                    inside(folder / split, chunk.filename, source=f"{where}/{MANIFEST}")
            check_values(manifest)
            unsealed(stored)
        except UsageError:
            raise
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; the folder holds no finished token shards") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{where}/{MANIFEST}: not a manifest of token shards ({error}); {remedy}") from error
        return manifest

    def read_tokenizer(self, folder: Path, *, url: str | None = None) -> str:
        """The tokenizer.json of the manifest's folder.

        Args:
            folder: Where it lies.
            url: Where it was fetched from, for messages.

        Raises:
            UsageError: it is missing, or is not that with which the shards were made.
        """
        path, (where, remedy) = folder / TOKENIZER, _told(folder, url)
        try:
            digest = tokenizer_digest(text := read_text(path))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; {remedy}") from error
        except ValueError as error:
            raise UsageError(f"{where}/{TOKENIZER}: not JSON ({error}); {remedy}") from error
        if self.tokenizer_digest not in (None, digest):
            raise UsageError(
                f"{where}/{TOKENIZER}: not the tokenizer that the shards were made with; put that file back, or "
                f"{remedy}"
            )
        return text


def _told(folder: Path, url: str | None) -> tuple[str, str]:
    """How messages call a folder of shards, and what they say to do where it is damaged."""
    return (str(folder), f"remove {folder} to prepare it again") if url is None else (url, "upload the shards again")


class TokenShards:
    """The tokens of one split, memory-mapped. Sizes are checked at once, a chunk's checksum when it is first read.

    Args:
        folder: Of the manifest.
        manifest: What it holds.
        split: `train` or `validation`.
        chunks: Some of the split's chunks; empty means all.
        remote: Where chunks are fetched from when they are needed; empty means that they are in the folder.

    Raises:
        UsageError: a chunk is missing or has another size than the manifest says, or the index is not that of the
            chunks.
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
            found = path.stat().st_size if path.exists() else None
            if found != expected:
                problem = "missing" if found is None else f"{found} bytes instead of {expected}"
                raise UsageError(f"{path}: {problem}; the shards are damaged: remove {folder} to prepare them again")
        if chunks is None and (fault := fault_of_index(folder, manifest, split)):
            raise UsageError(f"{fault}; the shards are damaged: remove {folder} to prepare them again")

    def read(self, spans: list[Span], out: np.ndarray, starts: np.ndarray | None = None) -> int:
        """Write the tokens of spans, joined, to the beginning of an array.

        Args:
            spans: Of a :class:`~ropepp_lit.data.plan.BlockPlan` or a :class:`~ropepp_lit.data.packing.PackedPlan` over
                these chunks.
            out: [tokens or more], integers. Where the shards mark trained tokens, the others become their complements,
                as they are stored (:mod:`ropepp_lit.data.trained_tokens`).
            starts: [tokens or more], bool: becomes true where a document starts; other places are left as they are.

        Returns:
            How many there are.

        Raises:
            UsageError: a chunk's content is not what was written, or it cannot be fetched.
        """
        end = 0
        for chunk, start, num_tokens in spans:
            tokens, offsets = self.open_chunk(chunk)
            out[end : end + num_tokens] = tokens[start : start + num_tokens]
            if starts is not None:
                # Keys of the offsets' own type: others would make numpy convert all offsets of the chunk.
                bounds = np.array((start, start + num_tokens), dtype=np.int64) * self._dtype.itemsize + offsets[0]
                first, last = offsets[:-1].searchsorted(bounds.astype(offsets.dtype))
                starts[(offsets[first:last] - bounds[0]) // self._dtype.itemsize + end] = True
            end += num_tokens
        return end

    def documents(self) -> Iterator[np.ndarray]:
        """Token ids of each document, in the order in which they are stored; of a pair those of the chosen answer.

        Raises:
            UsageError: as for :meth:`read`.
        """
        for index in range(len(self.chunks)):
            tokens, offsets = self.open_chunk(index)
            ends = (offsets[1:-1].astype(np.int64) - offsets[0]) // self._dtype.itemsize
            for document in np.split(tokens, ends):
                yield token_ids(split_pair(document)[0]) if self._is_marked else document

    def expect(self, chunks: list[int]) -> None:
        """Fetch chunks that will be read later, in the background."""
        if self._fetching and self._fetching[0] == chunks:
            return
        executor = self._fetching[1] if self._fetching else ThreadPoolExecutor(max_workers=1)
        self._fetching = chunks, executor
        for index in chunks:
            if index not in self._maps:
                executor.submit(self._path, index)  # an error shows when the chunk is read

    def open_chunk(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A chunk's tokens as they are stored, and litdata's offsets.

        Those are in bytes: where each document starts in the file, and where the last one ends.
        """
        if index not in self._maps:
            chunk, path = self.chunks[index], self._path(index)
            header = self._header_bytes(chunk)
            contents = np.asarray(np.memmap(path, np.uint8, mode="r"))  # plain arrays are sliced faster
            offsets, tokens = contents[4:header].view(np.uint32), contents[header:].view(self._dtype)
            is_right = contents[:4].view(np.uint32)[0] == chunk.documents
            is_right = is_right and (offsets[0], offsets[-1]) == (header, len(contents))
            is_right = is_right and bool((offsets[1:] > offsets[:-1]).all())
            if not is_right or ((offsets - offsets[0]) % self._dtype.itemsize).any():
                raise UsageError(
                    f"{path}: its header does not give the bounds of {chunk.documents} documents; "
                    f"the shards are damaged: remove {self.folder.parent} to prepare them again"
                )
            self._maps[index] = tokens, offsets
            if len(self._maps) > MAX_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(index)
        return self._maps[index]

    def _path(self, index: int) -> Path:
        """The chunk's file, its content checked."""
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
                if not is_new:  # what was kept is of an older set of this name
                    return self._path(index)
                where = self._remote.url
            raise UsageError(
                f"{path}: its checksum is not the manifest's; the shards are damaged: "
                f"remove {where} to prepare them again"
            )
        self._checked.add(index)
        return path

    def _file_bytes(self, chunk: Chunk) -> int:
        return self._header_bytes(chunk) + chunk.tokens * self._dtype.itemsize

    @staticmethod
    def _header_bytes(chunk: Chunk) -> int:
        """Litdata's header: the number of documents, and an offset for each and for the end, as uint32."""
        return 4 * (chunk.documents + 2)

    def __getstate__(self) -> dict:
        # A worker process maps the files itself.
        return {**self.__dict__, "_maps": OrderedDict(), "_checked": set(), "_fetching": None}


def fault_of_index(folder: Path, manifest: Manifest, split: str) -> str | None:
    """What is wrong with litdata's index of a split."""
    index = folder / split / INDEX
    try:
        listed = [chunk["filename"] for chunk in read_json(index)["chunks"]]
    except (OSError, ValueError, KeyError, TypeError):
        listed = None
    if listed == [chunk.filename for chunk in manifest.splits[split].chunks]:
        return None
    return f"{index}: missing, garbled, or of other chunks than the manifest's"
