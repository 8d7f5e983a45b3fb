"""What a checkpoint stores beside weights and optimizer: all of it belongs to the newest optimizer step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from ropepp_lit.train.metrics import TokenLoss


class StepState:
    """Position in the data, tokens and training loss of the newest optimizer step.

    Micro-batches of the next step change them while weights, optimizer and schedule are still those of the newest step.
    Nothing here waits for the device before a checkpoint is saved.
    """

    def __init__(self) -> None:
        self._position: list[dict[str, Any]] = []
        self._tokens_seen = 0
        self._train_loss: dict[str, Tensor] = {}

    def note(self, trainer: pl.Trainer, *, tokens_seen: int, train_loss: TokenLoss) -> None:
        """Note the state at the end of a step.

        Args:
            trainer: Of the run.
            tokens_seen: Tokens that all ranks have read.
            train_loss: Since it was last logged, on this rank.
        """
        loader = trainer.fit_loop._combined_loader
        self._position = loader._state_dicts() if loader is not None else []
        self._tokens_seen = tokens_seen
        self._train_loss = {name: value.clone() for name, value in train_loss.states.items()}

    @property
    def position(self) -> dict[str, Any]:
        """In the data at the end of the newest step, of :meth:`~ropepp_lit.data.loader.TrainLoader.state_dict`."""
        return self._position[0]

    def since(self, train_loss: TokenLoss) -> dict[str, Tensor]:
        """What was added to the loss after the newest step, on this rank."""
        return {name: value - self._train_loss[name] for name, value in train_loss.states.items()}

    def restore(self, train_loss: TokenLoss) -> None:
        """Take out of the loss what came after the newest step."""
        for name, value in train_loss.states.items():
            value.copy_(self._train_loss[name])

    def write(self, checkpoint: dict[str, Any], trainer: pl.Trainer) -> dict[str, Any]:
        """Put the position into Lightning's part of a checkpoint; returns entries of ours. Every rank must call it."""
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
    """Let a checkpoint's count of micro-batches be that of its steps, as the recipe accumulates them now."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False  # the run may go on beyond the steps it was first meant to take
    batches = checkpoint["global_step"] * accumulate_grad_batches
    for counts in (progress["current"], progress["total"]):
        behind = counts["ready"] - counts["completed"]
        counts.update({"ready": batches, "started": batches, "processed": batches, "completed": batches - behind})
