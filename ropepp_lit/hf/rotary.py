"""Converts between RoPE parameters of config.json and our frequencies; every parameter is used or rejected by name."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Frequencies, Linear, Llama3, Yarn, YarnByRotations

FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_config", "original_max_position_embeddings")
"""Fields of config.json with RoPE parameters."""

SCALINGS = {
    "default": (Frequencies, ()),
    "linear": (Linear, ("factor",)),
    "yarn": (
        Yarn,
        ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    ),
    "yarn_by_rotations": (
        YarnByRotations,
        ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
    ),
    "llama3": (Llama3, ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")),
}
"""Class of frequencies, and its parameters besides `rope_theta`, by `rope_type` (`yarn_by_rotations` is ours)."""

IMPORT = "ropepp-lit import FOLDER model.ckpt"
"""Command for messages; it has all options for reading a folder."""

_UNSUPPORTED = {
    "dynamic": "changes the frequencies with the number of tokens, but has no effect up to max_position_embeddings "
    f"tokens; for such contexts: {IMPORT} --scaling default",
    "longrope": "has a factor for each rotary pair; use a checkpoint from before its context was extended",
    "su": "has a factor for each rotary pair; use a checkpoint from before its context was extended",
    "mrope": f"has positions of images; for text only: {IMPORT} --scaling default",
}
"""Reasons and remedies for unsupported values of `rope_type`."""

_NEUTRAL = {"factor": 1.0, "attention_factor": 1.0, "partial_rotary_factor": 1.0}
"""Values without an effect, for any type."""


_REQUIRED = {
    "factor": "the factor by which {} extends the context",
    "original_max_position_embeddings": "the original context length of {}",
}
"""Parameters without a default, and their descriptions."""


class Rotary(NamedTuple):
    """RoPE parameters that override those of config.json; None keeps the value of the file."""

    scaling: str | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    rope_theta: float | None = None


def read_frequencies(config: dict[str, Any], rotary: Rotary, *, name: str, default_theta: float) -> Frequencies:
    """Read base and scaling from a config.json of transformers 4 or 5 or of the public RoPE++ code.

    Args:
        config: Content of config.json.
        rotary: Values that override those of the file.
        name: Name of the file, for messages.
        default_theta: Default base, that of the family in transformers.

    Raises:
        UsageError: A parameter is not supported, not used by the scaling, or contradicts another.
    """
    values = _merge(config, name)
    theta = _theta(config, values.pop("rope_theta", ...), rotary, name=name, default=default_theta)
    scaling = values.pop("rope_type", None)
    if public := _read_public_code(config, name):
        if scaling not in (None, public["rope_type"]):
            raise UsageError(f"{name}: rope_config has {public['rope_type']}, but rope_scaling has {scaling}")
        values, scaling = public, public.pop("rope_type")
    if scaling is None:
        scaling = rotary.scaling or _default(values, name)
    elif rotary.scaling not in (None, scaling):
        values, scaling = {}, rotary.scaling
    if scaling not in tuple(SCALINGS):  # a tuple, because values of a file may be unhashable
        reasons = [f"it {reason}" for key, reason in _UNSUPPORTED.items() if key == scaling]
        reason = reasons[0] if reasons else f"supported are {', '.join(SCALINGS)}"
        raise UsageError(f"{name}: rope_type {scaling!r} is not supported; {reason}")
    kind, keys = SCALINGS[scaling]
    for key in ("factor", "original_max_position_embeddings"):
        specified = getattr(rotary, key)
        if specified is not None and key not in keys:
            raise UsageError(
                f"{key}: the scaling {scaling!r} does not use it; add --scaling with one of "
                + ", ".join(other for other, (_, settings) in SCALINGS.items() if key in settings)
            )
        values |= {} if specified is None else {key: specified}
    _check_settings(values, keys, scaling, config, name)
    missing = [key for key in _REQUIRED if key in keys and values.get(key) is None]
    if missing:
        specified = {key: value for key, value in rotary._asdict().items() if value is not None}
        options = {"scaling": scaling, **specified, **dict.fromkeys(missing, "N")}
        raise UsageError(
            f"{', '.join(missing)}: {name} does not specify "
            + " and ".join(_REQUIRED[key].format(scaling) for key in missing)
            + f"; {IMPORT} "
            + " ".join(f"--{key} {value}" for key, value in options.items())
        )
    settings = {key: values[key] for key in keys if values.get(key) is not None}
    return kind(rope_theta=theta, **settings)


def write_frequencies(frequencies: Frequencies) -> dict[str, Any]:
    """Return the `rope_parameters` of transformers 5; without `rope_theta` also the `rope_scaling` of transformers 4.

    Raises:
        UsageError: The frequencies are a user's class.
    """
    for rope_type, (kind, keys) in SCALINGS.items():
        if type(frequencies) is kind:
            settings = {key: getattr(frequencies, key) for key in keys}
            return {"rope_type": rope_type, "rope_theta": frequencies.rope_theta, **settings}
    raise UsageError(f"model.frequencies: transformers has no rotary type for {type(frequencies).__name__}")


def _merge(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Merge `rope_parameters` (transformers 5) and `rope_scaling` (transformers 4); they must not contradict."""
    merged: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        values = config.get(field)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise UsageError(f"{name}: {field} {values!r} is not a JSON object")
        values = _unify_layer_types(values, field, config.get("layer_types"), name)
        if "type" in values and values["type"] != values.get("rope_type", values["type"]):
            raise UsageError(f"{name}: {field} has type {values['type']!r} and rope_type {values['rope_type']!r}")
        values = {("rope_type" if key == "type" else key): value for key, value in values.items()}
        for key in values.keys() & merged.keys():
            if values[key] != merged[key]:
                raise UsageError(
                    f"{name}: {key} is {merged[key]!r} in rope_parameters and {values[key]!r} in rope_scaling; "
                    "delete the wrong one"
                )
        merged |= values
    return merged


