"""The optimizer's state where a run begins or goes on: what a checkpoint gives, and what the recipe decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from ropepp_lit.checkpoint import read_checkpoint
from ropepp_lit.train.fsdp import FSDP2Strategy


def load_optimizer_state(trainer: pl.Trainer, path: str) -> None:
    """Load the optimizer's state of another run's checkpoint, in one file; every rank must call this."""
    state = read_checkpoint(path)["optimizer_states"][0]
    (optimizer,) = trainer.optimizers
    if isinstance(trainer.strategy, FSDP2Strategy):
        trainer.strategy.load_optimizer_state(optimizer, state)
    else:
        optimizer.load_state_dict(state)


def apply_recipe(trainer: pl.Trainer, groups: list[dict[str, Any]], lr_factor: Callable[[int], float]) -> None:
    """Give the optimizer the recipe's settings again, which Lightning has replaced by those of the checkpoint's run.

    Args:
        trainer: Of the run.
        groups: Settings of each of the optimizer's groups by the recipe, with the peak learning rate.
        lr_factor: What the peak is multiplied by at a step.
    """
    for optimizer, config in zip(trainer.optimizers, trainer.lr_scheduler_configs, strict=True):
        for group, recipe in zip(optimizer.param_groups, groups, strict=True):
            group.update(recipe, initial_lr=recipe["lr"])
            group["lr"] = recipe["lr"] * lr_factor(trainer.global_step)
        config.scheduler.base_lrs = [recipe["lr"] for recipe in groups]
