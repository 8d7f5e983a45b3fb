"""What preference tuning adds to a run: the loss of pairs of answers, and the reference that it compares with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from ropepp_lit.checkpoint import KEY
from ropepp_lit.data.batch import AnswerPairs, Batch
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder
from ropepp_lit.terminal import progress_bar
from ropepp_lit.train.metrics import PairLoss, TokenLoss, exact_dtype
from ropepp_lit.train.preference import Preference
from ropepp_lit.train.signals import StopRequest

ENTRY = "reference"
"""Of a checkpoint: `keys` [pairs] int64 and `log_probabilities` [pairs, 2] float64, see :class:`Reference`."""


class Reference:
    """Log-probabilities of answers by the model that a run began with.

    They are found by the keys of :class:`~ropepp_lit.data.batch.AnswerPairs`, so they do not depend on the order of the
    pairs, and a checkpoint carries them: 24 bytes for each pair.

    Args:
        keys: [pairs] int64.
        log_probabilities: [pairs, 2] float64: nats.
    """

    def __init__(self, keys: np.ndarray, log_probabilities: np.ndarray) -> None:
        self._keys, first = np.unique(keys, return_index=True)
        self._log_probabilities = log_probabilities[first]

    def __len__(self) -> int:
        return len(self._keys)

    def look_up(self, keys: Sequence[int]) -> Tensor:
        """[P, 2] float64 on the CPU.

        Raises:
            UsageError: a pair is not among them.
        """
        wanted = np.asarray(keys, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._keys, wanted), max(len(self) - 1, 0))
        if len(wanted) and (not len(self) or (self._keys[places] != wanted).any()):
            raise UsageError(
                "data: it holds pairs of answers that were not there when the run began, so their reference is not "
                "known; begin another run by --model.init_from"
            )
        return torch.from_numpy(self._log_probabilities[places])

    def entry(self) -> dict[str, Tensor]:
        """What a checkpoint stores."""
        return {
            "keys": torch.from_numpy(self._keys),
            "log_probabilities": torch.from_numpy(self._log_probabilities),
        }

    @classmethod
    def from_entry(cls, entry: dict[str, Tensor]) -> Reference:
        """Of what :meth:`entry` returned.

        Raises:
            UsageError: it is something else.
        """
        try:
            keys, found = entry["keys"].numpy(), entry["log_probabilities"].numpy()
            if (keys.dtype, found.dtype, found.shape) == (np.int64, np.float64, (len(keys), 2)):
                return cls(keys, found)
        except (KeyError, TypeError, AttributeError):
            pass
        raise UsageError(f"ckpt_path: its entry {ENTRY} is damaged; begin another run by --model.init_from")


class PairTraining:
    """What pairs of answers add to a run; without a preference nothing.

    Args:
        preference: The loss; None means that the data are no pairs.

    Raises:
        UsageError: a setting of it makes no sense.
    """

    def __init__(self, preference: Preference | None) -> None:
        if preference is not None:
            preference.check()
        self.preference = preference
        self.reference: Reference | None = None

    def check(self, data: Any, *, init_from: str | None, checkpoint: dict[str, Any] | None, path: str) -> None:
        """Check that data and loss belong together, and that there is or will be a reference.

        Args:
            data: The datamodule, set up.
            init_from: Of the recipe.
            checkpoint: Of the run that goes on, or is validated.
            path: Of it.

        Raises:
            UsageError: they do not.
        """
        holds_pairs = isinstance(data, TokenData) and data.holds_pairs
        if self.preference is None:
            if holds_pairs:
                raise UsageError(
                    "model.preference: the data hold pairs of answers; choose the loss of these: DPO, SimPO or ORPO"
                )
            return
        if not holds_pairs:
            raise UsageError(
                "model.preference: the data hold no pairs of answers; make them by ropepp-lit prepare --format "
                "chat_pairs (or completion_pairs), or leave it out"
            )
        if not self.preference.reads_reference:
            return
        if checkpoint is None and init_from is None:
            raise UsageError("model.preference: DPO begins with a model that answers; name it by model.init_from")
        if checkpoint is not None and ENTRY not in checkpoint[KEY]:
            raise UsageError(
                f"ckpt_path: {path} stores no reference for model.preference; begin from its weights by "
                f"--model.init_from {path}"
            )

    def new_loss(self) -> TokenLoss:
        """The metric of a set's loss."""
        return TokenLoss() if self.preference is None else PairLoss()

    def loss(self, decoder: Decoder, batch: Batch, metric: TokenLoss) -> Tensor:
        """The loss of a batch to be descended, summed over its pairs; adds those that this rank counts to a metric.

        Args:
            decoder: The model.
            batch: With pairs.
            metric: Of :meth:`new_loss`.
        """
        assert self.preference is not None
        assert batch.pairs is not None
        assert isinstance(metric, PairLoss)
        preference, pairs = self.preference, batch.pairs
        reference = None
        if preference.reads_reference:
            assert self.reference is not None, "a run begins with the reference"
            reference = self.reference.look_up(pairs.keys).to(exact_dtype(batch.labels.device))
            reference = reference.to(batch.labels.device, non_blocking=True)

        def summed(losses: Tensor) -> Tensor:
            if not pairs.keys:
                return losses.sum()  # 0
            sums = _sums_of_answers(losses, pairs, decoder)
            values, rewards = preference(sums, pairs.num_tokens, reference)
            metric.add(values.detach(), rewards.detach(), pairs.is_counted)
            return values.sum()

        return batch.loss(decoder, summed)

    @torch.no_grad()
    def find_reference(self, trainer: pl.Trainer, decoder: Decoder, stop: StopRequest | None) -> None:
        """Before the first step: measure all pairs by the model as it is. Every rank must call it.

        Args:
            trainer: Of the run, with its datamodule. A signal makes it stop.
            decoder: As it is before the first step.
            stop: What notes signals.
        """
        if self.preference is None or not self.preference.reads_reference or self.reference is not None:
            return
        loaders: list[DataLoader] = trainer.datamodule.pair_dataloaders()  # type: ignore[attr-defined]
        keys: list[int] = []
        found: list[Tensor] = []
        shows = trainer.is_global_zero and trainer.progress_bar_callback is not None
        bar = progress_bar("Reference", unit="batches", total=sum(map(len, loaders)), show=shows)
        was_training = decoder.training
        decoder.eval()  # without the dropout of adapters
        with bar, trainer.precision_plugin.val_step_context():
            for batch in (batch for loader in loaders for batch in loader):
                batch = trainer.strategy.batch_to_device(batch)
                assert batch.pairs is not None
                sums = batch.loss(decoder, partial(_sums_of_answers, pairs=batch.pairs, decoder=decoder))
                keys += batch.pairs.keys
                found.append(sums.double().cpu())
                bar.update()
                if stop is not None and stop.agree():
                    trainer.should_stop = True
                    return
        decoder.train(was_training)
        here = np.asarray(keys, dtype=np.int64), torch.cat(found).numpy()
        gathered = [here]
        if trainer.world_size > 1:
            gathered = [here] * trainer.world_size
            dist.all_gather_object(gathered, here)
        self.reference = Reference(*(np.concatenate(parts) for parts in zip(*gathered, strict=True)))

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the reference into a checkpoint."""
        if self.reference is not None:
            checkpoint[KEY][ENTRY] = self.reference.entry()

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference of a checkpoint."""
        if self.preference is not None and ENTRY in checkpoint[KEY]:
            self.reference = Reference.from_entry(checkpoint[KEY][ENTRY])


def _sums_of_answers(losses: Tensor, pairs: AnswerPairs, decoder: Decoder) -> Tensor:
    """Log-probabilities of answers, summed over their tokens on all ranks that share rows.

    Args:
        losses: [M] floating: cross-entropy of this rank's labels.
        pairs: P pairs.
        decoder: The model.

    Returns:
        [P, 2], float64 where the device has it. Gradients are those of this rank's tokens.
    """
    if not pairs.keys:
        return losses.new_zeros((0, 2))
    exact = losses.to(exact_dtype(losses.device))
    # Sums by index_add are of another order each time on a GPU. unsafe: lengths are not compared on the host.
    sums = -torch.segment_reduce(exact, "sum", lengths=pairs.lengths, unsafe=True, initial=0)
    if decoder.context_group is not None:
        everywhere = sums.detach().clone()
        dist.all_reduce(everywhere, group=decoder.context_group.process_group)
        sums = sums + (everywhere - sums.detach())
    return sums.view(-1, 2)
