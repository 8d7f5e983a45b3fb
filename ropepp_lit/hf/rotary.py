"""Rotary settings of a config.json and our frequencies, both ways. Every setting is used, or refused by its name."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Frequencies, Linear, Llama3, Yarn, YarnByRotations

FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_config", "original_max_position_embeddings")
"""Fields of config.json that are read here."""

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
"""By transformers' `rope_type` (`yarn_by_rotations` is ours): the class, and its settings beside `rope_theta`."""

IMPORT = "ropepp-lit import FOLDER model.ckpt"
"""What messages recommend, whatever command prints them: it has every option that reads a folder."""

_NOT_READ = {
    "dynamic": "changes the frequencies with the number of tokens; up to max_position_embeddings tokens it changes "
    f"nothing, so for those: {IMPORT} --scaling default",
    "longrope": "has a factor for each rotary pair; use a checkpoint from before its context was extended",
    "su": "has a factor for each rotary pair; use a checkpoint from before its context was extended",
    "mrope": f"has positions of images; for text alone: {IMPORT} --scaling default",
}
"""Types that the decoder lacks, and what to do."""

_NEUTRAL = {"factor": 1.0, "attention_factor": 1.0, "partial_rotary_factor": 1.0}
"""Values that change nothing, whatever the type."""


_NEEDED = {
    "factor": "how far {} extends the context",
    "original_max_position_embeddings": "what context {} starts from",
}
"""Settings without a default, and what of a scaling they say."""


class Rotary(NamedTuple):
    """What the caller knows better than config.json; None means what the file says."""

    scaling: str | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    rope_theta: float | None = None


def read_frequencies(config: dict[str, Any], rotary: Rotary, *, name: str, default_theta: float) -> Frequencies:
    """Base and scaling, as transformers 4 or 5, the public RoPE++ code or the caller says.

    Args:
        config: Content of config.json.
        rotary: Replaces what the file says.
        name: Of the file, for messages.
        default_theta: Base where the file has none, which is that of the family in transformers.

    Raises:
        UsageError: a setting that the decoder lacks, that nothing uses, or that contradicts another.
    """
    values = _merge(config, name)
    theta = _theta(config, values.pop("rope_theta", ...), rotary, name=name, default=default_theta)
    scaling = values.pop("rope_type", None)
    if stated := _public_code(config, name):
        if scaling not in (None, stated["rope_type"]):
            raise UsageError(f"{name}: rope_config says {stated['rope_type']}, and rope_scaling says {scaling}")
        values, scaling = stated, stated.pop("rope_type")
    if scaling is None:
        scaling = rotary.scaling or _default(values, name)
    elif rotary.scaling not in (None, scaling):
        values, scaling = {}, rotary.scaling
    if scaling not in tuple(SCALINGS):  # a list from a file has no place in a dictionary
        reasons = [f"it {reason}" for key, reason in _NOT_READ.items() if key == scaling]
        reason = reasons[0] if reasons else f"known are {', '.join(SCALINGS)}"
        raise UsageError(f"{name}: rope_type {scaling!r} is not supported; {reason}")
    kind, keys = SCALINGS[scaling]
    for key in ("factor", "original_max_position_embeddings"):
        given = getattr(rotary, key)
        if given is not None and key not in keys:
            raise UsageError(
                f"{key}: the scaling {scaling!r} does not use it; add --scaling with one of "
                + ", ".join(other for other, (_, settings) in SCALINGS.items() if key in settings)
            )
        values |= {} if given is None else {key: given}
    _check_settings(values, keys, scaling, config, name)
    missing = [key for key in _NEEDED if key in keys and values.get(key) is None]
    if missing:
        given = {key: value for key, value in rotary._asdict().items() if value is not None}
        options = {"scaling": scaling, **given, **dict.fromkeys(missing, "N")}
        raise UsageError(
            f"{', '.join(missing)}: {name} does not say "
            + " and ".join(_NEEDED[key].format(scaling) for key in missing)
            + f"; {IMPORT} "
            + " ".join(f"--{key} {value}" for key, value in options.items())
        )
    settings = {key: values[key] for key in keys if values.get(key) is not None}
    return kind(rope_theta=theta, **settings)


def write_frequencies(frequencies: Frequencies) -> dict[str, Any]:
    """`rope_parameters` of transformers 5; its type and settings are `rope_scaling` of transformers 4 too.

    Raises:
        UsageError: frequencies of the user's own.
    """
    for rope_type, (kind, keys) in SCALINGS.items():
        if type(frequencies) is kind:
            settings = {key: getattr(frequencies, key) for key in keys}
            return {"rope_type": rope_type, "rope_theta": frequencies.rope_theta, **settings}
    raise UsageError(f"model.frequencies: transformers has no rotary type for {type(frequencies).__name__}")


