"""Compare tokenizers by the ids they produce, not by the bytes of their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ropepp_lit.json_files import parse_json

_NOT_OF_TEXT = ("version", "truncation", "padding", "post_processor")
"""Keys of tokenizer.json that do not affect the ids of a text; tokens before texts are compared as ids."""


@lru_cache(maxsize=4)  # a run opens its data multiple times
def tokenizer_digest(text: str) -> str:
    """Return the SHA-256 of what :func:`same_tokenizer` compares, independent of white space and key order.

    Raises:
        ValueError: The text is not JSON.
    """
    return hashlib.sha256(json.dumps(_rules(text), sort_keys=True).encode()).hexdigest()


def opening_of(entry: Mapping[str, Any]) -> list[int]:
    """Return the token ids before every text, from a checkpoint's entry or a manifest.

    Version 0.1 stored no `opening`: texts began with `bos_token_id`, if it was set.
    """
    if entry.get("opening") is not None:
        return list(entry["opening"])
    return [] if entry.get("bos_token_id") is None else [entry["bos_token_id"]]


def same_tokenizer(one: str, other: str) -> bool:
    """Return whether two tokenizer.json files produce the same ids for every text.

    Raises:
        ValueError: One of them is not JSON.
    """
    return one == other or _rules(one) == _rules(other)


def _rules(text: str) -> dict[str, Any]:
    """Return the values that determine ids, normalized across versions of the library tokenizers."""
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    rules = {name: value for name, value in values.items() if name not in _NOT_OF_TEXT}
    model = rules.get("model")
    if isinstance(model, dict):
        # Old versions omit settings that are off, and write merges as "a b".
        model = {name: value for name, value in model.items() if value not in (None, False)}
        if isinstance(model.get("merges"), list):
            pairs = (tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"])
            model["merges"] = list(pairs)
        rules["model"] = model
    return rules
