"""Cross-entropy over the output layer without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""Labels that do not count (torch's and transformers' convention)."""

MAX_LOGITS = 2**25
"""Logits held at once: 128 MiB in float32, enough rows to keep the matrix products busy."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy of `hidden @ weight.T` against `labels`, computed in chunks of tokens.

    Gradients are computed chunk by chunk in the forward pass, so nothing is computed twice and no logits are kept.
    Softmax, loss and the sum of the weight's gradient are in float32 (float64 for float64) whatever the dtype of the
    inputs. Differentiable once.

    Args:
        hidden: [tokens, hidden_size], floating.
        weight: [vocab_size, hidden_size], the output layer.
        labels: [tokens] int64; IGNORE_INDEX does not count.

    Returns:
        Scalar, float32 (float64 for float64): nats, summed over the labels that count.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _LinearCrossEntropy.apply(hidden, weight, labels)


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each token, in chunks of tokens; to measure, not to train.

    Args:
        hidden: See :func:`linear_cross_entropy`.
        weight: See there.
        labels: See there.

    Returns:
        [tokens] float32 (float64 for float64): nats, 0 where the label does not count.
    """
    precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    size = max(1, MAX_LOGITS // weight.shape[0])
    losses = [
        F.cross_entropy((part @ weight.T).to(precision), wanted, ignore_index=IGNORE_INDEX, reduction="none")
        for part, wanted in zip(hidden.split(size), labels.split(size), strict=True)
    ]
    return torch.cat(losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = hidden.new_zeros((), dtype=precision)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=precision) if ctx.needs_input_grad[1] else None
        size = max(1, MAX_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            logits = (hidden[rows] @ weight.T).to(precision)
            log_probabilities = logits.log_softmax(dim=-1)
            total += F.nll_loss(log_probabilities, labels[rows], ignore_index=IGNORE_INDEX, reduction="sum")
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot, and zero where the label does not count.
            counts = labels[rows] != IGNORE_INDEX
            grad = log_probabilities.exp_()
            grad[torch.arange(grad.shape[0], device=grad.device), labels[rows].where(counts, 0)] -= 1
            grad = grad.mul_(counts[:, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_output.to(grad_weight.dtype),
            None,
        )
