"""Learning-rate schedules by optimizer steps: factors on the peak learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from ropepp_lit.errors import UsageError


class Schedule(ABC):
    """A factor on the peak learning rate for each optimizer step."""

    total_steps: int | None
    """The schedule's own length; None means the trainer's `max_steps`."""

    def __init__(self, *, warmup_steps: int, total_steps: int | None = None) -> None:
        if warmup_steps < 0:
            raise UsageError(f"model.schedule.warmup_steps: {warmup_steps} must be 0 or more")
        if total_steps is not None and total_steps < 1:
            raise UsageError(f"model.schedule.total_steps: {total_steps} must be 1 or more")
        self.warmup_steps, self.total_steps = warmup_steps, total_steps

    def factor(self, step: int, total_steps: int) -> float:
        """Factor of the learning rate.

        Args:
            step: Optimizer steps taken so far.
            total_steps: Length of the schedule.
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self._after_warmup(step, total_steps)

    @abstractmethod
    def _after_warmup(self, step: int, total_steps: int) -> float:
        """Factor of the steps that follow the warm-up."""


class Constant(Schedule):
    """Linear warm-up, then the peak.

    Args:
        warmup_steps: Steps of linear warm-up.
    """

    def __init__(self, *, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps=warmup_steps)

    def _after_warmup(self, step: int, total_steps: int) -> float:
        return 1.0


class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `final_factor` at the last step (arXiv 1608.03983).

    Args:
        warmup_steps: Steps of linear warm-up.
        total_steps: Length of the schedule; empty means the trainer's max_steps.
        final_factor: Share of the peak that is left at the end.
    """

    def __init__(self, *, warmup_steps: int = 0, total_steps: int | None = None, final_factor: float = 0.0) -> None:
        super().__init__(warmup_steps=warmup_steps, total_steps=total_steps)
        self.final_factor = _require_share("final_factor", final_factor)

    def _after_warmup(self, step: int, total_steps: int) -> float:
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupStableDecay(Schedule):
    """Linear warm-up, the peak, and a linear decay over the last steps (arXiv 2404.06395).

    Args:
        warmup_steps: Steps of linear warm-up.
        decay_share: Share of the schedule that decays, at its end; 1 decays from the warm-up on.
        total_steps: Length of the schedule; empty means the trainer's max_steps.
        final_factor: Share of the peak that is left at the end.
    """

    def __init__(
        self,
        *,
        warmup_steps: int = 0,
        decay_share: float = 0.2,
        total_steps: int | None = None,
        final_factor: float = 0.0,
    ) -> None:
        super().__init__(warmup_steps=warmup_steps, total_steps=total_steps)
        self.decay_share = _require_share("decay_share", decay_share)
        self.final_factor = _require_share("final_factor", final_factor)

    def _after_warmup(self, step: int, total_steps: int) -> float:
        decay_steps = min(round(self.decay_share * total_steps), total_steps - self.warmup_steps)
        left = max(0, total_steps - step)
        if left >= decay_steps:
            return 1.0
        return self.final_factor + (1 - self.final_factor) * left / decay_steps


def _require_share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UsageError(f"model.schedule.{name}: {value} must be between 0 and 1")
    return value
