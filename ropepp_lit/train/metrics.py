"""Metrics of the loss per token or per pair of answers, summed exactly over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean cross-entropy per token in nats, over all batches and ranks since the last reset.

    torchmetrics' `MeanMetric` drops its weights with `nan_strategy="disable"` and drops NaN otherwise, and its
    sums become bfloat16 under `precision: bf16-true`. Here sums stay in float64 and NaN is not dropped.
    """

    full_state_update = False
    others: tuple[str, ...] = ()
    """Names of the values that :meth:`compute` returns after the loss and the count."""
    counted = "tokens"
    """Name of the count: what the loss is averaged over."""
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: int | Tensor) -> None:
        """Add a batch; does not synchronize with the device.

        Args:
            nats: Cross-entropy summed over the labels that count.
            tokens: Number of these labels.
        """
        self.nats += nats.detach()
        self.tokens += tokens

    def compute(self) -> tuple[Tensor, ...]:
        """Return the nats per token, float64, and the number of tokens."""
        return self.nats / self.tokens, self.tokens.clone()

    @property
    def states(self) -> dict[str, Tensor]:
        """Sums of this rank since the last reset, by name."""
        return {name: getattr(self, name) for name in self._defaults}

    def add_sums(self, stored: dict[str, float | list[float]]) -> None:
        """Add the sums stored in a checkpoint, unless they are of another kind of metric."""
        if stored.keys() == self.states.keys():
            for name, value in self.states.items():
                value += torch.tensor(stored[name], dtype=value.dtype)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> TokenLoss:
        super()._apply(fn, exclude_state)
        for name, value in self.states.items():
            if value.is_floating_point():
                setattr(self, name, value.to(exact_dtype(value.device)))
                self._defaults[name] = torch.zeros_like(getattr(self, name))
        return self


class PairLoss(TokenLoss):
    """Mean loss of pairs of answers in nats, and their rewards; `tokens` counts pairs here."""

    others = ("chosen_reward", "rejected_reward", "accuracy")
    counted = "pairs"
    rewards: Tensor
    """[3] float64: sum of the chosen rewards, sum of the rejected rewards, number of pairs with the chosen one higher.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rewards", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, losses: Tensor, rewards: Tensor, is_counted: Tensor) -> None:
        """Add a batch; does not synchronize with the device.

        Args:
            losses: [P] floating.
            rewards: [P, 2] floating: rewards of the chosen and rejected answers.
            is_counted: [P] bool: which pairs count.
        """
        is_right = (rewards[:, 0] > rewards[:, 1]).to(rewards.dtype)
        parts = torch.cat((rewards, is_right[:, None]), dim=1)
        self.rewards += (parts * is_counted[:, None]).sum(0)
        self.update((losses * is_counted).sum(), is_counted.sum())

    def compute(self) -> tuple[Tensor, ...]:
        """Return the nats per pair and the means of :attr:`others`, all float64; the number of pairs comes second."""
        return self.nats / self.tokens, self.tokens.clone(), *(self.rewards / self.tokens)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of exact sums: float64, or float32 on MPS, which lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64
