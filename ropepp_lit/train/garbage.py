"""Callback that runs Python's garbage collector on every rank at the same steps."""

from __future__ import annotations

import gc
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

_EVERY_N_STEPS = 50


class GarbageCollection(Callback):
    """Collects garbage every 50 optimizer steps instead of automatically, so that ranks do not delay one another.

    Objects that exist when training starts are excluded from collections (`gc.freeze`), which makes them short.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Disable automatic collection."""
        self._step = trainer.global_step
        gc.disable()
        gc.collect()
        gc.freeze()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Collect at the end of every 50th step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._step % _EVERY_N_STEPS == 0:
                gc.collect()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect the garbage of a validation."""
        if not gc.isenabled():
            gc.collect()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enable automatic collection again."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Enable automatic collection again."""
        self._restore()

    @staticmethod
    def _restore() -> None:
        if not gc.isenabled():
            gc.unfreeze()
            gc.enable()
