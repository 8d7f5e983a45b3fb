"""Checkpoints that a kill at any moment leaves whole."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from ropepp_lit.errors import UsageError
from ropepp_lit.train.signals import StopRequest

LAST = "last.ckpt"


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step=N.ckpt` in the run's folder, and keeps the link `checkpoints/last.ckpt` on the newest.

    A checkpoint is written beside its name, flushed to the disk and renamed; then the link is replaced in one step;
    only then are old ones deleted. The last step of a run is always saved, and so is the step at which a signal
    (SIGTERM, SIGUSR1, Ctrl-C) stops it.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: Newest checkpoints that are kept; older ones are deleted. 0 keeps all.
    """

    def __init__(self, *, every_n_steps: int = 1000, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise UsageError(f"checkpoints.every_n_steps: {every_n_steps} must be 1 or more")
        if keep < 0:
            raise UsageError(f"checkpoints.keep: {keep} must be 0 (all) or more")
        self.every_n_steps, self.keep = every_n_steps, keep
        self._saved_step = self._seen_step = 0
        self._lacks_figures = False
        self.stop = StopRequest()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals, and remove what a killed run left half-written."""
        self.stop.install()
        if trainer.is_global_zero:
            for path in folder_of(trainer.default_root_dir).glob(".*.partial"):
                _remove(path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step that the run continues from is saved already."""
        self._saved_step = self._seen_step = trainer.global_step
        self.stop.install()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save at the end of every so many optimizer steps, and the last one before it is validated."""
        step = trainer.global_step
        if step == self._seen_step:
            return  # gradients accumulate
        self._seen_step = step
        if self.stop.agree():
            trainer.should_stop, trainer.limit_val_batches = True, 0  # save now, validate another time
        elif step % self.every_n_steps == 0 or step >= trainer.max_steps:
            self._save(trainer)
            is_sharded = getattr(trainer.strategy, "_save_distributed_checkpoint", False)
            self._lacks_figures = step >= trainer.max_steps and not is_sharded  # a file is replaced in one step

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """A signal ends the validation within a run."""
        if trainer.state.fn == "fit" and self.stop.agree():
            raise StopIteration  # Lightning's evaluation loop ends with it

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step, whatever the interval is, with what its validation found."""
        if trainer.global_step != self._saved_step or self._lacks_figures:
            self._save(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self.stop.uninstall()

    def _save(self, trainer: pl.Trainer) -> None:
        step = self._saved_step = trainer.global_step
        folder = folder_of(trainer.default_root_dir)
        path = folder / f"step={step}.ckpt"
        partial = folder / f".{path.name}.partial"
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            _flush(partial)
            os.replace(partial, path)
            link = folder / f".{LAST}.partial"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, folder / LAST)
            _flush(folder)
            steps = sorted(saved_steps(folder))
            for old in steps[: -self.keep] if self.keep else []:
                if old < step:
                    _remove(folder / f"step={old}.ckpt")
        trainer.strategy.barrier("checkpoint")


def folder_of(run_folder: str | Path) -> Path:
    """Where a run's checkpoints are."""
    return Path(run_folder) / "checkpoints"


def saved_steps(folder: Path) -> list[int]:
    """Steps whose checkpoints are whole, in any order."""
    matches = (re.fullmatch(r"step=(\d+)\.ckpt", path.name) for path in folder.glob("step=*.ckpt"))
    return [int(match[1]) for match in matches if match]


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None where there is none."""
    steps = saved_steps(folder)
    return folder / f"step={max(steps)}.ckpt" if steps else None


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder with its files, to the disk before anything that follows."""
    for part in path.iterdir() if path.is_dir() and path.name.endswith(".partial") else ():
        _flush(part)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
