"""Format of a folder of token shards: its file names, and the manifest with each split's chunks and totals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropepp_lit.data.manifest_values import check_values
from ropepp_lit.errors import UsageError
from ropepp_lit.files import inside, read_text, write_whole
from ropepp_lit.json_files import CHECKSUM, read_json, sealed, unsealed
from ropepp_lit.text.identity import opening_of, tokenizer_digest

FORMAT_VERSION = 1
MANIFEST, TOKENIZER, INDEX = "manifest.json", "tokenizer.json", "index.json"
"""Names of files: the manifest, its tokenizer, and litdata's index in the folder of each split."""


@dataclass(kw_only=True)
class Chunk:
    """A file of tokens."""

    filename: str
    documents: int
    tokens: int
    sha256: str


@dataclass(kw_only=True)
class TokenSet:
    """The chunks of one split, and totals over its documents."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """Total UTF-8 bytes of the documents' texts."""
    gzip_bytes: int = 0
    """Total bytes of the documents, each compressed by `gzip -9`; computed for validation only."""
    max_token_id: int = 0
    """Largest token id that occurs."""
    lengths: list[list[int]] = field(default_factory=lambda: [[0, 0] for _ in range(40)])
    """Histogram of lengths: entry n has the number of documents of 2^n to 2^(n+1) - 1 tokens, and their tokens."""
    trained_tokens: int = 0
    """Number of trained tokens, if the shards mark them (:mod:`ropepp_lit.data.trained_tokens`)."""
    longest: int = 0
    """Number of tokens of the longest document; 0 in folders of earlier versions."""
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, *, tokens: int, num_bytes: int, gzip_bytes: int, max_token_id: int, trained_tokens: int = 0) -> None:
        """Add a document to the totals."""
        self.documents += 1
        self.tokens += tokens
        self.bytes += num_bytes
        self.gzip_bytes += gzip_bytes
        self.max_token_id = max(self.max_token_id, max_token_id)
        self.trained_tokens += trained_tokens
        self.longest = max(self.longest, tokens)
        entry = self.lengths[tokens.bit_length() - 1]
        entry[0] += 1
        entry[1] += tokens

    def predicted(self, *, documents_apart: bool) -> int:
        """Return the number of labels: the trained tokens if they are marked, else all tokens except first ones.

        Args:
            documents_apart: Whether the first token of each document is not predicted, instead of only the very first.
        """
        return self.trained_tokens or self.tokens - (self.documents if documents_apart else 1)

    @property
    def digest(self) -> str:
        """Hash of the tokens and their order, independent of paths and sources."""
        return hashlib.sha256("".join(chunk.sha256 for chunk in self.chunks).encode()).hexdigest()

    @classmethod
    def sum(cls, parts: Sequence[TokenSet]) -> TokenSet:
        """Add up the totals of parts, and concatenate their chunks."""
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
        """Create from the result of `dataclasses.asdict`."""
        if not isinstance(values["chunks"], list):
            raise ValueError("chunks is not a list")
        return cls(**{**values, "chunks": [Chunk(**chunk) for chunk in values["chunks"]]})


def bytes_per_token(sets: Sequence[TokenSet], weights: Sequence[float], *, documents_apart: bool) -> float | None:
    """Return the UTF-8 bytes of text per predicted token; None if only some tokens are trained.

    Args:
        sets: Token sets of a mixture.
        weights: Weight of each set, by tokens.
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
    """Description of a folder of token shards (manifest.json)."""

    format_version: int
    fingerprint: str
    """Hash of the inputs and settings from which the shards were prepared."""
    sources: list[str]
    """Names of the sources as given by the user."""
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int
    opening: list[int]
    """Token ids before every document's text."""
    dtype: str
    """numpy's name of the tokens' dtype: uint16 for vocabularies of up to 65,536 tokens, else int32."""
    skipped: dict[str, int]
    """Number of skipped documents by reason."""
    examples: list[str]
    """The first skipped documents and files, with the reason."""
    splits: dict[str, TokenSet]
    """Token sets by split: `train`, and `validation` if documents were held out."""
    tokenizer_digest: str | None = None
    """Digest of tokenizer.json (:func:`~ropepp_lit.text.identity.tokenizer_digest`); None in earlier versions."""
    marks_trained_tokens: bool = False
    """Whether only some tokens are trained, and the shards mark which (:mod:`ropepp_lit.data.trained_tokens`)."""
    holds_pairs: bool = False
    """Whether each document is a pair of a chosen and a rejected answer (:mod:`ropepp_lit.data.trained_tokens`)."""
    chat_template: str | None = None
    """Jinja template of the conversations; None if the documents are not conversations."""
    end_of_turn: list[int] = field(default_factory=list)
    """Token ids that end an assistant's turn in that template, and end generation."""
    notices: dict[str, int] = field(default_factory=dict)
    """Number of kept documents by notice."""

    @property
    def largest_token_id(self) -> int:
        """Largest token id that occurs."""
        return max(self.eos_token_id, *(tokens.max_token_id for tokens in self.splits.values()))

    def write(self, folder: Path) -> None:
        """Write the manifest with its checksum; the file appears only when it is complete."""
        write_whole(folder / MANIFEST, json.dumps(sealed(dataclasses.asdict(self)), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path, *, url: str | None = None) -> Manifest:
        """Read and check the manifest of a folder.

        Args:
            folder: Folder of the manifest.
            url: URL from which it was fetched, for messages.

        Raises:
            UsageError: There is no manifest, it is damaged or of another version, or it has files outside its folder.
        """
        path, (where, remedy) = folder / MANIFEST, _location_and_remedy(folder, url)
        try:
            stored = read_json(path)
            if (version := stored["format_version"]) != FORMAT_VERSION:
                raise UsageError(
                    f"{where}/{MANIFEST}: format_version is {version!r} instead of {FORMAT_VERSION}; {remedy}"
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
            raise UsageError(f"{path}: {error.strerror}; the folder has no finished token shards") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{where}/{MANIFEST}: not a manifest of token shards ({error}); {remedy}") from error
        return manifest

    def read_tokenizer(self, folder: Path, *, url: str | None = None) -> str:
        """Read tokenizer.json of the manifest's folder.

        Args:
            folder: Folder of the manifest.
            url: URL from which it was fetched, for messages.

        Returns:
            The content of the file.

        Raises:
            UsageError: The file is missing, or is not the tokenizer of the shards.
        """
        path, (where, remedy) = folder / TOKENIZER, _location_and_remedy(folder, url)
        try:
            digest = tokenizer_digest(text := read_text(path))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; {remedy}") from error
        except ValueError as error:
            raise UsageError(f"{where}/{TOKENIZER}: not JSON ({error}); {remedy}") from error
        if self.tokenizer_digest not in (None, digest):
            raise UsageError(
                f"{where}/{TOKENIZER}: not the tokenizer with which the shards were prepared; restore that file, or "
                f"{remedy}"
            )
        return text


def _location_and_remedy(folder: Path, url: str | None) -> tuple[str, str]:
    """Return the location of a folder of shards for messages, and the remedy if it is damaged."""
    return (str(folder), f"remove {folder} to prepare it again") if url is None else (url, "upload the shards again")
