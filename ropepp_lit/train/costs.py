"""Estimates of training FLOPs and of the size of the KV cache."""

from __future__ import annotations

from ropepp_lit.nn import DecoderConfig, HeadLayout
from ropepp_lit.nn.lora import LoRA


def matrix_parameters(config: DecoderConfig, layout: HeadLayout) -> int:
    """Return the number of parameters in matrix products with every token: all matrices except the embedding."""
    width, head = config.hidden_size, config.head_dim
    attention = width * head * (layout.num_query_heads + 2 * layout.num_key_value_heads + layout.num_attention_heads)
    if config.attention_gate is not None:
        attention += width * layout.num_attention_heads * (head if config.attention_gate == "element" else 1)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size) + width * config.vocab_size


def training_flops(
    config: DecoderConfig, layout: HeadLayout, *, tokens: float, pairs: float, lora: LoRA | None = None
) -> float:
    """Return the floating-point operations of a forward and a backward pass without recomputation (model FLOPs).

    6 · tokens · matrix parameters + 12 · layers · attention heads · (head_dim + extra_dims) · pairs: a multiplication
    and an addition are two operations, and the backward pass has twice as many as the forward pass (PaLM, arXiv
    2204.02311, appendix B, which does not account for causality). EC has twice the attention heads; ALiBi adds 8
    dimensions to each head. With LoRA the base matrices need no weight gradients, so their factor is 4 instead of 6.

    Args:
        config: Geometry.
        layout: Head counts.
        tokens: Number of tokens in the batch.
        pairs: Number of pairs of a query and a key visible to it, per head: n · (n + 1) / 2 for a document of n tokens.
        lora: LoRA settings; None means that all weights train.
    """
    dims = layout.num_attention_heads * (config.head_dim + layout.extra_dims)
    matrices = 6 * matrix_parameters(config, layout)
    if lora is not None:
        trains_output = {"lm_head", "embed_tokens"} if config.tie_word_embeddings else {"lm_head"}
        matrices = 4 * matrix_parameters(config, layout)
        matrices += 6 * config.num_hidden_layers * adapter_parameters(config, layout, lora)
        if trains_output & set(lora.train_fully):
            matrices += 2 * config.hidden_size * config.vocab_size
    return matrices * tokens + 12 * config.num_hidden_layers * dims * pairs


def training_flops_per_token(
    config: DecoderConfig, layout: HeadLayout, context_length: int, *, lora: LoRA | None = None
) -> float:
    """Return :func:`training_flops` per token of a row with one document: context_length / 2 visible keys on average.

    For packed documents this is an upper bound.
    """
    return training_flops(config, layout, tokens=1, pairs=context_length / 2, lora=lora)


def cache_bytes_per_token(config: DecoderConfig, layout: HeadLayout, *, itemsize: int = 2) -> int:
    """Return the bytes of keys and values per token, by default in bfloat16."""
    head = config.head_dim + layout.extra_dims
    return 2 * config.num_hidden_layers * layout.num_key_value_heads * head * itemsize


def adapter_layers(config: DecoderConfig, layout: HeadLayout, lora: LoRA) -> list[tuple[int, int]]:
    """Return the input and output sizes of a block's layers with adapters."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    sizes = {
        "q_proj": (width, layout.num_query_heads * head),
        "k_proj": (width, layout.num_key_value_heads * head),
        "v_proj": (width, layout.num_key_value_heads * head),
        "o_proj": (layout.num_attention_heads * head, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }
    return [sizes[name] for name in lora.layers]


def adapter_parameters(config: DecoderConfig, layout: HeadLayout, lora: LoRA) -> int:
    """Return the number of parameters that LoRA adds to a block."""
    sizes = adapter_layers(config, layout, lora)
    added = lora.rank * sum(inputs + outputs for inputs, outputs in sizes)
    added += lora.dora * sum(outputs for _, outputs in sizes)
    if "imaginary" in lora.train_fully:
        added += config.hidden_size * config.head_dim * layout.num_attention_heads // 2
    return added