def _unify_layer_types(values: dict[str, Any], field: str, used: Any, name: str) -> dict[str, Any]:
    """Return the common parameters of all layer types, if `values` has parameters by layer type."""
    if not any(isinstance(value, dict) for value in values.values()):
        return values
    plain = {key: value for key, value in values.items() if not isinstance(value, dict) and value is not None}
    if plain:
        raise UsageError(f"{name}: {field} mixes settings by layer type with {next(iter(plain))} for all layers")
    by_type = {key: value for key, value in values.items() if value is not None and key in (used or values)}
    different = [key for key, value in by_type.items() if value != next(iter(by_type.values()))]
    if different or not by_type:
        described = "; ".join(f"{key} {value}" for key, value in by_type.items())
        raise UsageError(f"{name}: {field} differs by layer type ({described}), which the decoder does not support")
    return next(iter(by_type.values()))


def _theta(config: dict[str, Any], nested: Any, rotary: Rotary, *, name: str, default: float) -> float:
    if rotary.rope_theta is not None:
        return float(rotary.rope_theta)
    specified = [value for value in (nested, config.get("rope_theta", ...)) if value is not ...]
    numbers = [value for value in specified if value is not None]
    remedy = f"{IMPORT} --rope_theta N"
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{name}: rope_theta {value!r} is not a number; {remedy}")
    if len(set(numbers)) > 1:
        raise UsageError(
            f"{name}: rope_theta is {numbers[1]!r}, but {numbers[0]!r} in rope_parameters; specify one: {remedy}"
        )
    if specified and not numbers:
        raise UsageError(f"{name}: rope_theta is null; specify the base: {remedy}")
    return float(numbers[0]) if numbers else default


def _default(values: dict[str, Any], name: str) -> str:
    """Return the default scaling, if no parameter requires another one."""
    for key, value in values.items():
        if value is not None and value != _NEUTRAL.get(key):
            raise UsageError(
                f"{name}: rope_scaling has {key} {value!r} but no rope_type; specify the scaling: "
                f"{IMPORT} --scaling linear (or yarn, llama3)"
            )
    return "default"


def _read_public_code(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the scaling in the `rope_config` of the public RoPE++ code."""
    rope_config = config.get("rope_config") or {}
    for key, value in rope_config.items():
        if value and key not in ("imag", "imag_mode", "yarn", "factor"):
            raise UsageError(f"{name}: rope_config.{key} is not supported")
    if not (rope_config.get("factor") or rope_config.get("yarn")):
        return {}
    values = {"rope_type": "linear", "factor": rope_config.get("factor") or 32}
    if rope_config.get("yarn"):
        values |= {"rope_type": "yarn_by_rotations", "original_max_position_embeddings": 4096}
    return values


def _check_settings(
    values: dict[str, Any], keys: tuple[str, ...], scaling: str, config: dict[str, Any], name: str
) -> None:
    """Reject unused parameters, and compute `attention_factor` from DeepSeek's `mscale` parameters."""
    original, top_level = "original_max_position_embeddings", config.get("original_max_position_embeddings")
    if top_level is not None and original in keys and values.setdefault(original, top_level) != top_level:
        raise UsageError(
            f"{name}: {original} is {top_level!r}, but {values[original]!r} in rope_parameters; delete the wrong one"
        )
    if values.get("mscale") and values.get("mscale_all_dim") and "attention_factor" in keys and values.get("factor"):
        # The ratio of two temperatures, as computed by transformers.
        logarithm = 0.1 * math.log(values["factor"])
        both = values.pop("mscale"), values.pop("mscale_all_dim")
        if values.get("attention_factor") is None:
            values["attention_factor"] = (both[0] * logarithm + 1) / (both[1] * logarithm + 1)
    for key, value in values.items():
        if value is None or value == _NEUTRAL.get(key):
            continue
        if key not in keys:
            same = key == original and value == config.get("max_position_embeddings")
            if not same:
                raise UsageError(f"{name}: {key} {value!r} is not supported with rope_type {scaling}")
        elif not isinstance(value, int | float):
            raise UsageError(f"{name}: {key} {value!r} is not a number")
