"""Validation of the values in a checkpoint, which may be damaged or untrusted."""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from torch import Tensor

from ropepp_lit.json_files import fits, parse_json
from ropepp_lit.nn import DecoderConfig

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes of weights and biases; custom position schemes may store other dtypes too."""

_TYPES: dict[str, Any] = {
    "architecture": dict[str, Any],
    "context_length": int | None,
    "optimizer": str | None,
    "recipe": dict[str, Any] | None,
    "origin": str | None,
    "tokens_seen": int,
    "skipped_steps": int,
    "train_loss": dict[str, Any] | None,
    "validation": dict[str, dict[str, float]] | None,
    "tokenizer": str | None,
    "bos_token_id": int | None,
    "eos_token_id": int | None,
    "opening": list[int] | None,
    "held_out": dict[str, str] | None,
    "tokenizer_config": str | None,
    "generation_config": str | None,
    "adapter": dict[str, Any] | None,
    "reference": dict[str, Any] | None,
    "card": dict[str, Any] | None,
}
"""Types of the values of the entry `ropepp_lit`."""

_REQUIRED = (
    "architecture", "context_length", "recipe", "tokens_seen", "tokenizer", "bos_token_id", "eos_token_id"
)  # fmt: skip
_PARTS = ("positions", "frequencies")
_GEOMETRY = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings"
)  # fmt: skip
"""Settings of the decoder that every checkpoint has."""

_TOKEN_ID_LIMIT = 2**31
"""Exclusive upper limit of token ids."""


def check_entry(ours: dict[str, Any]) -> None:
    """Raise ValueError if a value of the entry `ropepp_lit` is missing, or is not of its type or range."""
    for name in _REQUIRED:
        if name not in ours:
            raise ValueError(f"it has no {name}")
    for name, kind in _TYPES.items():
        if not fits(ours.get(name), kind if name in _REQUIRED else kind | None):
            raise ValueError(f"its {name} is {_shown(ours[name])}")
    for name in ("recipe", "card", "adapter"):
        if not _is_plain(ours.get(name)):
            raise ValueError(f"its {name} is not of plain values")
    _check_architecture(ours["architecture"])
    for name, least, value in (
        ("context_length", 1, ours["context_length"]),
        ("tokens_seen", 0, ours["tokens_seen"]),
        *(("bos_token_id", 0, token) for token in [ours["bos_token_id"]]),
        *(("eos_token_id", 0, token) for token in [ours["eos_token_id"]]),
        *(("opening", 0, token) for token in ours.get("opening") or []),
    ):
        if value is not None and not least <= value < (2**63 if least or name == "tokens_seen" else _TOKEN_ID_LIMIT):
            raise ValueError(f"its {name} is {_shown(value)}")
    for name, figures in (ours.get("validation") or {}).items():
        if "step" not in figures:
            raise ValueError(f"its validation of {name[:50]!r} has no step")
    if ours["recipe"] is not None and not isinstance(ours["recipe"].get("data"), dict):
        raise ValueError("its recipe has no data")
    for name in ("tokenizer_config", "generation_config"):
        if ours.get(name) is not None and not isinstance(parse_json(ours[name]), dict):
            raise ValueError(f"its {name} is not a JSON object")


def check_weights(weights: Any, *, are_shapes: bool) -> None:
    """Raise ValueError if a weight is not a plain tensor of a supported dtype, or is larger than its storage.

    Args:
        weights: Tensors by name.
        are_shapes: Whether the tensors are on the meta device.
    """
    if not isinstance(weights, dict):
        raise ValueError("it has no weights")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"{_shown(name)} is no weight")
        if value.is_meta != are_shapes or (name.endswith((".weight", ".bias")) and value.dtype not in DTYPES):
            raise ValueError(f"{_shown(name)} is no weight")
        if not are_shapes and value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise ValueError(f"{name[:100]!r} is larger than what is stored of it")


def _check_architecture(architecture: dict[str, Any]) -> None:
    decoder = architecture.get("decoder")
    described = [architecture.get(part) for part in _PARTS]
    if not isinstance(decoder, dict) or not all(
        isinstance(part, dict)
        and isinstance(part.get("class_path"), str)
        and fits(part.get("init_args"), dict[str, Any])
        for part in described
    ):
        raise ValueError("its architecture does not describe a model")
    if missing := [name for name in _GEOMETRY if name not in decoder]:
        raise ValueError(f"its architecture has no {missing[0]}")
    for name, kind in get_type_hints(DecoderConfig).items():
        if name in decoder and not fits(decoder[name], kind):
            raise ValueError(f"its {name} is {_shown(decoder[name])}")


def _is_plain(value: Any) -> bool:
    """Return whether a value consists of JSON types only."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _shown(value: Any) -> str:
    return f"{value:,}"[:80] if type(value) is int else repr(str(value)[:80])
