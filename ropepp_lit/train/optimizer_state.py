"""Optimizer state at the start of a run: checks, loading from `init_from`, and applying the recipe's settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ropepp_lit.checkpoint import read_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.json_files import fits
from ropepp_lit.train.optimizer import OptimizerConfig, parts_of

_STATES: dict[str, dict[str, bool]] = {
    "AdamW": {"step": False, "exp_avg": True, "exp_avg_sq": True},
    "Muon": {"momentum_buffer": True},
}
"""States that torch's optimizers store per parameter, and whether they have the parameter's shape."""


def build_optimizer(
    config: OptimizerConfig, decoder: nn.Module, trainer: pl.Trainer
) -> tuple[torch.optim.Optimizer, list[dict[str, Any]]]:
    """Build a run's optimizer, which checks each state that it loads.

    Args:
        config: Settings of the optimizer.
        decoder: The model.
        trainer: Trainer of the run, which provides the checkpoint's path for errors.

    Returns:
        The optimizer, and the settings of its groups.
    """
    optimizer = config.build(decoder)

    def check(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        check_optimizer_state(optimizer, state, trainer.ckpt_path)

    optimizer.register_load_state_dict_pre_hook(check)
    return optimizer, [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def load_optimizer_state(trainer: pl.Trainer, path: str) -> None:
    """Load the optimizer state from another run's checkpoint in a single file. Every rank must call it."""
    state = read_checkpoint(path)["optimizer_states"][0]
    (optimizer,) = trainer.optimizers
    if hasattr(trainer.strategy, "load_optimizer_state"):  # FSDP2
        trainer.strategy.load_optimizer_state(optimizer, state, path)
    else:
        check_optimizer_state(optimizer, state, path)
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


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Any, path: str | Path | None) -> None:
    """Check that a state fits an optimizer's parameters; the tensors of a custom optimizer are not checked.

    Args:
        optimizer: Optimizer that loads the state.
        state: State as returned by `Optimizer.state_dict`.
        path: Path of the checkpoint.

    Raises:
        UsageError: groups, parameters, or shapes of tensors differ.
    """
    try:
        _check_fit(optimizer, state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from error


def _check_fit(optimizer: torch.optim.Optimizer, state: Any) -> None:
    groups = check_groups(state)
    sizes, expected = [len(keys) for keys in groups], [len(group["params"]) for group in optimizer.param_groups]
    if sizes != expected:
        raise ValueError(f"optimizer state has groups of {sizes} parameters instead of {expected}")
    if not all(type(part).__module__.startswith(("torch.", "ropepp_lit.")) for part in parts_of(optimizer)):
        return
    for keys, group in zip(groups, optimizer.param_groups, strict=True):
        names = _STATES["Muon" if "ns_steps" in group else "AdamW"]
        for key, parameter in zip(keys, group["params"], strict=True):
            values = state["state"].get(key)
            if values is None:  # a parameter that has had no gradient
                continue
            if missing := names.keys() - values.keys():
                raise ValueError(f"optimizer state has no {min(missing)} of parameter {key}")
            for name, has_shape in names.items():
                value, shape = values[name], parameter.shape if has_shape else torch.Size()
                if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != shape:
                    raise ValueError(f"{name} of parameter {key} is not a tensor of shape {tuple(shape)}")


def check_groups(state: Any) -> list[list[Any]]:
    """Check the form of an optimizer's state; return the keys of the parameters of each group.

    Raises:
        KeyError: a part is missing.
        ValueError: a part has another form, or the groups do not share the parameters among them.
    """
    if not fits(state, dict[str, Any]) or not fits(state["state"], dict[Any, dict[str, Any]]):
        raise ValueError("optimizer state is not a dictionary of parameters")
    groups = state["param_groups"]
    if not fits(groups, list[dict[str, Any]]) or not fits([group["params"] for group in groups], list[list[int | str]]):
        raise ValueError("optimizer state has no groups of parameters")
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) != len(keys) or not state["state"].keys() <= set(keys):
        raise ValueError("optimizer state belongs to parameters that are in no group or in two")
    return [group["params"] for group in groups]


def check_stored(state: dict[Any, dict[str, Any]]) -> None:
    """Raise ValueError if a tensor of an optimizer state is larger than its storage."""
    for key, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and (
                value.layout != torch.strided or value.numel() * value.itemsize > value.untyped_storage().nbytes()
            ):
                raise ValueError(f"{name[:50]} of parameter {key} is larger than what is stored of it")


def damaged(path: str | Path | None, error: Exception) -> UsageError:
    """Return the error for a checkpoint whose run state cannot be used."""
    problem = f"it has no {error}" if isinstance(error, KeyError) else f"its {error}"
    return UsageError(f"{path}: damaged: {problem}; set --ckpt_path to an older checkpoint")
