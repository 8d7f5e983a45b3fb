"""Final averaging and clipping of the gradients of an optimizer step."""

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
    num_positions: int,
    clip_val: float | None,
    by_value: bool,
) -> Tensor:
    """Finish the average of the gradients, and clip them by norm or by value.

    With `precision: 16-mixed` gradients are multiplied by the loss scale. Lightning does not unscale them before
    clipping if the optimizer unscales in its step, as fused AdamW does, so this function unscales them first.

    Args:
        trainer: Trainer of the run.
        decoder: Decoder whose gradients are finished.
        optimizer: Optimizer of its parameters.
        average: Average over the items of the step.
        num_positions: Tokens of a micro-batch on this rank, by which its loss was divided.
        clip_val: Maximum norm or absolute value; None or 0 disables clipping.
        by_value: Whether to clip each value instead of the norm.

    Returns:
        The norm before clipping, a scalar that may be a DTensor.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
    average.rescale(decoder.parameters(), trainer, num_positions=num_positions)
    if by_value and clip_val:
        torch.nn.utils.clip_grad_value_(decoder.parameters(), clip_val)
    limit = clip_val if clip_val and not by_value else math.inf
    return torch.nn.utils.clip_grad_norm_(decoder.parameters(), limit)
