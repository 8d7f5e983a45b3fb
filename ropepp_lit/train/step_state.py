"""State of the last optimizer step that a checkpoint stores in addition to weights and optimizer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from ropepp_lit.train.metrics import TokenLoss


class StepState:
    """Data position, token count and training loss as of the last optimizer step.

    A checkpoint can be saved after some micro-batches of the next step, which have changed the live values while
    weights, optimizer and schedule are still those of the last step. :meth:`record` does not synchronize with the
    device.
    """

    def __init__(self) -> None:
        self._position: list[dict[str, Any]] = []
        self._tokens_seen = 0
        self._train_loss: dict[str, Tensor] = {}

    def record(self, trainer: pl.Trainer, *, tokens_seen: int, train_loss: TokenLoss) -> None:
        """Record the state at the end of a step.

        Args:
            trainer: Trainer of the run.
            tokens_seen: Tokens that all ranks have read.
            train_loss: Metric since it was last logged, on this rank.
        """
        loader = trainer.fit_loop._combined_loader
        self._position = loader._state_dicts() if loader is not None else []
        self._tokens_seen = tokens_seen
        self._train_loss = {name: value.clone() for name, value in train_loss.states.items()}

    @property
    def position(self) -> dict[str, Any]:
        """Data position at the end of the step, see :meth:`~ropepp_lit.data.loader.TrainLoader.state_dict`."""
        return self._position[0]

    def since(self, train_loss: TokenLoss) -> dict[str, Tensor]:
        """Return the sums added to the loss on this rank since the recorded step."""
        return {name: value - self._train_loss[name] for name, value in train_loss.states.items()}

    def restore(self, train_loss: TokenLoss) -> None:
        """Reset the loss to its value at the recorded step."""
        for name, value in train_loss.states.items():
            value.copy_(self._train_loss[name])

    def save(self, checkpoint: dict[str, Any], trainer: pl.Trainer) -> dict[str, Any]:
        """Store the position in Lightning's part of a checkpoint, and return our entries. Every rank must call it."""
        if not self._train_loss:
            return {}
        if self._position:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = self._position
        train_loss = {
            name: trainer.strategy.reduce(value.clone(), reduce_op="sum").tolist()
            for name, value in self._train_loss.items()
        }
        return {"tokens_seen": self._tokens_seen, "train_loss": train_loss}


def recount_batches(checkpoint: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Set a checkpoint's count of micro-batches to its steps times the current `accumulate_grad_batches`."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False  # max_steps may have been raised
    batches = checkpoint["global_step"] * accumulate_grad_batches
    for counts in (progress["current"], progress["total"]):
        incomplete = counts["ready"] - counts["completed"]
        counts.update({"ready": batches, "started": batches, "processed": batches, "completed": batches - incomplete})
