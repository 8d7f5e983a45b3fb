"""Fused output layer and cross-entropy, which computes logits in chunks and never stores all of them.

:func:`linear_cross_entropy` is the loss of training; :class:`_LinearCrossEntropy` computes its gradients in the forward
pass, chunk by chunk. :func:`token_cross_entropy` returns the losses of single tokens for evaluation, and
:func:`function_of_cross_entropy` differentiates a function of them, such as DPO. This is the last file of the model;
:mod:`ropepp_lit.train.causal_lm` trains it.

Shapes: N tokens, M tokens whose labels are not ignored, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp_lit.nn.precision import activation_dtype, at_least_float32

IGNORE_INDEX = -100
"""Label that is ignored (torch's and transformers' convention)."""

MAX_LOGITS = 2**25
"""Maximum number of logits per chunk on a CPU: 128 MiB in float32, enough rows to occupy its cores."""

MIN_ROWS_ON_GPU = 4096
"""Minimum number of rows per chunk on a GPU: fewer leave its matrix units idle and read the weights too often."""


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """Return the number of tokens per chunk of logits.

    On a CPU, as many as `MAX_LOGITS` allows; on other devices a multiple of 256, and at least `MIN_ROWS_ON_GPU`.
    """
    rows = max(1, MAX_LOGITS // vocab_size)
    return rows if device_type == "cpu" else max(MIN_ROWS_ON_GPU, rows // 256 * 256)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_indices: Tensor | None = None,
    label_weights: Tensor | None = None,
) -> Tensor:
    """Return the summed cross-entropy of `hidden @ weight.T` against `labels`, computed in chunks of tokens.

    Gradients are computed chunk by chunk in the forward pass, so nothing is computed twice and no logits are stored.
    Softmax, loss and the accumulated gradient of the weight are in float32 (float64 for float64) whatever the dtype of
    the inputs. Differentiable once.

    Args:
        hidden: [N, hidden_size], floating.
        weight: [V, hidden_size], the output layer.
        labels: [N] int64; IGNORE_INDEX is ignored.
        label_indices: [M] int64: indices of the labels that are not ignored. The other tokens are skipped in the matrix
            products. None computes all tokens. It is an argument because computing M here would synchronize with the
            GPU.
        label_weights: [N] floating: factor of each token's loss. None means 1.

    Returns:
        Scalar, float32 (float64 for float64): nats, summed over the labels that are not ignored.
    """
    dtype = activation_dtype(hidden)
    loss: Tensor = _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), labels, label_indices, label_weights)
    return loss


def function_of_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    function: Callable[[Tensor], Tensor],
    *,
    label_indices: Tensor | None = None,
) -> Tensor:
    """Return a function of the cross-entropy of each token, computed in chunks of tokens.

    Gradients need a second pass over the output layer: the first pass computes the losses; the gradient of the function
    with respect to them is then the `label_weights` of :func:`linear_cross_entropy`. Differentiable once.

    Args:
        hidden: See :func:`linear_cross_entropy`.
        weight: See :func:`linear_cross_entropy`.
        labels: See :func:`linear_cross_entropy`.
        function: Called with the result of :func:`token_cross_entropy`. Returns a scalar, or anything if gradients are
            disabled.
        label_indices: See :func:`linear_cross_entropy`.

    Returns:
        The result of the function.
    """
    losses = token_cross_entropy(hidden, weight, labels, label_indices=label_indices)
    if not torch.is_grad_enabled():
        return function(losses)
    value = function(losses.requires_grad_())
    (gradient,) = torch.autograd.grad(value, losses)
    label_weights = gradient
    if label_indices is not None:
        label_weights = gradient.new_zeros(len(labels)).index_copy(0, label_indices, gradient)
    total = linear_cross_entropy(hidden, weight, labels, label_indices=label_indices, label_weights=label_weights)
    return value.detach() + (total - total.detach())


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, label_indices: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of each token, computed in chunks of tokens, without gradients.

    Args:
        hidden: See :func:`linear_cross_entropy`.
        weight: See :func:`linear_cross_entropy`.
        labels: See :func:`linear_cross_entropy`.
        label_indices: See :func:`linear_cross_entropy`.

    Returns:
        [N], or [M] with `label_indices`, float32 (float64 for float64): nats, 0 where the label is ignored.
    """
    dtype = activation_dtype(hidden)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    losses = [
        F.cross_entropy(_logits(hidden[rows], weight), labels[rows], ignore_index=IGNORE_INDEX, reduction="none")
        for rows in _chunks(label_indices, labels, weight)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=at_least_float32(dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        label_indices: Tensor | None,
        label_weights: Tensor | None,
    ) -> Tensor:
        precision = at_least_float32(hidden.dtype)
        total = hidden.new_zeros((), dtype=precision)
        empty = torch.empty_like if label_indices is None else torch.zeros_like
        grad_hidden = empty(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=precision) if ctx.needs_input_grad[1] else None
        needs_grad = grad_hidden is not None or grad_weight is not None
        for rows in _chunks(label_indices, labels, weight):
            inputs = hidden[rows]
            chunk_weights = None if label_weights is None else label_weights[rows]
            loss, grad = _loss_of_chunk(inputs, weight, labels[rows], chunk_weights, needs_grad=needs_grad)
            total += loss
            if grad_hidden is not None and grad is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None and grad is not None:
                _add_product(grad_weight, grad.T, inputs)
            del grad  # before the next chunk's logits are computed
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_output.to(grad_weight.dtype),
            None,
            None,
            None,
        )


def _loss_of_chunk(
    inputs: Tensor, weight: Tensor, targets: Tensor, target_weights: Tensor | None, *, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of a chunk, and its gradient with respect to the logits in the dtype of the inputs."""
    log_probabilities = _logits(inputs, weight).log_softmax(dim=-1)
    if target_weights is None:
        loss = F.nll_loss(log_probabilities, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    else:
        losses = F.nll_loss(log_probabilities, targets, ignore_index=IGNORE_INDEX, reduction="none")
        loss = (losses * target_weights).sum()
    if not needs_grad:
        return loss, None
    # d loss / d logits = softmax - one-hot, and zero where the label is ignored.
    has_label = targets != IGNORE_INDEX
    grad = log_probabilities.exp_()
    grad[torch.arange(grad.shape[0], device=grad.device), targets.where(has_label, 0)] -= 1
    factors = has_label if target_weights is None else has_label * target_weights
    return loss, grad.mul_(factors[:, None]).to(inputs.dtype)


def _chunks(label_indices: Tensor | None, labels: Tensor, weight: Tensor) -> Iterator[slice | Tensor]:
    """Yield the indices of the tokens of each chunk: slices, or parts of `label_indices`."""
    size = rows_per_chunk(weight.shape[0], weight.device.type)
    count = len(labels) if label_indices is None else len(label_indices)
    for start, end in pairwise([*range(0, count, size), count]):
        yield slice(start, end) if label_indices is None else label_indices[start:end]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden @ weight.T in float32 (float64 for float64); on CUDA without rounding to bfloat16."""
    if hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).to(at_least_float32(hidden.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right in the dtype of `total`, fused where the device supports it."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
