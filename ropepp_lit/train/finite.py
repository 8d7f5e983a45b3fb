"""Detection of steps with NaN or infinite loss or gradients, which end the run or are skipped."""

from __future__ import annotations

import math
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropepp_lit.errors import UsageError
from ropepp_lit.train.run_log import RunLog

OnNaN = Literal["stop", "skip"]

MAX_SKIPPED = 10
"""Maximum number of consecutive skipped steps; beyond it, weights or settings are at fault rather than the data."""


class DivergedError(UsageError):
    """Loss, gradients or weights are NaN or infinite; the command adds the last checkpoint to the message."""


class FiniteSteps:
    """Check of the gradient norm of each step.

    The norm is the same on every rank, so all ranks make the same decision. With `stop` the number of the first bad
    step is recorded on the device, and read when the host waits for the device anyway: when logging, validating or
    saving a checkpoint. With `skip` the host waits for the norm of each step.

    Args:
        mode: `stop` or `skip`.
    """

    def __init__(self, mode: OnNaN) -> None:
        self.mode = mode
        self.skipped = False
        """Whether the last step was skipped."""
        self.num_skipped = 0
        """Number of steps skipped since the start of the run; stored in checkpoints."""
        self._first_bad: Tensor | None = None
        self._in_a_row = 0

    def watch(self, norm: Tensor, step: int, run_log: RunLog) -> bool:
        """Check the gradient norm of a step; returns whether to skip the step, which is printed and logged.

        Args:
            norm: Scalar, the same on every rank.
            step: Number of the step, starting at 1.
            run_log: Log of the run.

        Raises:
            DivergedError: more than ten steps in a row would be skipped.
        """
        if self.mode == "stop":
            if self._first_bad is None:
                self._first_bad = torch.zeros((), dtype=torch.int64, device=norm.device)
            is_first = ~torch.isfinite(norm) & (self._first_bad == 0)
            self._first_bad = torch.where(is_first, step, self._first_bad)
            return False
        self.skipped = not bool(torch.isfinite(norm))
        self._in_a_row = self._in_a_row + 1 if self.skipped else 0
        if self._in_a_row > MAX_SKIPPED:
            raise DivergedError(
                f"loss or gradients are NaN or infinite for {MAX_SKIPPED} steps in a row, up to step {step}"
            )
        if self.skipped:
            self.num_skipped += 1
            rank_zero_only(print)(f"\nStep {step} is skipped: its loss or gradients are NaN or infinite", flush=True)
            run_log.write("skip", step=step, reason="loss or gradients are not finite", skipped_steps=self.num_skipped)
        return self.skipped

    def check_values(self, loss: float, norm: float, step: int) -> None:
        """Raise DivergedError if the logged values of a step are not finite, unless such steps are skipped."""
        if self.mode == "stop" and not math.isfinite(loss + norm):
            self.check()
        if self.mode == "stop" and not math.isfinite(loss):
            raise DivergedError(f"the training loss is {loss} at step {step}")

    def check(self) -> None:
        """Raise DivergedError if a step was bad; waits for the device."""
        step = 0 if self._first_bad is None else int(self._first_bad)
        if step:
            raise DivergedError(f"loss or gradients are NaN or infinite at step {step}")


def check_weights(trainer: pl.Trainer, decoder: nn.Module) -> None:
    """Raise DivergedError on all ranks if a weight of any rank is NaN or infinite; waits for the device."""
    parameters = [p.detach() for p in decoder.parameters()]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    filled = [p for p in local if p.numel()]
    bad = torch.zeros((), dtype=torch.int64, device=trainer.strategy.root_device)
    if filled:
        largest = torch.stack([value.float() for value in torch._foreach_norm(filled, float("inf"))])
        bad += (~torch.isfinite(largest)).sum()
    if int(trainer.strategy.reduce(bad, reduce_op="sum")):
        raise DivergedError(f"weights are NaN or infinite at step {trainer.global_step}")
