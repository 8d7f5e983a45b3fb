"""Converts between Hugging Face's config.json and our architecture (geometry, position scheme and frequencies).

Supported are the families of :mod:`ropepp_lit.hf.families`, folders of the public RoPE++ code (with the model type
`llama`; the shapes of the weights determine the variant), and `ropepp`, which :mod:`ropepp_lit.hf.export` writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ropepp_lit.errors import UsageError
from ropepp_lit.hf.families import FAMILIES, UNSUPPORTED, Family
from ropepp_lit.hf.rotary import FIELDS as ROTARY
from ropepp_lit.hf.rotary import IMPORT, Rotary, read_frequencies, write_frequencies
from ropepp_lit.nn import DecoderConfig, Frequencies, PositionScheme, RNoPE, RoPE, RoPEPP, layout_of

GEOMETRY = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "tie_word_embeddings",
    "rms_norm_eps",
    "initializer_range",
)
"""Fields with the same meaning in config.json and DecoderConfig."""

HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias")

REQUIRED_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = (*REQUIRED_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
"""Fields that must be positive integers."""

IGNORED = frozenset(
    """
    architectures auto_map model_type name_or_path _name_or_path _model_name_or_path transformers_version
    transformers.js_config _commit_hash torch_dtype dtype use_cache pretraining_tp return_dict output_attentions
    output_hidden_states torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward gradient_checkpointing
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _flash_attn_2_enabled use_flash_attn use_flash_attention max_position_embeddings max_window_layers
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class prefix
    ignore_index id2label label2id num_labels problem_type finetuning_task task_specific_params is_decoder
    tie_encoder_decoder is_llama_config
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens cross_attention_hidden_size
    unsloth_version unsloth_fixed
    """.split()
)
"""Fields that do not affect the logits, such as generation settings, or that are read elsewhere."""

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_sliding_window": (False, None),
}
"""Supported values of fields that affect the logits."""

_IGNORABLE = {
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), "it only affects training"),
    "sliding_window": "attention is the same for contexts of up to that many tokens",
}
"""Unsupported fields that can be ignored, and the effect of ignoring them."""


class Architecture(NamedTuple):
    """Architecture of a model."""

    decoder: DecoderConfig
    scheme: PositionScheme
    frequencies: Frequencies
    context_length: int
    """Context length in tokens (`max_position_embeddings`)."""


def read_config(
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    *,
    name: str,
    variant: str | None = None,
    rotary: Rotary = Rotary(),  # noqa: B008
    ignore: tuple[str, ...] = (),
) -> Architecture:
    """Convert a config.json and the shapes of the weights to an architecture.

    Args:
        config: Content of config.json.
        shapes: Shapes of all tensors, by name.
        name: Name of the file, for messages.
        variant: Expected variant (`rope`, `ec` or `eh`), or None.
        rotary: Base and scaling that override those of the file.
        ignore: Fields of the file to ignore.

    Raises:
        UsageError: The family, a field or the RoPE type is not supported, or the shapes are those of another variant.
    """
    family = family_of(config, name)
    _check_fields(config, family, name, ignore)
    try:
        values = {field: config[field] for field in (*GEOMETRY, *HEADS) if config.get(field) is not None}
        for field, value in values.items():
            if not isinstance(value, int | float):
                raise UsageError(f"{name}: {field} {value!r} is not a number")
        values.setdefault("rms_norm_eps", family.rms_norm_eps)
        values.setdefault("tie_word_embeddings", family.tie_word_embeddings)
        heads = values["num_attention_heads"]
        values.setdefault("num_key_value_heads", heads)
        head_dim = values.setdefault("head_dim", family.head_dim or values["hidden_size"] // heads)
    except KeyError as error:
        raise UsageError(f"{name}: {error.args[0]} is missing") from error
    projections = [f"model.layers.0.self_attn.{part}_proj.weight" for part in ("q", "o")]
    for projection in projections:
        if len(shapes.get(projection, ())) != 2:
            raise UsageError(f"{name}: the weights have no matrix {projection}")
    query, output = (shapes[projection] for projection in projections)
    values["attention_output_bias"] = values.get("attention_bias", False)
    values |= family.geometry(config)
    is_ours = config["model_type"] == "ropepp"
    detected = _variant_of(query[0], output[1], heads=heads, head_dim=head_dim, is_ours=is_ours, name=name)
    if is_ours:
        values["attention_output_bias"], values["qk_norm"] = config["attention_output_bias"], config["qk_norm"]
        if detected != "rope":
            detected = config["variant"]
            values["num_attention_heads"] //= 2 if detected == "ec" else 1
            values["num_key_value_heads"] *= 1 if detected == "ec" else 2
    if variant not in (None, detected):
        raise UsageError(f"variant: {variant} was specified, but the shapes of the weights are those of {detected}")
    rope_config = config.get("rope_config") or {}
    if bool(rope_config.get("imag")) != (detected != "rope") and "rope_config" in config:
        raise UsageError(
            f"{name}: rope_config has imag {rope_config.get('imag')}, but the shapes are those of {detected}"
        )
    scheme: PositionScheme = RoPE() if detected == "rope" else RoPEPP(variant="ec" if detected == "ec" else "eh")
    if family.nope_layers is not None and (nope_layers := family.nope_layers(config)):
        scheme = RNoPE(nope_layers=nope_layers)
    frequencies = read_frequencies(config, rotary, name=name, default_theta=family.rope_theta)
    if family.is_unscaled and type(frequencies) is not Frequencies and rotary.scaling is None:
        scaling = write_frequencies(frequencies)["rope_type"]
        raise UsageError(f"{name}: rope_type {scaling!r} is not supported: transformers reads it as longrope here")
    context = int(config.get("max_position_embeddings") or family.max_position_embeddings)
    if "sliding_window" in ignore and _slides(config, family):
        context = int({**family.defaults, **config}["sliding_window"])
    try:
        decoder = DecoderConfig(**values)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    return Architecture(decoder, scheme, frequencies, context)


def family_of(config: dict[str, Any], name: str) -> Family:
    """Return the family of a config.json.

    Raises:
        UsageError: The family is not supported, or a size of the model is missing or not a positive integer.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        reasons = [f"it {reason}" for kind, reason in UNSUPPORTED.items() if kind == model_type]
        reason = reasons[0] if reasons else f"supported are {', '.join(FAMILIES)}"
        raise UsageError(f"{name}: model_type {model_type!r} is not supported; {reason}")
    for field in SIZES:
        value = config.get(field)
        if value is None and field in REQUIRED_SIZES:
            raise UsageError(f"{name}: {field} is missing")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{name}: {field} {value!r} is not a number above 0")
    return FAMILIES[model_type]


