"""Token shards on disk: litdata's token chunks and a manifest that tells what they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ropepp_lit.data.plan import Span
from ropepp_lit.errors import UsageError

FORMAT_VERSION = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"


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

    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    gzip_bytes: int | None
    """Bytes of the documents under `gzip -9`, each by itself; counted for validation."""
    max_token_id: int
    chunks: list[Chunk]


@dataclass(kw_only=True)
class Manifest:
    """What a folder of token shards holds."""

    format_version: int
    fingerprint: str
    """Names the sources and settings that the shards were made from."""
    source: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int
    dtype: str
    """numpy's name of the tokens' type: uint16 up to 65,536 tokens of vocabulary, else int32."""
    skipped: int
    """Files left out because they are empty or not UTF-8."""
    splits: dict[str, TokenSet]
    """By name: `train` and `validation`."""

    def write(self, folder: Path) -> None:
        """Write the manifest into the folder."""
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            UsageError: there is none, or it is not one of ours.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            splits = {
                name: TokenSet(**{**split, "chunks": [Chunk(**chunk) for chunk in split["chunks"]]})
                for name, split in values.pop("splits").items()
            }
            manifest = cls(**values, splits=splits)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; the folder holds no finished token shards") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"{path}: not a manifest of token shards ({error}); remove the folder to prepare it again"
            ) from error
        if manifest.format_version != FORMAT_VERSION:
            raise UsageError(
                f"{path}: format_version {manifest.format_version}, and this version reads {FORMAT_VERSION}; "
                "remove the folder to prepare it again"
            )
        return manifest


class TokenShards:
    """The tokens of one split, memory-mapped. Sizes are checked at once, a chunk's checksum when it is first read.

    Args:
        folder: Of the manifest.
        manifest: What it holds.
        split: `train` or `validation`.

    Raises:
        UsageError: a chunk is missing or has another size than the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self.folder, self.chunks = folder / split, manifest.splits[split].chunks
        self._dtype = np.dtype(manifest.dtype)
        self._maps: dict[int, np.ndarray] = {}
        for chunk in self.chunks:
            path = self.folder / chunk.filename
            expected = self._header_bytes(chunk) + chunk.tokens * self._dtype.itemsize
            found = path.stat().st_size if path.exists() else None
            if found != expected:
                problem = "missing" if found is None else f"{found} bytes instead of {expected}"
                raise UsageError(f"{path}: {problem}; the shards are damaged: remove {folder} to prepare them again")

    def read(self, spans: list[Span]) -> np.ndarray:
        """The tokens of spans, joined.

        Args:
            spans: Of a :class:`~ropepp_lit.data.plan.BlockPlan` over these chunks.

        Returns:
            [tokens] int64.

        Raises:
            UsageError: a chunk's content is not what was written.
        """
        parts = [self._chunk(span.chunk)[span.start : span.start + span.num_tokens] for span in spans]
        return np.concatenate(parts).astype(np.int64)

    def _chunk(self, index: int) -> np.ndarray:
        if index not in self._maps:
            chunk = self.chunks[index]
            path = self.folder / chunk.filename
            if checksum(path) != chunk.sha256:
                raise UsageError(
                    f"{path}: its checksum is not the manifest's; the shards are damaged: "
                    f"remove {self.folder.parent} to prepare them again"
                )
            self._maps[index] = np.memmap(
                path, self._dtype, mode="r", offset=self._header_bytes(chunk), shape=(chunk.tokens,)
            )
        return self._maps[index]

    @staticmethod
    def _header_bytes(chunk: Chunk) -> int:
        """Litdata's header: the number of documents, and an offset for each and for the end, as uint32."""
        return 4 * (chunk.documents + 2)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # a worker process maps the files itself


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
