"""config.json of Hugging Face and our geometry, position scheme and frequencies, both ways.

Families that are read: `llama`, `mistral`, `qwen2`, `qwen3`, the public RoPE++ code's folders (which call themselves
`llama`; the shapes of the weights tell the variant) and `ropepp`, which is what :mod:`ropepp_lit.hf.export` writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import (
    DecoderConfig,
    Frequencies,
    Linear,
    Llama3,
    PositionScheme,
    RoPE,
    RoPEPP,
    Yarn,
    YarnByRotations,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "ropepp")

GEOMETRY = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "tie_word_embeddings",
    "rms_norm_eps",
    "initializer_range",
)
"""Fields that mean the same in config.json and in a DecoderConfig."""

HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias")

ROTARY = ("rope_theta", "rope_scaling", "rope_parameters", "rope_config")

OURS = ("attention_output_bias", "qk_norm", "variant")
"""Fields of `ropepp` that Llama lacks."""

INDIFFERENT = frozenset(
    (
        *(
            "architectures",
            "auto_map",
            "model_type",
            "name_or_path",
            "_name_or_path",
            "_model_name_or_path",
            "transformers_version",
        ),
        *("torch_dtype", "dtype", "use_cache", "pretraining_tp", "return_dict", "output_attentions"),
        *(
            "output_hidden_states",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "unk_token_id",
            "ignore_index",
        ),
        *("max_position_embeddings", "max_window_layers", "id2label", "label2id", "problem_type", "is_llama_config"),
        *("rope_interleaved", "task_specific_params", "chunk_size_feed_forward", "transformers.js_config"),
    )
)
"""Fields that change no logit, or that are looked at elsewhere."""

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


class Architecture(NamedTuple):
    """What a model is."""

    decoder: DecoderConfig
    scheme: PositionScheme
    frequencies: Frequencies
    context_length: int
    """Tokens that the model is meant to read: `max_position_embeddings`."""


class Rotary(NamedTuple):
    """What the caller knows better than config.json; None means what the file says."""

    scaling: str | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    rope_theta: float | None = None


def read_config(
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    *,
    name: str,
    variant: str | None = None,
    rotary: Rotary = Rotary(),  # noqa: B008
    ignore: tuple[str, ...] = (),
) -> Architecture:
    """What a config.json and the shapes of the weights describe.

    Args:
        config: The file's content.
        shapes: Of every tensor, by name.
        name: Of the file, for messages.
        variant: `rope`, `ec` or `eh`, where the caller says so.
        rotary: Base and scaling that replace what the file says.
        ignore: Fields of the file that the caller allows to be left out.

    Raises:
        UsageError: a family, field or rotary type that the decoder does not have; shapes of another variant.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UsageError(f"{name}: model_type {family!r} is not supported; known are {', '.join(FAMILIES)}")
    _refuse_unknown(config, name, ignore)
    try:
        values = {field: config[field] for field in GEOMETRY if field in config}
        values |= {field: config[field] for field in HEADS if config.get(field) is not None}
        values.setdefault("rms_norm_eps", 1e-6)  # transformers' default in all of these families
        heads = values["num_attention_heads"]
        values.setdefault("num_key_value_heads", heads)
        head_dim = values.setdefault("head_dim", values["hidden_size"] // heads)
        query, output = (shapes[f"model.layers.0.self_attn.{part}_proj.weight"] for part in ("q", "o"))
    except KeyError as error:
        raise UsageError(f"{name}: {error.args[0]} is missing") from error
    values["attention_output_bias"] = values.get("attention_bias", False)
    if family == "qwen2":
        values |= {"attention_bias": True, "attention_output_bias": False}
    values["qk_norm"] = family == "qwen3"
    found = _variant_of(query[0], output[1], heads=heads, head_dim=head_dim, is_ours=family == "ropepp", name=name)
    if family == "ropepp":
        values["attention_output_bias"], values["qk_norm"] = config["attention_output_bias"], config["qk_norm"]
        if found != "rope":
            found = config["variant"]
            values["num_attention_heads"] //= 2 if found == "ec" else 1
            values["num_key_value_heads"] *= 1 if found == "ec" else 2
    if variant not in (None, found):
        raise UsageError(f"variant: {variant} was named, and the shapes of the weights are those of {found}")
    stated = config.get("rope_config") or {}
    if bool(stated.get("imag")) != (found != "rope") and "rope_config" in config:
        raise UsageError(f"{name}: rope_config says imag {stated.get('imag')}, and the shapes are those of {found}")
    scheme = RoPE() if found == "rope" else RoPEPP(variant="ec" if found == "ec" else "eh")
    frequencies = _read_frequencies(config, rotary, name)
    return Architecture(DecoderConfig(**values), scheme, frequencies, int(config.get("max_position_embeddings", 2048)))


def write_config(architecture: Architecture) -> dict[str, Any]:
    """The config.json of a model: a stock family for plain RoPE, else `ropepp`.

    Returns:
        The fields that describe the model; token ids and dtype are the caller's.

    Raises:
        UsageError: a position scheme, or a combination of biases, that transformers has no family for.
    """
    config, scheme = architecture.decoder, architecture.scheme
    if type(scheme) not in (RoPE, RoPEPP):
        raise UsageError(
            f"model.positions: {type(scheme).__name__} has no place in an export; only RoPE and RoPEPP have"
        )
    rotary = _write_frequencies(architecture.frequencies)
    values = config.to_dict()
    fields: dict[str, Any] = {field: values[field] for field in (*GEOMETRY, *HEADS)}
    fields |= {"hidden_act": "silu", "attention_dropout": 0.0, "max_position_embeddings": architecture.context_length}
    if rotary["rope_type"] == "yarn":  # transformers 4 takes the factor from these two
        fields["max_position_embeddings"] = round(rotary["factor"] * rotary["original_max_position_embeddings"])
    fields["rope_theta"] = rotary["rope_theta"]  # transformers 4 reads these two, transformers 5 the third
    scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
    fields["rope_scaling"] = None if rotary["rope_type"] == "default" else scaling
    fields["rope_parameters"] = rotary
    if isinstance(scheme, RoPEPP) or rotary["rope_type"] == "yarn_by_rotations":
        layout = scheme.head_layout(
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads
        )
        fields["num_attention_heads"] = layout.num_attention_heads
        fields["num_key_value_heads"] = layout.num_key_value_heads
        extra = {field: values[field] for field in ("attention_output_bias", "qk_norm")}
        variant = scheme.variant if isinstance(scheme, RoPEPP) else "rope"
        return {"model_type": "ropepp", "architectures": ["RopePPForCausalLM"], **fields, **extra, "variant": variant}
    same_bias = config.attention_bias == config.attention_output_bias
    if config.qk_norm and same_bias and not config.mlp_bias:
        del fields["mlp_bias"]
        return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **fields, "use_sliding_window": False}
    if not config.qk_norm and same_bias:
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **fields}
    if not config.qk_norm and config.attention_bias and not config.mlp_bias:
        del fields["mlp_bias"], fields["attention_bias"]
        return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **fields, "use_sliding_window": False}
    raise UsageError(
        f"model.decoder: transformers has no family with attention_bias {config.attention_bias}, attention_output_bias "
        f"{config.attention_output_bias}, mlp_bias {config.mlp_bias} and qk_norm {config.qk_norm} together"
    )


