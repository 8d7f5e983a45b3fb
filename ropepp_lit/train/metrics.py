"""The loss per token, summed exactly over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean cross-entropy per token in nats, over all batches and ranks since the last reset.

    torchmetrics' own weighted mean drops its weights with `nan_strategy="disable"` and drops NaN otherwise, and its
    sums become bfloat16 under `precision: bf16-true`. Here sums stay in float64 and a NaN stays visible.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: int) -> None:
        """Add a batch; the device is not waited for.

        Args:
            nats: Cross-entropy summed over the labels that count.
            tokens: How many they are.
        """
        self.nats += nats.detach()
        self.tokens += tokens

    def compute(self) -> tuple[Tensor, Tensor]:
        """Nats per token, float64, and the tokens that were counted."""
        return self.nats / self.tokens, self.tokens.clone()

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> TokenLoss:
        super()._apply(fn, exclude_state)
        if self.nats.device.type != "mps":  # which has no float64
            self.nats = self.nats.double()
            self._defaults["nats"] = torch.zeros_like(self.nats)
        return self
