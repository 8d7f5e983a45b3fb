"""The end of a step's gradients: their average is finished, and they are clipped."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ropepp_lit.train.loss_average import StepAverage


def finish_gradients(
    trainer: pl.Trainer,
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: StepAverage,
    *,
    places: int,
    clip_val: float | None,
    by_value: bool,
) -> Tensor:
    """Finish the average of the gradients, and clip them by norm or by value.

    With `precision: 16-mixed` gradients are multiplied by the loss scale until the optimizer steps; Lightning
    leaves that to optimizers that divide by it themselves, such as fused AdamW, which would be clipped too early.

    Args:
        trainer: Of the run.
        decoder: Whose gradients they are.
        optimizer: Of these parameters.
        average: What the gradients are averaged over.
        places: Of a micro-batch, which its loss was divided by.
        clip_val: Limit of the norm or of each value; None or 0 is none.
        by_value: Whether each value is clipped.

    Returns:
        The norm before it was clipped, a scalar that may be spread over ranks.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
    average.rescale(decoder.parameters(), trainer, places=places)
    if by_value and clip_val:
        torch.nn.utils.clip_grad_value_(decoder.parameters(), clip_val)
    limit = clip_val if clip_val and not by_value else math.inf
    return torch.nn.utils.clip_grad_norm_(decoder.parameters(), limit)
