"""Learning rate schedules: a multiplier of the peak learning rate for each optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from ropepp_lit.errors import UsageError


class Schedule(ABC):
    """Multiplier of the peak learning rate for each optimizer step."""

    total_steps: int | None
    """Length of the schedule in steps; None means the trainer's `max_steps`."""

    def __init__(self, *, warmup_steps: int, total_steps: int | None = None) -> None:
        if warmup_steps < 0:
            raise UsageError(f"model.schedule.warmup_steps: {warmup_steps} must be 0 or more")
        if total_steps is not None and total_steps < 1:
            raise UsageError(f"model.schedule.total_steps: {total_steps} must be 1 or more")
        self.warmup_steps, self.total_steps = warmup_steps, total_steps

    def factor(self, step: int, total_steps: int) -> float:
        """Return the multiplier of the learning rate.

        Args:
            step: Optimizer steps taken so far.
            total_steps: Length of the schedule.
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self._after_warmup(step, total_steps)

    def check(self, total_steps: int) -> None:  # noqa: B027 most schedules allow any length
        """Raise UsageError if the schedule is invalid for this length."""

    @abstractmethod
    def _after_warmup(self, step: int, total_steps: int) -> float:
        """Return the multiplier at a step after the warm-up."""


class Constant(Schedule):
    """Linear warm-up, then a constant learning rate.

    Args:
        warmup_steps: Steps of linear warm-up.
    """

    def __init__(self, *, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps=warmup_steps)

    def _after_warmup(self, step: int, total_steps: int) -> float:
        return 1.0


class Cosine(Schedule):
    """Linear warm-up, then cosine decay to `final_factor` at the last step (arXiv 1608.03983).

    Args:
        warmup_steps: Steps of linear warm-up.
        total_steps: Length of the schedule; empty means the trainer's max_steps.
        final_factor: Learning rate at the end, as a fraction of the peak.
    """

    def __init__(self, *, warmup_steps: int = 0, total_steps: int | None = None, final_factor: float = 0.0) -> None:
        super().__init__(warmup_steps=warmup_steps, total_steps=total_steps)
        self.final_factor = _require_share("final_factor", final_factor)

    def _after_warmup(self, step: int, total_steps: int) -> float:
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupStableDecay(Schedule):
    """Linear warm-up, a constant learning rate, and linear decay over the last steps (arXiv 2404.06395).

    Set the length of the decay by `decay_share`, or its first step by `decay_from`, for example to the step of a
    checkpoint from the constant phase that a run continues from.

    Args:
        warmup_steps: Steps of linear warm-up.
        decay_share: Fraction of the schedule in which the learning rate decays, at its end; 1 decays right after the
            warm-up. Must be empty with decay_from.
        decay_from: Step at which the decay starts.
        total_steps: Length of the schedule; empty means the trainer's max_steps.
        final_factor: Learning rate at the end, as a fraction of the peak.
    """

    def __init__(
        self,
        *,
        warmup_steps: int = 0,
        decay_share: float | None = 0.2,
        decay_from: int | None = None,
        total_steps: int | None = None,
        final_factor: float = 0.0,
    ) -> None:
        super().__init__(warmup_steps=warmup_steps, total_steps=total_steps)
        if (decay_share is None) == (decay_from is None):
            raise UsageError("model.schedule: give decay_share, or decay_from with decay_share null")
        if decay_from is not None and decay_from < warmup_steps:
            raise UsageError(f"model.schedule.decay_from: {decay_from} is within the {warmup_steps} steps of warm-up")
        self.decay_share = None if decay_share is None else _require_share("decay_share", decay_share)
        self.decay_from = decay_from
        self.final_factor = _require_share("final_factor", final_factor)

    def check(self, total_steps: int) -> None:
        """Raise UsageError if the decay starts at the end or later."""
        if self.decay_from is not None and self.decay_from >= total_steps:
            raise UsageError(
                f"model.schedule.decay_from: {self.decay_from:,} must be below the {total_steps:,} steps of the run; "
                "raise trainer.max_steps by the steps of the decay"
            )

    def _after_warmup(self, step: int, total_steps: int) -> float:
        decay_steps = total_steps - self.warmup_steps
        if self.decay_from is not None:
            decay_steps = total_steps - self.decay_from
        elif self.decay_share is not None:
            decay_steps = min(round(self.decay_share * total_steps), decay_steps)
        left = max(0, total_steps - step)
        if left >= decay_steps:
            return 1.0
        return self.final_factor + (1 - self.final_factor) * left / decay_steps


def _require_share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UsageError(f"model.schedule.{name}: {value} must be between 0 and 1")
    return value