def _refuse_unknown(config: dict[str, Any], name: str, ignore: tuple[str, ...]) -> None:
    """Refuse what would change the model and cannot be represented, and what is not known."""
    allowed = {
        "hidden_act": ("silu",),
        "attention_dropout": (0, 0.0, None),
        "use_sliding_window": (False, None),
        "partial_rotary_factor": (1, 1.0, None),
        "quantization_config": (None,),
    }
    known = {*GEOMETRY, *HEADS, *ROTARY, *INDIFFERENT, *(OURS if config["model_type"] == "ropepp" else ())}
    for field, value in config.items():
        if field in ignore or field in known:
            continue
        if field in allowed:
            if value not in allowed[field]:
                raise UsageError(f"{name}: {field} {value!r} is not supported")
        elif field == "sliding_window":
            if value is not None and config.get("use_sliding_window") is not False:
                raise UsageError(f"{name}: sliding_window {value!r} is not supported; only full attention is")
        elif field == "layer_types":
            if set(value or ()) - {"full_attention"}:
                raise UsageError(f"{name}: layer_types other than full_attention are not supported")
        elif value not in (None, False, 0, "", [], {}):
            raise UsageError(
                f"{name}: {field} {value!r} is not known; if it changes nothing in the model, add --ignore {field}"
            )


