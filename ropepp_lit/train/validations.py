"""Scheduling of validation at the ends of optimizer steps, including one that a killed run missed; its metrics."""

from __future__ import annotations

import math
from typing import Any, Protocol

import lightning.pytorch as pl

from ropepp_lit.data.token_data import TokenData
from ropepp_lit.train.metric_logging import metric_values
from ropepp_lit.train.metrics import TokenLoss


class _Validated(Protocol):
    @property
    def validated_step(self) -> int: ...


def validated_step(metrics: dict[str, dict[str, float]]) -> int:
    """Return the last step at which all validation sets were evaluated, or 0.

    Args:
        metrics: Metrics of the last validation, by set.
    """
    return int(min((values["step"] for values in metrics.values()), default=0))


def is_due(step: int, validated_step: int, *, accumulate_grad_batches: int, interval: float) -> bool:
    """Return whether a validation that `val_check_interval` requires has not been run yet.

    A validation that is due after a micro-batch inside a step runs at the end of that step.

    Args:
        step: Optimizer steps taken.
        validated_step: Last step that was validated.
        accumulate_grad_batches: Micro-batches per step.
        interval: Micro-batches between validations.
    """
    if not interval or math.isinf(interval):
        return False
    due, done = (number * accumulate_grad_batches // interval for number in (step, validated_step))
    return due > done


def validate_by_steps(trainer: pl.Trainer, model: _Validated) -> None:
    """Replace Lightning's rule for when to validate.

    Lightning validates inside a step if the interval is not a multiple of the accumulated micro-batches or the run is
    stopped there, possibly twice for the same weights, and skips a validation if the run was killed between the
    checkpoint of a step and its validation.
    """
    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.min_epochs = 0  # Lightning sets 1, the complete run, if `min_steps` is given

    def should_validate(data_fetcher: Any) -> bool:
        if not loop._should_check_val_epoch() or not trainer.global_step:
            return False
        if trainer.should_stop and trainer.fit_loop._can_stop_early:
            return model.validated_step != trainer.global_step
        return not loop._should_accumulate() and _is_due(trainer, model)

    loop._should_check_val_fx = should_validate  # type: ignore[method-assign]


def _is_due(trainer: pl.Trainer, model: _Validated) -> bool:
    return is_due(
        trainer.global_step,
        model.validated_step,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        interval=trainer.val_check_batch or 0,
    )


def validate_if_due(trainer: pl.Trainer, model: _Validated) -> None:
    """Run the validation that is still due for the checkpoint's step, before the first step after a resume."""
    loop = trainer.fit_loop.epoch_loop
    if not trainer.global_step or not loop._should_check_val_epoch() or not _is_due(trainer, model):
        return
    is_first = trainer._logger_connector._first_loop_iter
    loop.val_loop.restarting = False
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = is_first


def read_losses(losses: dict[str, TokenLoss], data: Any) -> tuple[dict[str, dict[str, float]], float, float]:
    """Return the metrics of a validation, and reset the losses.

    Args:
        losses: Loss metric of each set.
        data: The datamodule.

    Returns:
        The metrics of each set, with the number of predicted `tokens` (or `pairs` of answers); the nats, and the
        tokens or pairs, of all sets.
    """
    sets, nats, total = {}, 0.0, 0.0
    for name, metric in losses.items():
        loss, tokens, *others = (float(value) for value in metric.compute())
        metric.reset()
        nats, total = nats + loss * tokens, total + tokens
        bytes_per_token = data.bytes_per_token(name) if isinstance(data, TokenData) else None
        sets[name] = metric_values(metric, "", (loss, *others), bytes_per_token) | {metric.counted: tokens}
    return sets, nats, total


def metrics_to_log(sets: dict[str, dict[str, float]], *, loss: float) -> dict[str, float]:
    """Return the metrics of a validation by tag, which contains the name of the set if there are several.

    Args:
        sets: Metrics of each set, see :func:`read_losses`.
        loss: Loss over all sets.
    """
    values: dict[str, float] = {}
    for name, metrics in sets.items():
        prefix = "val/" if len(sets) == 1 else f"val/{name}/"
        values |= {prefix + metric: value for metric, value in metrics.items() if metric not in ("tokens", "pairs")}
    return values | {"val/loss": loss}
