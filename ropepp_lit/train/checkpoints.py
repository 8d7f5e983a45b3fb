"""Saving of a run's checkpoints: the callback that decides when, their folder, and which of them is the newest."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from ropepp_lit.checkpoint import read_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.checkpoint_writer import (
    CheckpointWriter,
    checkpoint_path,
    point_last_at,
    remove,
    remove_partial,
    saved_steps,
    step_of,
)
from ropepp_lit.train.disk_space import DiskSpace
from ropepp_lit.train.metric_logging import flush
from ropepp_lit.train.run_log import RunLog
from ropepp_lit.train.run_state import read_run
from ropepp_lit.train.signals import StopRequest, disable_lightnings_broadcast


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step=N.ckpt` in the run's folder, and links `checkpoints/last.ckpt` to the newest one.

    A checkpoint is written under a hidden name, flushed to disk and renamed; then the link is replaced, and finally
    old checkpoints are deleted. The last step of a run is always saved. A signal (SIGTERM, SIGUSR1, Ctrl-C) stops the
    run after the current micro-batch, or the next one with multiple processes, and saves the last optimizer step:
    gradients of an incomplete step are discarded, and its micro-batches are read again when the run continues.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: Number of newest checkpoints to keep; older ones are deleted. 0 keeps all.
        async_save: Continue training while a checkpoint is written. Requires CPU memory for a copy of weights and
            optimizer state: of each rank's shards, or of all of them on rank 0 if checkpoints are single files.
    """

    def __init__(self, *, every_n_steps: int = 1000, keep: int = 2, async_save: bool = False) -> None:
        if every_n_steps < 1:
            raise UsageError(f"checkpoints.every_n_steps: {every_n_steps} must be 1 or more")
        if keep < 0:
            raise UsageError(f"checkpoints.keep: {keep} must be 0 (all) or more")
        self.every_n_steps, self.keep, self.async_save = every_n_steps, keep, async_save
        self.stop = StopRequest()
        self._writer = CheckpointWriter(in_background=async_save, keep=keep, report=self._report)
        self._run_log, self._disk_space = RunLog(), DiskSpace(keep)
        self._saved_step = self._seen_step = 0
        self.is_dry_run = False
        """Whether saving is disabled; set by the command."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers, and delete partial files of a killed run."""
        self.stop.install()
        assert isinstance(pl_module, CausalLM)
        pl_module.stop, self._run_log = self.stop, pl_module.run_log
        disable_lightnings_broadcast(trainer)
        if trainer.is_global_zero and not self.is_dry_run:
            remove_partial(folder_of(trainer.default_root_dir))
        self._writer.open()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the step from which the run continues as saved."""
        self._saved_step = self._seen_step = trainer.global_step
        self._writer.set_first_step(trainer.global_step)
        self.stop.install()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save every `every_n_steps` optimizer steps, and the last step before its validation."""
        step = trainer.global_step
        is_end_of_step = step != self._seen_step  # False while gradients accumulate
        self._seen_step = step
        if self.stop.agree(failed=self._writer.has_failed):
            self._stop(trainer)
        elif is_end_of_step and (step % self.every_n_steps == 0 or step >= trainer.max_steps):
            assert isinstance(pl_module, CausalLM)
            pl_module.log_training()
            self._save(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """End a validation during training on a signal; it is repeated when the run continues."""
        if trainer.state.fn == "fit" and self.stop.agree(failed=self._writer.has_failed):
            self._stop(trainer)
            assert isinstance(pl_module, CausalLM)
            pl_module.drop_validation()
            raise StopIteration  # ends Lightning's evaluation loop

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step regardless of the interval, with the results of its validation."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)
        elif trainer.global_step >= trainer.max_steps:
            self.add_validation(trainer, pl_module)
        self._writer.close()

    def add_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the results of its validation to the checkpoint of the last step. Every rank must call it."""
        assert isinstance(pl_module, CausalLM)
        if not self.is_dry_run and pl_module.validated_step == pl_module.steps_taken:
            path = checkpoint_path(folder_of(trainer.default_root_dir), pl_module.steps_taken)
            self._writer.add_validation(path, pl_module.last_validation)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the signal handlers."""
        self.stop.uninstall()

    def saved_before(self, trainer: pl.Trainer, step: int) -> list[int]:
        """Return the earlier steps with a valid checkpoint, after the current write. Every rank must call it."""
        self._writer.wait()
        folder = folder_of(trainer.default_root_dir)
        steps = [saved for saved in sorted(saved_steps(folder)) if saved < step]
        valid = [saved for saved in steps if _is_valid(checkpoint_path(folder, saved), checksums=True)]
        return trainer.strategy.broadcast(valid)

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk. Every rank must call it."""
        self._writer.close()

    def _stop(self, trainer: pl.Trainer) -> None:
        """End the run without another validation; :meth:`on_train_end` saves."""
        trainer.fit_loop.epoch_loop.min_steps = None  # otherwise it prevents the stop
        if self.stop.failed:
            self._writer.wait()  # raises
        if self.stop.received is not None:
            self._run_log.write("signal", step=trainer.global_step, signal=signal.Signals(self.stop.received).name)
        trainer.should_stop, trainer.limit_val_batches = True, 0

    def _save(self, trainer: pl.Trainer) -> None:
        step = self._saved_step = trainer.global_step
        if self.is_dry_run:
            return
        flush(trainer.loggers)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        path = checkpoint_path(folder_of(trainer.default_root_dir), step)
        self._writer.save(checkpoint, path, is_sharded=_is_sharded(trainer), live=_live_tensors(trainer))

    def _report(self, path: Path, size: int, seconds: float) -> None:
        """Log a completed checkpoint and check the disk space; called on rank 0, possibly by the writer's thread."""
        step, saved = step_of(path) or 0, len(saved_steps(path.parent))
        self._run_log.write("save", step=step, path=str(path), bytes=size, seconds=round(seconds, 3))
        self._disk_space.check(path.parent, size=size, saved=saved, step=step, run_log=self._run_log)


def _is_sharded(trainer: pl.Trainer) -> bool:
    return getattr(trainer.strategy, "_save_distributed_checkpoint", False)


def _live_tensors(trainer: pl.Trainer) -> list[Tensor]:
    """Return the weights, buffers and optimizer states of this rank."""
    module = trainer.lightning_module
    states = (
        value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()
    )
    tensors = [*module.parameters(), *module.buffers(), *(value for value in states if isinstance(value, Tensor))]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def folder_of(run_folder: str | Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(run_folder) / "checkpoints"


def newest(folder: Path, *, checksums: bool = False) -> Path | None:
    """Return the newest valid checkpoint, or None if there is none.

    Args:
        folder: Folder of the checkpoints, see :func:`folder_of`.
        checksums: See :func:`~ropepp_lit.checkpoint.read_checkpoint`.
    """
    paths = (checkpoint_path(folder, step) for step in sorted(saved_steps(folder), reverse=True))
    return next((path for path in paths if _is_valid(path, checksums=checksums)), None)


def delete_later(path: Path) -> list[Path]:
    """Make a checkpoint the newest one: point `last.ckpt` at it, and delete and return those of later steps."""
    point_last_at(path)
    later = later_checkpoints(path.parent, path)
    for other in later:
        remove(other)
    return later


def later_checkpoints(folder: Path, path: Path | None) -> list[Path]:
    """Return the checkpoints of later steps than that of `path`; None returns all.

    Those after the newest valid one are damaged, and are kept until their steps are saved again.
    """
    first = -1 if path is None else step_of(path)
    assert first is not None
    return [checkpoint_path(folder, step) for step in sorted(saved_steps(folder)) if step > first]


def _is_valid(path: Path, *, checksums: bool) -> bool:
    try:
        read_run(path, checksums=checksums)
    except UsageError:
        return False
    return True


def check_folder(folder: Path, ckpt_path: str | None) -> None:
    """Check that a folder contains no checkpoints other than those that the run continues.

    Otherwise `--ckpt_path auto` would later load the wrong ones, and `keep` would delete them.

    Args:
        folder: Folder of the checkpoints, see :func:`folder_of`.
        ckpt_path: Checkpoint from which the run continues, or None.

    Raises:
        UsageError: the folder contains checkpoints, and `ckpt_path` is none of them, or older than the newest valid
            one.
    """
    steps = saved_steps(folder)
    if not steps:
        return
    hint = "continue it by --ckpt_path auto, or choose another --trainer.default_root_dir"
    if ckpt_path is None or Path(ckpt_path).resolve().parent != folder.resolve():
        raise UsageError(f"{folder} holds checkpoints of an earlier run (step {max(steps)}); {hint}")
    step = read_checkpoint(ckpt_path, shapes_only=True)["global_step"]
    for newer in sorted((other for other in steps if other > step), reverse=True):
        if _is_valid(checkpoint_path(folder, newer), checksums=True):
            raise UsageError(f"ckpt_path: {ckpt_path} is step {step}, and {folder} holds step {newer}; {hint}")