def write_config(architecture: Architecture) -> dict[str, Any]:
    """Create the config.json of a model: of a family of transformers for plain RoPE, otherwise of `ropepp`.

    Returns:
        The fields of the architecture, without token ids and dtype.

    Raises:
        UsageError: Neither transformers nor `ropepp` has a family with this position scheme or combination of biases.
    """
    config, scheme = architecture.decoder, architecture.scheme
    if type(scheme) not in (RoPE, RoPEPP, RNoPE):
        raise UsageError(
            f"model.positions: {type(scheme).__name__} cannot be exported; only RoPE, RoPEPP and RNoPE can"
        )
    for name in ("attention_gate", "score_scaling"):
        if getattr(config, name) is not None:
            raise UsageError(f"model.decoder.{name}: {getattr(config, name)} cannot be exported")
    rotary = write_frequencies(architecture.frequencies)
    values = config.to_dict()
    fields: dict[str, Any] = {field: values[field] for field in (*GEOMETRY, *HEADS)}
    fields |= {"hidden_act": "silu", "attention_dropout": 0.0, "max_position_embeddings": architecture.context_length}
    if rotary["rope_type"] == "yarn":  # transformers 4 computes the factor from these two
        fields["max_position_embeddings"] = round(rotary["factor"] * rotary["original_max_position_embeddings"])
    fields["rope_theta"] = rotary[
        "rope_theta"
    ]  # transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters
    scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
    fields["rope_scaling"] = None if rotary["rope_type"] == "default" else scaling
    fields["rope_parameters"] = rotary
    same_bias = config.attention_bias == config.attention_output_bias
    if isinstance(scheme, RNoPE):
        if config.qk_norm or not same_bias or rotary["rope_type"] == "yarn_by_rotations":
            raise UsageError(
                "model.positions: transformers has RNoPE only in SmolLM3, which supports neither qk_norm, nor biases "
                "in only some attention projections, nor YarnByRotations"
            )
        layers = [int(layer not in scheme.nope_layers) for layer in range(config.num_hidden_layers)]
        fields |= {"no_rope_layers": layers, "layer_types": ["full_attention"] * len(layers)}
        return {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], **fields}
    if isinstance(scheme, RoPEPP) or rotary["rope_type"] == "yarn_by_rotations":
        layout = layout_of(config, scheme)
        fields["num_attention_heads"] = layout.num_attention_heads
        fields["num_key_value_heads"] = layout.num_key_value_heads
        extra = {field: values[field] for field in ("attention_output_bias", "qk_norm")}
        variant = scheme.variant if isinstance(scheme, RoPEPP) else "rope"
        return {"model_type": "ropepp", "architectures": ["RopePPForCausalLM"], **fields, **extra, "variant": variant}
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


