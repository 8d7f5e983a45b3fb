"""What training costs: arithmetic by token, memory by part, and the peaks of devices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ropepp_lit.nn import DecoderConfig, HeadLayout, PositionScheme
from ropepp_lit.nn.loss import rows_per_chunk

PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "GH200": 989,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
}
"""Dense bfloat16 peaks by what a device's name holds, in 10¹² operations per second, from the makers' data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Operations per second of a device at its dense bfloat16 peak; None where it is not in the table."""
    names = [name for name in PEAK_TFLOPS if name.replace(" ", "").lower() in device_name.replace(" ", "").lower()]
    return 1e12 * PEAK_TFLOPS[max(names, key=len)] if names else None


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
    """Operations of forward and backward pass, recomputation not counted (PaLM's convention, arXiv 2204.02311).

    Six for each token and parameter of a matrix, and twelve for each dimension of an attention head, of which EC has
    twice as many (ALiBi adds eight dimensions), and each pair of a query and a key that it sees.

    Args:
        config: Geometry.
        layout: Head counts.
        tokens: Tokens of the batch.
        pairs: Pairs of a query and a key that it sees, in each head.
    """
    dims = layout.num_attention_heads * (config.head_dim + layout.extra_dims)
    return 6 * matrix_parameters(config, layout) * tokens + 12 * config.num_hidden_layers * dims * pairs


def training_flops_per_token(config: DecoderConfig, layout: HeadLayout, context_length: int) -> float:
    """:func:`training_flops` of a token in a row of one document: it sees context_length / 2 tokens on average."""
    return training_flops(config, layout, tokens=1, pairs=context_length / 2)


def cache_bytes_per_token(config: DecoderConfig, layout: HeadLayout, *, itemsize: int = 2) -> int:
    """Bytes of keys and values per token, by default in bfloat16."""
    head = config.head_dim + layout.extra_dims
    return 2 * config.num_hidden_layers * layout.num_key_value_heads * head * itemsize


class Memory(NamedTuple):
    """Bytes on one device at the peak of a step, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """All together."""
        return sum(self)


def memory_of_step(
    config: DecoderConfig,
    layout: HeadLayout,
    *,
    num_parameters: int,
    rows: int,
    context_length: int,
    shards: int = 1,
    context_parallel_size: int = 1,
    itemsize: int = 4,
    optimizer_states: float = 2.0,
    accumulates: bool = False,
    activation_checkpointing: int = 0,
    keeps_attention: bool = False,
    mlp_chunk_tokens: int | None = None,
    offload_activations: bool = False,
) -> Memory:
    """An estimate of the memory that a training step takes; kernels' own and fragmentation are not counted.

    Args:
        config: Geometry.
        layout: Head counts.
        num_parameters: Of the model.
        rows: In a micro-batch of a device.
        context_length: Tokens in each row.
        shards: Devices that weights, gradients and optimizer states are spread over.
        context_parallel_size: Devices that share the tokens of a row.
        itemsize: Bytes of an activation: 4 in float32, 2 in bfloat16.
        optimizer_states: Float32 numbers that the optimizer keeps for each parameter.
        accumulates: Whether a step has several micro-batches; whole gradients are then held on each device.
        activation_checkpointing: See :class:`~ropepp_lit.train.causal_lm.CausalLM`.
        keeps_attention: Whether blocks that are computed again keep the outputs of attention.
        mlp_chunk_tokens: See there.
        offload_activations: See there.
    """
    width, head, inner = config.hidden_size, config.head_dim, config.intermediate_size
    tokens = rows * context_length / context_parallel_size
    queries, heads, caches = layout.num_query_heads, layout.num_attention_heads, layout.num_key_value_heads
    # What the backward pass of a block reads: both norms' inputs, outputs and what they scale, projections before and
    # after the rotation, the attention's output, and the SwiGLU layer's gate, its activation, up and their product.
    attention = 6 * width + head * (queries + 2 * heads + 3 * caches)
    if layout.extra_dims:  # longer queries, keys and outputs, and values copied to be padded
        attention += layout.extra_dims * (2 * heads + 2 * caches) + head * caches
    chunk = context_length / context_parallel_size
    is_chunked = mlp_chunk_tokens is not None and mlp_chunk_tokens < chunk
    mlp = 0.0 if is_chunked else 4.0 * inner
    block = tokens * itemsize * (attention + mlp)
    in_work = rows * (mlp_chunk_tokens or 0) * itemsize * 4 * inner if is_chunked else 0.0
    layers = config.num_hidden_layers
    kept = layers // activation_checkpointing if activation_checkpointing else 0
    boundary = 0.0 if offload_activations else tokens * itemsize * width
    boundary += tokens * itemsize * heads * head if keeps_attention else 0.0
    # The loss comes when the forward pass has kept what it keeps: with three copies of a chunk of logits.
    precise = max(4, itemsize)
    forward = (layers - kept) * block + kept * boundary
    logits = 3.0 * min(rows_per_chunk(config.vocab_size, "cuda"), tokens) * config.vocab_size * precise
    # The backward pass computes blocks again, the last of those that kept their input first, and makes gradients.
    whole = max(layers - kept, kept * activation_checkpointing - kept + 1 if kept else 0)
    gradients_in_work = tokens * itemsize * (2 * width + max(0 if is_chunked else 2 * inner, 3 * heads * head))
    activations = whole * block + kept * boundary + in_work + gradients_in_work
    # What the loss takes beyond that, and the gradients of output layer and hidden states that it makes ahead.
    loss = max(0.0, forward + logits - activations) + config.vocab_size * width * precise
    loss += 2 * tokens * width * itemsize
    weights = num_parameters * precise / shards
    if shards > 1:  # one block and the rest are gathered
        largest = (num_parameters - 2 * config.vocab_size * width) / layers + 2 * config.vocab_size * width
        weights += largest * itemsize
    gradients = num_parameters * precise / (1 if accumulates else shards)
    return Memory(weights, gradients, optimizer_states * num_parameters * precise / shards, activations, loss)


def device_name() -> str | None:
    """The name of this process's GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