def _merge(config: dict[str, Any], name: str) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) and `rope_scaling` (transformers 4) as one; they must not contradict."""
    merged: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        values = config.get(field)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise UsageError(f"{name}: {field} {values!r} is not a JSON object")
        values = _one_for_all_layers(values, field, config.get("layer_types"), name)
        if "type" in values and values["type"] != values.get("rope_type", values["type"]):
            raise UsageError(f"{name}: {field} says type {values['type']!r} and rope_type {values['rope_type']!r}")
        values = {("rope_type" if key == "type" else key): value for key, value in values.items()}
        for key in values.keys() & merged.keys():
            if values[key] != merged[key]:
                raise UsageError(
                    f"{name}: {key} is {merged[key]!r} in rope_parameters and {values[key]!r} in rope_scaling; "
                    "delete the wrong one"
                )
        merged |= values
    return merged


def _one_for_all_layers(values: dict[str, Any], field: str, used: Any, name: str) -> dict[str, Any]:
    """Settings that are keyed by layer type, where all layers have the same."""
    if not any(isinstance(value, dict) for value in values.values()):
        return values
    plain = {key: value for key, value in values.items() if not isinstance(value, dict) and value is not None}
    if plain:
        raise UsageError(f"{name}: {field} mixes settings by layer type with {next(iter(plain))} for all layers")
    by_type = {key: value for key, value in values.items() if value is not None and key in (used or values)}
    different = [key for key, value in by_type.items() if value != next(iter(by_type.values()))]
    if different or not by_type:
        described = "; ".join(f"{key} {value}" for key, value in by_type.items())
        raise UsageError(
            f"{name}: {field} differs by layer type ({described}), and the decoder rotates all layers alike"
        )
    return next(iter(by_type.values()))


def _theta(config: dict[str, Any], nested: Any, rotary: Rotary, *, name: str, default: float) -> float:
    if rotary.rope_theta is not None:
        return float(rotary.rope_theta)
    given = [value for value in (nested, config.get("rope_theta", ...)) if value is not ...]
    numbers = [value for value in given if value is not None]
    remedy = f"{IMPORT} --rope_theta N"
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{name}: rope_theta {value!r} is not a number; {remedy}")
    if len(set(numbers)) > 1:
        raise UsageError(
            f"{name}: rope_theta is {numbers[1]!r}, and {numbers[0]!r} in rope_parameters; say which: {remedy}"
        )
    if given and not numbers:
        raise UsageError(f"{name}: rope_theta is null; say the base: {remedy}")
    return float(numbers[0]) if numbers else default


def _default(values: dict[str, Any], name: str) -> str:
    """The type where none is given."""
    for key, value in values.items():
        if value is not None and value != _NEUTRAL.get(key):
            raise UsageError(
                f"{name}: rope_scaling has {key} {value!r} and no rope_type; say the scaling: "
                f"{IMPORT} --scaling linear (or yarn, llama3)"
            )
    return "default"


def _public_code(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Scaling that the public RoPE++ code's `rope_config` says."""
    stated = config.get("rope_config") or {}
    for key, value in stated.items():
        if value and key not in ("imag", "imag_mode", "yarn", "factor"):
            raise UsageError(f"{name}: rope_config.{key} is not supported")
    if not (stated.get("factor") or stated.get("yarn")):
        return {}
    values = {"rope_type": "linear", "factor": stated.get("factor") or 32}
    if stated.get("yarn"):
        values |= {"rope_type": "yarn_by_rotations", "original_max_position_embeddings": 4096}
    return values


def _check_settings(
    values: dict[str, Any], keys: tuple[str, ...], scaling: str, config: dict[str, Any], name: str
) -> None:
    """Refuse settings that nothing uses; compute what two of them say together."""
    original, outside = "original_max_position_embeddings", config.get("original_max_position_embeddings")
    if outside is not None and original in keys and values.setdefault(original, outside) != outside:
        raise UsageError(
            f"{name}: {original} is {outside!r}, and {values[original]!r} in rope_parameters; delete the wrong one"
        )
    if values.get("mscale") and values.get("mscale_all_dim") and "attention_factor" in keys and values.get("factor"):
        # DeepSeek's: the temperatures of two factors, as transformers computes them.
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
