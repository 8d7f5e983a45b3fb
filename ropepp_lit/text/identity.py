"""When two tokenizers are the same: by what they do to text, not by how their files are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ropepp_lit.json_files import parse_json

_NOT_OF_TEXT = ("version", "truncation", "padding", "post_processor")
"""Parts of a tokenizer.json that do not decide which ids a text becomes; what opens texts is compared as ids."""


@lru_cache(maxsize=4)  # a run opens its data several times
def tokenizer_digest(text: str) -> str:
    """SHA-256 of what :func:`same_tokenizer` compares, whatever the white space and the order of keys.

    Raises:
        ValueError: it is not JSON.
    """
    return hashlib.sha256(json.dumps(_rules(text), sort_keys=True).encode()).hexdigest()


def opening_of(entry: Mapping[str, Any]) -> list[int]:
    """Token ids before every text, of a checkpoint's entry or a manifest.

    Those of version 0.1 have no `opening`: there texts began with `bos_token_id`, where there was one.
    """
    if entry.get("opening") is not None:
        return list(entry["opening"])
    return [] if entry.get("bos_token_id") is None else [entry["bos_token_id"]]


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two tokenizer.json files give the same ids for every text.

    Raises:
        ValueError: one of them is not JSON.
    """
    return one == other or _rules(one) == _rules(other)


def _rules(text: str) -> dict[str, Any]:
    """What decides ids, in one form for all versions of the library tokenizers."""
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    rules = {name: value for name, value in values.items() if name not in _NOT_OF_TEXT}
    model = rules.get("model")
    if isinstance(model, dict):
        # Old versions leave out settings that are off, and write merges as "a b".
        model = {name: value for name, value in model.items() if value not in (None, False)}
        if isinstance(model.get("merges"), list):
            pairs = (tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"])
            model["merges"] = list(pairs)
        rules["model"] = model
    return rules
