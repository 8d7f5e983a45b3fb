"""Options of the Trainer that are supported or refused: a run is a single epoch whose length is set in steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    Checkpoint,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from lightning.pytorch.callbacks.pruning import ModelPruning
from lightning.pytorch.loggers.logger import DummyLogger

from ropepp_lit.errors import UsageError

REFUSED_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_epochs": ((None, -1), "runs are counted in steps; set trainer.max_steps"),
    "min_epochs": ((None, 0), "runs are counted in steps; set trainer.min_steps"),
    "limit_train_batches": ((None, 1.0), "it would cut an optimizer step; set trainer.max_steps"),
    "overfit_batches": (
        (None, 0),
        "a run reads new batches in a fixed order; to overfit a few samples, use a small data.source and a larger "
        "trainer.max_steps",
    ),
    "check_val_every_n_epoch": ((None,), "runs are counted in steps; set trainer.val_check_interval"),
    "reload_dataloaders_every_n_epochs": ((None, 0), "a run is one epoch; leave it out"),
    "limit_test_batches": ((None, 1.0), "there is no test; measure by trainer.limit_val_batches or evaluate"),
    "limit_predict_batches": ((None, 1.0), "there is nothing to predict; use generate"),
    "enable_checkpointing": (
        (None, True),
        "a run always saves its last step; for no other checkpoints set checkpoints.every_n_steps above "
        "trainer.max_steps",
    ),
    "barebones": ((None, False), "a run always saves and logs; for speed set trainer.logger false"),
    "use_distributed_sampler": ((None, False), "the data loader distributes samples over ranks; leave it out"),
    "sync_batchnorm": ((None, False), "the models have no batch norm; leave it out"),
    "model_registry": ((None,), "checkpoints are files; leave it out"),
}
"""Options of the Trainer that are refused: the values that are allowed, and what to do instead."""

SUPPORTED_OPTIONS = {
    "accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "fast_dev_run", "max_steps",
    "min_steps", "max_time", "limit_val_batches", "val_check_interval", "num_sanity_val_steps", "log_every_n_steps",
    "enable_progress_bar", "enable_model_summary", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "deterministic", "benchmark", "inference_mode", "profiler", "detect_anomaly", "plugins",
    "default_root_dir", "enable_autolog_hparams",
}  # fmt: skip
"""All other options of the Trainer, which work as in Lightning's documentation."""

_AT_LEAST = {
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 1,
    "num_nodes": 1,
    "fast_dev_run": 0,
    "gradient_clip_val": 0,
}

_REFUSED_CALLBACKS: dict[type[Callback], str] = {
    WeightAveraging: "samples, evaluations and the last checkpoint would have other weights than validation; lower the "
    "learning rate at the end of the run instead, as WarmupStableDecay does",
    StochasticWeightAveraging: "it averages by epochs, and a run is one; let the learning rate decay instead, as "
    "WarmupStableDecay does",
    GradientAccumulationScheduler: "a run is one epoch; set trainer.accumulate_grad_batches",
    BatchSizeFinder: "it changes the batch size of the recipe; let plan estimate the memory, and set data.batch_size",
    LearningRateFinder: "it trains before the run begins; set model.optimizer.lr",
    ModelPruning: "it replaces the parameters that checkpoints and exports store",
}


def check_options(trainer: Any) -> None:
    """Check the options of the Trainer, and convert callbacks and plugins to lists.

    Args:
        trainer: Options of the Trainer with their classes instantiated; modified in place.

    Raises:
        UsageError: an option or a callback is refused, or a number is too small.
    """
    for key in ("callbacks", "plugins"):
        value = trainer.get(key)
        trainer[key] = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    for key, (allowed, remedy) in REFUSED_OPTIONS.items():
        value = trainer.get(key)
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed) or (
            key.startswith("limit_") and isinstance(value, int)  # 1 is one batch, 1.0 is all
        ):
            raise UsageError(f"trainer.{key}: {remedy}")
    for key, least in _AT_LEAST.items():
        if trainer.get(key) is not None and trainer[key] < least:
            raise UsageError(f"trainer.{key}: {trainer[key]} must be {least} or more")
    if trainer.min_steps is not None and trainer.min_steps > trainer.max_steps > 0:
        raise UsageError(f"trainer.min_steps: {trainer.min_steps} is above trainer.max_steps {trainer.max_steps}")
    interval = trainer.val_check_interval
    if interval is not None and (not isinstance(interval, int) or isinstance(interval, bool) or interval < 1):
        raise UsageError(
            f"trainer.val_check_interval: {interval} must be a number of batches, 1 or more; leave it empty to "
            "validate at the end, or set trainer.limit_val_batches to 0 for no validation"
        )
    for callback in trainer.callbacks:
        for kind, remedy in _REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise UsageError(f"trainer.callbacks: {type(callback).__name__} is not supported: {remedy}")
        if isinstance(callback, Timer) and callback._interval != "step":
            raise UsageError("trainer.callbacks: Timer: a run is one epoch; set interval to step")


def dry_run(trainer: Any) -> dict[str, Any]:
    """Return the Trainer's options for `fast_dev_run`: N steps and validation batches, with nothing written.

    Lightning's implementation is not used because it disables gradient accumulation.

    Args:
        trainer: See :func:`check_options`.
    """
    return {
        "fast_dev_run": False,
        "max_steps": int(trainer.fast_dev_run),
        "min_steps": None,
        "limit_val_batches": int(trainer.fast_dev_run),
        "val_check_interval": None,
        "num_sanity_val_steps": 0,
        "logger": DummyLogger(),  # callbacks such as LearningRateMonitor require a logger
        "profiler": None,
        "callbacks": [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)],
    }


def has_progress_bar(callbacks: list[Callback]) -> bool:
    """Return whether the user's callbacks include a progress bar."""
    return any(isinstance(callback, ProgressBar) for callback in callbacks)


def check_folders(callbacks: list[Callback], folder: Path) -> None:
    """Raise UsageError if a user's checkpoint callback saves into the folder of the run's checkpoints."""
    for callback in callbacks:
        dirpath = getattr(callback, "dirpath", None) if isinstance(callback, Checkpoint) else None
        if dirpath is not None and Path(dirpath).resolve() == folder.resolve():
            raise UsageError(
                f"trainer.callbacks: {type(callback).__name__}: {folder} is where the run saves its own checkpoints; "
                "choose another dirpath"
            )