def _check_fields(config: dict[str, Any], family: Family, name: str, ignore: tuple[str, ...]) -> None:
    """Raise UsageError that lists all unsupported and all unknown fields."""
    used = {*GEOMETRY, *HEADS, *ROTARY, *family.fields}
    for field in ignore:
        if field not in config and field not in _IGNORABLE:
            raise UsageError(f"ignore: {name} has no field {field}")
        if field in used:
            raise UsageError(f"ignore: {field} is used and cannot be ignored")
    problems: list[str] = []
    unknown: dict[str, Any] = {}
    ignorable, has_required = [*ignore], False
    for field, value in {**family.defaults, **config}.items():
        if field in ignore or field in used or field in IGNORED:
            continue
        if field in _ALLOWED:
            is_supported = value in _ALLOWED[field] or (field == "use_sliding_window" and not _slides(config, family))
        elif field == "sliding_window":
            is_supported = not _slides(config, family)
        elif field == "layer_types":
            is_supported = set(value or ()) <= {"full_attention"}
        else:
            if value not in (None, False, 0, "", [], {}):
                unknown[field] = value
            continue
        if not is_supported:
            effect = f" ({_IGNORABLE[field]})" if field in _IGNORABLE else ""
            problems.append(f"{field} {value!r} is not supported{effect}")
            ignorable, has_required = [*ignorable, field], has_required or not effect
    if unknown:
        listed = ", ".join(f"{field} {value!r}" for field, value in unknown.items())
        problems.append(f"unknown fields: {listed}")
    if problems:
        fields = ",".join((*ignorable, *unknown))
        remedy = "" if has_required else f"; if they do not matter to you: {IMPORT} --ignore {fields}"
        raise UsageError(f"{name}: {'; '.join(problems)}{remedy}")


def _slides(config: dict[str, Any], family: Family) -> bool:
    """Return whether a layer has a sliding window that is shorter than the context."""
    values = {**family.defaults, **config}
    window, first = values.get("sliding_window"), values.get("max_window_layers")
    if window is None or window >= (values.get("max_position_embeddings") or family.max_position_embeddings):
        return False
    if "use_sliding_window" not in family.defaults:
        return values.get("use_sliding_window", True) is not False
    return bool(values["use_sliding_window"]) and (first is None or first < config.get("num_hidden_layers", 0))


def _variant_of(query: int, output: int, *, heads: int, head_dim: int, is_ours: bool, name: str) -> str:
    """Determine the variant from the output size of q_proj and the input size of o_proj."""
    # Variants by the number of heads of q_proj and o_proj.
    variants = {(heads, heads): "rope", (heads, 2 * heads): "ec", (heads // 2, heads): "eh"}
    if is_ours:  # `heads` counts real and imaginary heads
        variants = {(heads, heads): "rope", (heads // 2, heads): "ec"}
    detected = variants.get((query // head_dim, output // head_dim))
    if detected is None or query % head_dim or output % head_dim:
        raise UsageError(
            f"{name}: q_proj has {query} output and o_proj has {output} input features, which fits no variant with "
            f"{heads} heads of {head_dim}"
        )
    return detected
