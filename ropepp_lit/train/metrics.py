"""The loss per token, or per pair of answers, summed exactly over batches and ranks."""

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
    others: tuple[str, ...] = ()
    """Names of what :meth:`compute` returns beside the loss and the count."""
    counted = "tokens"
    """What the loss is the mean of."""
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: int | Tensor) -> None:
        """Add a batch; the device is not waited for.

        Args:
            nats: Cross-entropy summed over the labels that count.
            tokens: How many they are.
        """
        self.nats += nats.detach()
        self.tokens += tokens

    def compute(self) -> tuple[Tensor, ...]:
        """Nats per token, float64, and the tokens that were counted."""
        return self.nats / self.tokens, self.tokens.clone()

    @property
    def states(self) -> dict[str, Tensor]:
        """The sums of this rank since the last reset, by name."""
        return {name: getattr(self, name) for name in self._defaults}

    def go_on(self, stored: dict[str, float | list[float]]) -> None:
        """Add the sums that a checkpoint stores; those of a metric of another kind are left out."""
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
    """Mean loss of pairs of answers in nats, and their rewards; its `tokens` are pairs."""

    others = ("chosen_reward", "rejected_reward", "accuracy")
    counted = "pairs"
    rewards: Tensor
    """[3] float64: sums of the chosen answers' rewards, of the rejected ones', and how many of those are lower."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rewards", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, losses: Tensor, rewards: Tensor, is_counted: Tensor) -> None:
        """Add a batch; the device is not waited for.

        Args:
            losses: [P] floating.
            rewards: [P, 2] floating: of chosen and rejected answers.
            is_counted: [P] bool: which of them count.
        """
        is_right = (rewards[:, 0] > rewards[:, 1]).to(rewards.dtype)
        parts = torch.cat((rewards, is_right[:, None]), dim=1)
        self.rewards += (parts * is_counted[:, None]).sum(0)
        self.update((losses * is_counted).sum(), is_counted.sum())

    def compute(self) -> tuple[Tensor, ...]:
        """Nats per pair, the pairs that were counted, and of :attr:`others` the means, all float64."""
        return self.nats / self.tokens, self.tokens.clone(), *(self.rewards / self.tokens)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Of sums: float64, and float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64
