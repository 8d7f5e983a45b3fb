"""Selective activation checkpointing: blocks that save attention only, and layers computed in chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

_ATTENTION_OPERATIONS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
)
"""Fused attention operators of torch and of the package flash-attn, which return what their backward pass needs."""


@cache
def attention_operations() -> list[Any]:
    """Return the fused attention operators that are registered in this process."""
    registered = []
    for name in _ATTENTION_OPERATIONS:
        namespace, operation = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), operation, None)
        if packet is not None:
            registered.append(packet.default)
    return registered


def keep_attention() -> Any:
    """Return contexts for :func:`torch.utils.checkpoint.checkpoint` that save the outputs of attention only."""
    return create_selective_checkpoint_contexts(attention_operations())


def compute_in_chunks(layer: nn.Module, function: Callable[[Tensor], Tensor], hidden: Tensor, size: int) -> Tensor:
    """Return `function(hidden)`, computed in chunks of tokens that are recomputed in the backward pass.

    Unlike a `checkpoint` per chunk, this computes nothing a third time inside a checkpointed block: the input is saved
    before anything is computed, and the block's recomputation stops early at that point.

    Args:
        layer: Module with the parameters of `function`.
        function: Function that computes each token independently.
        hidden: [B, T, hidden_size].
        size: Tokens of a row per chunk.

    Returns:
        [B, T, …].
    """
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled():
        return torch.cat([function(part) for part in hidden.split(size, dim=1)], dim=1)
    token = _SaveInput.apply(torch.empty(0, requires_grad=True), hidden)
    output: Tensor = _Chunks.apply(layer, function, size, token.grad_fn, hidden, *parameters)
    return output


class _SaveInput(torch.autograd.Function):
    """A node that saves a tensor for the backward pass of another node."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, saved: Tensor) -> Tensor:
        ctx.save_for_backward(saved)
        return token.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise AssertionError("nothing depends on the token")


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: nn.Module,
        function: Callable[[Tensor], Tensor],
        size: int,
        saved: Any,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.function, ctx.size, ctx.saved = layer, function, size, saved
        device_type = hidden.device.type
        ctx.autocast = {
            "device_type": device_type,
            "enabled": torch.is_autocast_enabled(device_type),
            "dtype": torch.get_autocast_dtype(device_type),
        }
        return torch.cat([function(part) for part in hidden.split(size, dim=1)], dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved.saved_tensors
        ctx.saved = None  # autograd does not track this node and would keep the tensor until the graph is freed
        parameters = [parameter for parameter in ctx.layer.parameters() if parameter.requires_grad]
        needs_input_grad = ctx.needs_input_grad[4]
        grad_hidden = torch.empty_like(hidden) if needs_input_grad else None
        totals: list[Tensor] = []
        for start in range(0, hidden.shape[1], ctx.size):
            tokens = slice(start, start + ctx.size)
            part = hidden[:, tokens].detach().requires_grad_(needs_input_grad)
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                output = ctx.function(part)
            inputs = [part, *parameters] if needs_input_grad else parameters
            grads = list(torch.autograd.grad(output, inputs, grad[:, tokens]))
            if grad_hidden is not None:
                grad_hidden[:, tokens] = grads.pop(0)
            totals = [total.add_(new) for total, new in zip(totals, grads, strict=True)] if totals else grads
        return None, None, None, None, grad_hidden, *totals