def _variant_of(query: int, output: int, *, heads: int, head_dim: int, is_ours: bool, name: str) -> str:
    """The variant, by what leaves the query projection and what enters the output projection."""
    plain = heads // 2 if is_ours else heads  # ours count real and imaginary heads
    shares = {(heads, heads): "rope", (plain, 2 * plain): "ec", (heads // 2, heads): "eh"}
    if is_ours:
        shares = {(heads, heads): "rope", (heads // 2, heads): "ec"}
    found = shares.get((query // head_dim, output // head_dim))
    if found is None or query % head_dim or output % head_dim:
        raise UsageError(
            f"{name}: q_proj makes {query} and o_proj reads {output} dimensions, which fits no variant of "
            f"{heads} heads of {head_dim}"
        )
    return found


def _read_frequencies(config: dict[str, Any], rotary: Rotary, name: str) -> Frequencies:
    """Base and scaling, as transformers 4 or 5, the public RoPE++ code or the caller says."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", config.get("rope_theta", 10_000.0))
    values = {key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type", "type")}
    scaling = parameters.get("rope_type", parameters.get("type", "default"))
    stated = config.get("rope_config") or {}
    unknown = [key for key, value in stated.items() if value and key not in ("imag", "imag_mode", "yarn", "factor")]
    if unknown:
        raise UsageError(f"{name}: rope_config.{unknown[0]} is not supported")
    if stated.get("factor") or stated.get("yarn"):
        scaling, values = "linear", {"factor": stated.get("factor", 32)}
        if stated.get("yarn"):
            scaling, values = "yarn_by_rotations", {**values, "original_max_position_embeddings": 4096}
    if rotary.scaling is not None:
        scaling, values = rotary.scaling, {}
    for key in ("factor", "original_max_position_embeddings"):
        if getattr(rotary, key) is not None:
            values[key] = getattr(rotary, key)
    if scaling not in SCALINGS:
        raise UsageError(f"{name}: rope_type {scaling!r} is not supported; known are {', '.join(SCALINGS)}")
    kind, keys = SCALINGS[scaling]
    if values.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"{name}: partial_rotary_factor is not supported")
    for key, value in values.items():
        if key not in keys and value is not None and not (scaling == "default" and rotary.scaling is None):
            raise UsageError(f"{name}: {key} {value!r} is not supported with rope_type {scaling}")
    if scaling != "default" and values.get("factor") is None:
        raise UsageError(f"factor: say how far {scaling} stretches the context, by --factor")
    if "original_max_position_embeddings" in keys and values.get("original_max_position_embeddings") is None:
        raise UsageError(
            f"original_max_position_embeddings: {name} does not say what context {scaling} starts from; "
            "give it by --original_max_position_embeddings"
        )
    settings = {key: values[key] for key in keys if values.get(key) is not None}
    return kind(rope_theta=float(rotary.rope_theta or theta), **settings)


def _write_frequencies(frequencies: Frequencies) -> dict[str, Any]:
    """`rope_parameters` of transformers 5; its type and settings are `rope_scaling` of transformers 4 too."""
    for rope_type, (kind, keys) in SCALINGS.items():
        if type(frequencies) is kind:
            settings = {key: getattr(frequencies, key) for key in keys}
            return {"rope_type": rope_type, "rope_theta": frequencies.rope_theta, **settings}
    raise UsageError(f"model.frequencies: transformers has no rotary type for {type(frequencies).__name__}")
