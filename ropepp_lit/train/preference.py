"""Preference tuning: losses over pairs of a chosen and a rejected answer.

Shapes: P pairs; in [P, 2] the first column is the chosen answer, the second the rejected one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp_lit.errors import UsageError


class Preference(ABC):
    """Loss of pairs of a chosen and a rejected answer."""

    reads_reference = False
    """Whether the loss compares the model with a reference: the model at the start of the run."""

    @abstractmethod
    def check(self) -> None:
        """Raise UsageError if a setting is out of range."""

    @abstractmethod
    def __call__(
        self, log_probabilities: Tensor, num_tokens: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the losses and rewards of pairs.

        Args:
            log_probabilities: [P, 2] floating: log-probabilities of the answers under the model, in nats, summed over
                their tokens.
            num_tokens: [P, 2] int64: number of tokens of the answers.
            reference: [P, 2] floating: log-probabilities under the reference model, if `reads_reference`.

        Returns:
            [P] losses in nats, and [P, 2] rewards of the answers.
        """


class DPO(Preference):
    """Direct preference optimization (arXiv 2305.18290, equation 7): -log σ(β (Δ chosen - Δ rejected)).

    Δ is the log-probability of an answer under the model minus that under the reference, which is the model at the
    start of the run (with LoRA the base without adapters). At the first step the loss is log 2.

    Args:
        beta: β: strength of the constraint to stay close to the reference; smaller allows larger deviations.
        label_smoothing: Assumed fraction of pairs whose labels are swapped (conservative DPO).
    """

    reads_reference = True

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        self.beta, self.label_smoothing = beta, label_smoothing

    def check(self) -> None:
        """See :meth:`Preference.check`."""
        _check_positive("beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise UsageError(
                f"model.preference.label_smoothing: {self.label_smoothing} must be 0 or more and below 0.5"
            )

    def __call__(
        self, log_probabilities: Tensor, num_tokens: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Preference.__call__`."""
        assert reference is not None
        rewards = self.beta * (log_probabilities - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        share = self.label_smoothing
        return -(1 - share) * F.logsigmoid(margin) - share * F.logsigmoid(-margin), rewards

    def __str__(self) -> str:
        smoothing = f", label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"DPO, beta {self.beta:g}{smoothing}; the reference is the model at the start of the run"


class SimPO(Preference):
    """Simple preference optimization (arXiv 2405.14734, equation 6): -log σ(β (mean chosen - mean rejected) - γ).

    The means are over the log-probabilities of an answer's tokens; there is no reference.

    Args:
        beta: β: scale of the rewards.
        margin: γ: target difference between the rewards of the chosen and the rejected answer.
    """

    def __init__(self, *, beta: float = 2.0, margin: float = 1.0) -> None:
        self.beta, self.margin = beta, margin

    def check(self) -> None:
        """See :meth:`Preference.check`."""
        _check_positive("beta", self.beta)
        if not 0 <= self.margin < math.inf:
            raise UsageError(f"model.preference.margin: {self.margin} must be 0 or more")

    def __call__(
        self, log_probabilities: Tensor, num_tokens: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Preference.__call__`."""
        rewards = self.beta * log_probabilities / num_tokens
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - self.margin), rewards

    def __str__(self) -> str:
        return f"SimPO, beta {self.beta:g}, margin {self.margin:g}"


class ORPO(Preference):
    """Odds ratio preference optimization (arXiv 2403.07691, equations 4 to 7): fine-tuning and preference in one loss.

    The loss is the mean cross-entropy of the chosen answer, plus λ times -log σ of the log odds ratio.
    Probabilities are the geometric means over an answer's tokens; there is no reference.

    Args:
        weight: λ: weight of the odds ratio term.
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        self.weight = weight

    def check(self) -> None:
        """See :meth:`Preference.check`."""
        _check_positive("weight", self.weight)

    def __call__(
        self, log_probabilities: Tensor, num_tokens: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Preference.__call__`."""
        means = log_probabilities / num_tokens
        odds = means - torch.log1p(-means.exp())
        return -means[:, 0] - self.weight * F.logsigmoid(odds[:, 0] - odds[:, 1]), means

    def __str__(self) -> str:
        return f"ORPO, weight {self.weight:g}"


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"model.preference.{name}: {value} must be above 0")
