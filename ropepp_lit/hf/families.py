"""Model families of transformers: differences of supported ones from Llama, and reasons for unsupported ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def _no_geometry(config: Config) -> Config:
    return {}


def _unchanged(tensors: Tensors, config: Config) -> Tensors:
    return tensors


class Family(NamedTuple):
    """Differences of a family from Llama. Defaults are those of its configuration class in transformers."""

    fields: tuple[str, ...] = ()
    """Fields of config.json that `geometry` or `rewrite` use."""

    defaults: Config = {}  # noqa: RUF012 (not a mutable default: a NamedTuple's is never changed)
    """Default values of fields that affect the model and may be missing in config.json."""

    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048

    is_unscaled: bool = False
    """Whether transformers interprets every RoPE scaling of the family as longrope, which is not supported."""

    nope_layers: Callable[[Config], list[int]] | None = None
    """Function that returns the layers without RoPE; None for families without such layers."""

    geometry: Callable[[Config], Config] = _no_geometry
    """Function that computes further values of the DecoderConfig from config.json."""

    rewrite: Callable[[Tensors, Config], Tensors] = _unchanged
    """Function that converts the weights to Llama's names and semantics."""


def _split_fused(tensors: Tensors, config: Config) -> Tensors:
    """Split Phi-3's fused projections into views, without a copy."""
    heads = config["num_attention_heads"]
    key_value_heads = config.get("num_key_value_heads") or heads
    split: Tensors = {}
    for name, value in tensors.items():
        if ".qkv_proj." in name:
            head_dim = value.shape[0] // (heads + 2 * key_value_heads)
            sizes = [heads * head_dim, key_value_heads * head_dim, key_value_heads * head_dim]
            if sum(sizes) == value.shape[0]:
                parts = zip("qkv", value.split(sizes), strict=True)
                split |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts}
                continue
        if ".gate_up_proj." in name and value.shape[0] % 2 == 0:
            parts = zip(("gate", "up"), value.chunk(2), strict=True)
            split |= {name.replace("gate_up_proj", f"{part}_proj"): rows for part, rows in parts}
            continue
        split[name] = value
    return split


def _multipliers(config: Config) -> tuple[float, float, float, float]:
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    return tuple(float(config.get(name) or 1.0) for name in names)  # type: ignore[return-value]


def _fold_geometry(config: Config) -> Config:
    residual = _multipliers(config)[1]
    return {"rms_norm_eps": config.get("rms_norm_eps", 1e-6) / residual**2, "tie_word_embeddings": False}


def _fold_multipliers(tensors: Tensors, config: Config) -> Tensors:
    """Fold Granite's multipliers m (embedding), r (residual), a (attention) and s (logits) into the weights.

    The residual stream is divided by r, which RMSNorm cancels if its epsilon is divided by r². The embedding is then
    multiplied by m / r, queries by a · √head_dim and the final norm by 1 / s; all other weights are unchanged. A tied
    output layer is untied, with the stored embedding as its weight.
    """
    embedding, residual, attention, logits = _multipliers(config)
    tensors = dict(tensors)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factors = {"model.embed_tokens.weight": embedding / residual, "model.norm.weight": 1 / logits}
    factors |= {name: attention * math.sqrt(head_dim) for name in tensors if ".self_attn.q_proj." in name}
    if config.get("tie_word_embeddings", False) and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for name, factor in factors.items():
        if name in tensors and factor != 1:
            tensors[name] = _scale(tensors[name], factor)
    return tensors


def _scale(value: Tensor, factor: float) -> Tensor:
    """Multiply in the tensor's dtype if the factor is a power of two (exact), otherwise in float32 or higher."""
    if math.frexp(factor)[0] == 0.5:
        return value * factor
    return value.to(torch.promote_types(value.dtype, torch.float32)) * factor


def _nope_layers(config: Config) -> list[int]:
    """Return SmolLM3's layers without RoPE: those with a 0 in `no_rope_layers`, by default every fourth layer."""
    layers, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval") or 4
    has_rope = config.get("no_rope_layers")
    if has_rope is None:
        has_rope = [(layer + 1) % interval for layer in range(layers)]
    return [layer for layer in range(min(layers, len(has_rope))) if not has_rope[layer]]


_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES = {
    "llama": Family(),
    "mistral": Family(defaults={"sliding_window": 4096}, max_position_embeddings=131_072),
    "qwen2": Family(
        defaults=_WINDOWS,
        max_position_embeddings=32_768,
        geometry=lambda config: {"attention_bias": True, "attention_output_bias": False},
    ),
    "qwen3": Family(
        defaults=_WINDOWS, head_dim=128, max_position_embeddings=32_768, geometry=lambda config: {"qk_norm": True}
    ),
    "phi3": Family(is_unscaled=True, rms_norm_eps=1e-5, max_position_embeddings=4096, rewrite=_split_fused),
    "granite": Family(
        fields=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        geometry=_fold_geometry,
        rewrite=_fold_multipliers,
    ),
    "smollm3": Family(
        fields=("no_rope_layers", "no_rope_layer_interval"),
        defaults={"use_sliding_window": False},
        rope_theta=2e6,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        nope_layers=_nope_layers,
    ),
    "ropepp": Family(fields=("attention_output_bias", "qk_norm", "variant")),
}
"""Supported families by `model_type`."""

_MOE = "has mixture-of-experts layers"
_OTHER_BLOCKS = "has LayerNorm and blocks that differ from Llama's"
_GEMMA = "has GeGLU instead of SwiGLU"

UNSUPPORTED = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4"), _GEMMA),
    **dict.fromkeys(("olmo2", "olmo3"), "normalizes the outputs of layers, and queries and keys over all heads"),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "olmoe", "gpt_oss", "llama4", "llama4_text", "phimoe"),
        _MOE,
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "has latent attention and mixture-of-experts layers"),
    **dict.fromkeys(
        ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "phi", "olmo", "cohere", "cohere2",
         "stablelm", "starcoder2", "nemotron", "persimmon"),
        _OTHER_BLOCKS,
    ),
    **dict.fromkeys(("mamba", "mamba2", "jamba", "qwen3_next", "lfm2", "granitemoehybrid", "recurrent_gemma"),
                    "has layers other than attention"),
    **dict.fromkeys(("glm", "glm4"), "rotates a part of each head, in adjacent pairs"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "mllama", "llava", "idefics3"),
                    "is multimodal; save only its language model"),
}  # fmt: skip
"""Reasons for unsupported families, by `model_type`."""
