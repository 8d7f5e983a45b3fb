"""Checks of the run state in a checkpoint that a run continues from: progress, schedule and optimizer state.

A checkpoint can be damaged or written by another tool. Lightning and torch do not check its values: a wrong shape
in the state of a fused optimizer ends the process, and a missing count restarts it at 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.json_files import fits
from ropepp_lit.train.optimizer_state import check_groups, check_stored, damaged

_COUNTS: dict[str, Any] = {key: {"ready": 0, "completed": 0} for key in ("total", "current")}
_PROGRESS: dict[str, dict[str, Any]] = {
    "epoch_loop.batch_progress": {**_COUNTS, "is_last_batch": False},
    "epoch_loop.scheduler_progress": _COUNTS,
    "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": _COUNTS, "zero_grad": _COUNTS}},
    "epoch_loop.manual_optimization.optim_step_progress": _COUNTS,
    "epoch_loop.val_loop.batch_progress": {**_COUNTS, "is_last_batch": False},
    "epoch_progress": _COUNTS,
    "epoch_loop.state_dict": {},
}
"""Counts that Lightning's fit loop loads, with example values of their types."""


def read_run(path: str | Path, *, checksums: bool = False) -> dict[str, Any]:
    """Read a checkpoint that a run continues from, with the shapes of its weights, and check its run state.

    Args:
        path: A .ckpt file, or a .ckpt folder of shards.
        checksums: See :func:`~ropepp_lit.checkpoint.read_checkpoint`.

    Raises:
        UsageError: the checkpoint cannot be read, or a value that the run continues with is missing or not of its type.
    """
    checkpoint = read_checkpoint(path, shapes_only=True, checksums=checksums)
    if checkpoint[KEY].get("optimizer") is None:  # weights only
        return checkpoint
    try:
        _check_progress(checkpoint)
        for state in checkpoint.get("optimizer_states", ()):  # shards have it in their own files
            check_groups(state)
            check_stored(state["state"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise damaged(path, error) from error
    return checkpoint


def _check_progress(checkpoint: dict[str, Any]) -> None:
    """Check counts, data position and schedule."""
    step, loop = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
    for name, expected in _PROGRESS.items():
        _check_counts(loop[name], expected, name)
    counted = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if step != counted:
        raise ValueError(f"global_step is {_shown(step)}, and the steps counted are {counted}")
    if not fits(checkpoint["epoch"], int):
        raise ValueError(f"epoch is {_shown(checkpoint['epoch'])}")
    for name, value in loop.items():
        if name.endswith("state_dict") and not fits(value, dict[str, Any]):
            raise ValueError(f"{name} is {_shown(value)}")
    (schedule,) = checkpoint["lr_schedulers"]
    for name, hint in (("base_lrs", list[float]), ("lr_lambdas", list[dict[str, Any] | None]), ("last_epoch", int)):
        if not fits(schedule[name], hint):
            raise ValueError(f"{name} of the schedule is {_shown(schedule[name])}")
    if schedule["last_epoch"] != step:
        raise ValueError(f"schedule is at step {schedule['last_epoch']:,}, and global_step is {step:,}")
    if not fits(checkpoint.get("callbacks", {}), dict[str, dict[str, Any]]):
        raise ValueError(f"state of callbacks is {_shown(checkpoint['callbacks'])}")
    positions = loop["state_dict"].get("combined_loader", [])
    if not isinstance(positions, list) or not all(map(_is_position, positions)):
        raise ValueError(f"position in the data is {_shown(positions)}")


def _is_position(state: Any) -> bool:
    """Return whether a value is a data position of ours, or the state of a user's data loader."""
    if not isinstance(state, dict) or "identity" not in state:
        return isinstance(state, dict)
    identity = state["identity"]
    if not isinstance(identity, dict) or not {"contents", "sources"} & identity.keys():
        return False
    rows = identity.get("contents", [])
    return (
        fits(state["samples"], int)
        and 0 <= state["samples"] < 2**63
        and fits(rows, list[list[str | float]])
        and all([isinstance(value, str) for value in row] == [True, False] for row in rows)
        and fits(state.get("skipped", []), list[list[int]])
    )


def _check_counts(values: Any, expected: dict[str, Any], name: str) -> None:
    """Check that all counts are present and none is negative."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {_shown(values)}")
    for key in expected.keys() | values.keys():
        value = values[key]
        if isinstance(expected.get(key), dict):
            _check_counts(value, expected[key], f"{name}.{key}")
        elif type(value) is not type(expected.get(key, 0)) or value < 0:
            raise ValueError(f"{name}.{key} is {_shown(value)}")


def _shown(value: Any) -> str:
    return repr(str(value)[:80]) if not isinstance(value, int | float) else f"{value:,}"[:80]
