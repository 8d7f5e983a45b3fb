"""What training costs in arithmetic, and a cache in bytes."""

from __future__ import annotations

from ropepp_lit.nn import DecoderConfig, HeadLayout, PositionScheme


def layout_of(config: DecoderConfig, scheme: PositionScheme) -> HeadLayout:
    """Head counts of a scheme with a geometry."""
    return scheme.head_layout(
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads
    )


def matrix_parameters(config: DecoderConfig, layout: HeadLayout) -> int:
    """Parameters that every token is multiplied with: all matrices but the embedding."""
    width, head = config.hidden_size, config.head_dim
    attention = width * head * (layout.num_query_heads + 2 * layout.num_key_value_heads + layout.num_attention_heads)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size) + width * config.vocab_size


def training_flops(config: DecoderConfig, layout: HeadLayout, *, tokens: float, pairs: float) -> float:
    """Floating-point operations of a forward and a backward pass, recomputation not counted (model FLOPs).

    6 · tokens · parameters of matrices + 12 · layers · attention heads · (head_dim + extra_dims) · pairs: a
    multiplication and an addition are two operations, and the backward pass has twice as many as the forward pass
    (PaLM, arXiv 2204.02311, appendix B, there without causality). EC has twice the attention heads; heads of ALiBi have
    8 dimensions more.

    Args:
        config: Geometry.
        layout: Head counts.
        tokens: Tokens of the batch.
        pairs: Pairs of a query and a key that it sees, in each head: n · (n + 1) / 2 for a document of n tokens.
    """
    dims = layout.num_attention_heads * (config.head_dim + layout.extra_dims)
    return 6 * matrix_parameters(config, layout) * tokens + 12 * config.num_hidden_layers * dims * pairs


def training_flops_per_token(config: DecoderConfig, layout: HeadLayout, context_length: int) -> float:
    """:func:`training_flops` of a token in a row of one document, which sees context_length / 2 tokens on average.

    For packed documents it is an upper bound.
    """
    return training_flops(config, layout, tokens=1, pairs=context_length / 2)


def cache_bytes_per_token(config: DecoderConfig, layout: HeadLayout, *, itemsize: int = 2) -> int:
    """Bytes of keys and values per token, by default in bfloat16."""
    head = config.head_dim + layout.extra_dims
    return 2 * config.num_hidden_layers * layout.num_key_value_heads * head * itemsize
