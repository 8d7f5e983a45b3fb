"""Optimizer state at the start of a run: loading it from `init_from`, and applying the recipe's settings to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from ropepp_lit.checkpoint import read_checkpoint
from ropepp_lit.train.fsdp import FSDP2Strategy


def load_optimizer_state(trainer: pl.Trainer, path: str) -> None:
    """Load the optimizer state from another run's checkpoint in a single file. Every rank must call it."""
    state = read_checkpoint(path)["optimizer_states"][0]
    (optimizer,) = trainer.optimizers
    if isinstance(trainer.strategy, FSDP2Strategy):
        trainer.strategy.load_optimizer_state(optimizer, state)
    else:
        optimizer.load_state_dict(state)


def apply_recipe(trainer: pl.Trainer, groups: list[dict[str, Any]], lr_factor: Callable[[int], float]) -> None:
    """Restore the recipe's optimizer settings, which Lightning has replaced by those stored in the checkpoint.

    Args:
        trainer: Trainer of the run.
        groups: The recipe's settings of each parameter group, with the peak learning rate.
        lr_factor: Multiplier of the peak learning rate at a step.
    """
    for optimizer, config in zip(trainer.optimizers, trainer.lr_scheduler_configs, strict=True):
        for group, recipe in zip(optimizer.param_groups, groups, strict=True):
            group.update(recipe, initial_lr=recipe["lr"])
            group["lr"] = recipe["lr"] * lr_factor(trainer.global_step)
        config.scheduler.base_lrs = [recipe["lr"] for recipe in groups]
