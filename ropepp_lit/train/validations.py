"""When a run validates: at the end of an optimizer step, once per step, also after it was killed before it could."""

from __future__ import annotations

import math
from typing import Any, Protocol

import lightning.pytorch as pl

from ropepp_lit.data.token_data import TokenData
from ropepp_lit.train.curves import figures_of
from ropepp_lit.train.metrics import TokenLoss


class _Validated(Protocol):
    @property
    def validated_step(self) -> int: ...


def validated_step(figures: dict[str, dict[str, float]]) -> int:
    """The newest step at which all validation sets were measured, or 0.

    Args:
        figures: What the newest validation found, by set.
    """
    return int(min((found["step"] for found in figures.values()), default=0))


def is_due(step: int, validated_step: int, *, accumulate_grad_batches: int, interval: float) -> bool:
    """Whether a validation that `val_check_interval` calls for has not been made yet.

    A validation whose micro-batch is inside a step comes at the end of that step.

    Args:
        step: Optimizer steps taken.
        validated_step: The newest step that was validated.
        accumulate_grad_batches: Micro-batches of a step.
        interval: Micro-batches between validations.
    """
    if not interval or math.isinf(interval):
        return False
    due, done = (number * accumulate_grad_batches // interval for number in (step, validated_step))
    return due > done


def validate_by_steps(trainer: pl.Trainer, model: _Validated) -> None:
    """Replace Lightning's choice of the micro-batches after which it validates.

    Lightning validates inside of a step where the interval is no multiple of the accumulated micro-batches or
    something stops the run there, possibly twice for the same weights, and forgets the validation of a step where the
    run was killed between its checkpoint and its validation.
    """
    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.min_epochs = 0  # Lightning makes it 1 where `min_steps` is given, which is the whole run

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
    """Before the first step after a resume: make the validation that the checkpoint's step still lacks."""
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
    """What a validation found, and start anew.

    Args:
        losses: Of each set.
        data: The datamodule.

    Returns:
        By set the figures of its loss, and `tokens`, how many were predicted (`pairs` of answers); nats and tokens (or
        pairs) of all sets.
    """
    found, nats, total = {}, 0.0, 0.0
    for name, metric in losses.items():
        loss, tokens, *others = (float(value) for value in metric.compute())
        metric.reset()
        nats, total = nats + loss * tokens, total + tokens
        bytes_per_token = data.bytes_per_token(name) if isinstance(data, TokenData) else None
        found[name] = figures_of(metric, "", (loss, *others), bytes_per_token) | {metric.counted: tokens}
    return found, nats, total


def figures_to_log(found: dict[str, dict[str, float]], *, loss: float) -> dict[str, float]:
    """Figures of a validation by the names of their curves: one set's without its name, and the loss over all sets.

    Args:
        found: By set, see :func:`read_losses`.
        loss: Over all sets.
    """
    values: dict[str, float] = {}
    for name, figures in found.items():
        prefix = "val/" if len(found) == 1 else f"val/{name}/"
        values |= {prefix + figure: v for figure, v in figures.items() if figure not in ("tokens", "pairs")}
    return values | {"val/loss": loss}
