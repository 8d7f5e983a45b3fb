"""Check the types and ranges of a manifest's values, because the file can be damaged or untrusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ropepp_lit.data.manifest import Manifest, TokenSet

CHUNK_BYTES_BOUND = 2**32
"""Exclusive upper bound of the size of a chunk in litdata's format."""


def check_values(manifest: Manifest) -> None:
    """Raise ValueError if a value has the wrong type or is out of range."""
    if np.dtype(manifest.dtype).kind not in "iu":
        raise ValueError(f"dtype {manifest.dtype!r} is not an integer dtype")
    for name in ("marks_trained_tokens", "holds_pairs"):
        if not isinstance(getattr(manifest, name), bool):
            raise ValueError(f"{name} is {getattr(manifest, name)!r}")
    if manifest.holds_pairs and not manifest.marks_trained_tokens:
        raise ValueError("holds_pairs is set without marks_trained_tokens")
    check_number("vocab_size", manifest.vocab_size, least=1, below=2**31)
    for name, ids in (
        ("eos_token_id", [manifest.eos_token_id]),
        ("bos_token_id", [] if manifest.bos_token_id is None else [manifest.bos_token_id]),
        ("opening", manifest.opening),
        ("end_of_turn", manifest.end_of_turn),
    ):
        for token in _list(name, ids):
            check_number(name, token, below=manifest.vocab_size)
    for name, texts in (("sources", manifest.sources), ("examples", manifest.examples)):
        if not all(isinstance(text, str) for text in _list(name, texts)):
            raise ValueError(f"{name} are not strings")
    for name, counts in (("skipped", manifest.skipped), ("notices", manifest.notices)):
        if not isinstance(counts, dict):
            raise ValueError(f"{name} is not an object")
        for reason, count in counts.items():
            check_number(f"{name} {reason!r}", count)
    for name, tokens in manifest.splits.items():
        _check_split(name, tokens, np.dtype(manifest.dtype).itemsize)


def _check_split(split: str, tokens: TokenSet, itemsize: int) -> None:
    for name in ("documents", "tokens", "bytes", "gzip_bytes", "max_token_id", "trained_tokens", "longest"):
        check_number(f"{split} {name}", getattr(tokens, name))
    for pair in _list(f"{split} lengths", tokens.lengths):
        for count in _list(f"{split} lengths", pair):
            check_number(f"{split} lengths", count)
    for chunk in tokens.chunks:
        where = f"{split}/{chunk.filename}"
        check_number(f"{where} documents", chunk.documents, least=1)
        check_number(f"{where} tokens", chunk.tokens, least=chunk.documents, below=CHUNK_BYTES_BOUND // itemsize)
        if not isinstance(chunk.sha256, str):
            raise ValueError(f"{where} sha256 is {chunk.sha256!r}")
    for name in ("documents", "tokens"):
        if getattr(tokens, name) != sum(getattr(chunk, name) for chunk in tokens.chunks):
            raise ValueError(f"the {name} of {split} are not the sum over its chunks")


def check_number(name: str, value: Any, *, least: int = 0, below: int = 2**63) -> None:
    """Raise ValueError if a value is not an integer within bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < below:
        raise ValueError(f"{name} is {value!r}")


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value
