"""Preference tuning in a training run: the loss of pairs of answers, and the reference that the loss uses."""

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
"""Entry of a checkpoint: `keys` [pairs] int64 and `log_probabilities` [pairs, 2] float64, see :class:`Reference`."""


class Reference:
    """Log-probabilities of answers under the model at the start of a run.

    They are indexed by the keys of :class:`~ropepp_lit.data.batch.AnswerPairs`, so they do not depend on the order of
    the pairs. Checkpoints store them: 24 bytes per pair.

    Args:
        keys: [pairs] int64.
        log_probabilities: [pairs, 2] float64, in nats.
    """

    def __init__(self, keys: np.ndarray, log_probabilities: np.ndarray) -> None:
        self._keys, first = np.unique(keys, return_index=True)
        self._log_probabilities = log_probabilities[first]

    def __len__(self) -> int:
        return len(self._keys)

    def look_up(self, keys: Sequence[int]) -> Tensor:
        """Return the log-probabilities of pairs, [P, 2] float64 on the CPU.

        Raises:
            UsageError: a key is unknown.
        """
        queries = np.asarray(keys, dtype=np.int64)
        indices = np.minimum(np.searchsorted(self._keys, queries), max(len(self) - 1, 0))
        if len(queries) and (not len(self) or (self._keys[indices] != queries).any()):
            raise UsageError(
                "data: it contains pairs of answers that were not there when the run started, so they have no "
                "reference; start another run by --model.init_from"
            )
        return torch.from_numpy(self._log_probabilities[indices])

    def entry(self) -> dict[str, Tensor]:
        """Return the entry of a checkpoint."""
        return {
            "keys": torch.from_numpy(self._keys),
            "log_probabilities": torch.from_numpy(self._log_probabilities),
        }

    @classmethod
    def from_entry(cls, entry: dict[str, Tensor]) -> Reference:
        """Create the reference from the entry of a checkpoint.

        Raises:
            UsageError: the entry is damaged.
        """
        try:
            keys, log_probabilities = entry["keys"].numpy(), entry["log_probabilities"].numpy()
            dtypes_and_shape = keys.dtype, log_probabilities.dtype, log_probabilities.shape
            if dtypes_and_shape == (np.int64, np.float64, (len(keys), 2)):
                return cls(keys, log_probabilities)
        except (KeyError, TypeError, AttributeError):
            pass
        raise UsageError(f"ckpt_path: its entry {ENTRY} is damaged; start another run by --model.init_from")


class PairTraining:
    """Additions of preference tuning to a run; does nothing without a preference.

    Args:
        preference: Loss of pairs; None means that the data are not pairs.

    Raises:
        UsageError: a setting of the preference is out of range.
    """

    def __init__(self, preference: Preference | None) -> None:
        if preference is not None:
            preference.check()
        self.preference = preference
        self.reference: Reference | None = None

    def check(self, data: Any, *, init_from: str | None, checkpoint: dict[str, Any] | None, path: str) -> None:
        """Check that the data match the loss, and that a reference is stored or can be computed.

        Args:
            data: The datamodule, set up.
            init_from: `init_from` of the recipe.
            checkpoint: Checkpoint that is continued or validated.
            path: Path of the checkpoint.

        Raises:
            UsageError: the data do not match the loss, or there is no reference.
        """
        holds_pairs = isinstance(data, TokenData) and data.holds_pairs
        if self.preference is None:
            if holds_pairs:
                raise UsageError(
                    "model.preference: the data are pairs of answers; choose their loss: DPO, SimPO or ORPO"
                )
            return
        if not holds_pairs:
            raise UsageError(
                "model.preference: the data are not pairs of answers; prepare them by ropepp-lit prepare --format "
                "chat_pairs (or completion_pairs), or leave it out"
            )
        if not self.preference.reads_reference:
            return
        if checkpoint is None and init_from is None:
            raise UsageError("model.preference: DPO starts from a fine-tuned model; set model.init_from")
        if checkpoint is not None and ENTRY not in checkpoint[KEY]:
            raise UsageError(
                f"ckpt_path: {path} stores no reference for model.preference; initialize from its weights by "
                f"--model.init_from {path}"
            )

    def create_metric(self) -> TokenLoss:
        """Create a metric of the loss."""
        return TokenLoss() if self.preference is None else PairLoss()

    def loss(self, decoder: Decoder, batch: Batch, metric: TokenLoss) -> Tensor:
        """Return the loss of a batch, summed over its pairs; adds the pairs that this rank counts to a metric.

        Args:
            decoder: The model.
            batch: Batch with pairs.
            metric: Metric created by :meth:`create_metric`.
        """
        assert self.preference is not None
        assert batch.pairs is not None
        assert isinstance(metric, PairLoss)
        preference, pairs = self.preference, batch.pairs
        reference = None
        if preference.reads_reference:
            assert self.reference is not None, "compute_reference runs before the first step"
            reference = self.reference.look_up(pairs.keys).to(exact_dtype(batch.labels.device))
            reference = reference.to(batch.labels.device, non_blocking=True)

        def summed_loss(losses: Tensor) -> Tensor:
            if not pairs.keys:
                return losses.sum()  # 0
            sums = _sums_of_answers(losses, pairs, decoder)
            values, rewards = preference(sums, pairs.num_tokens, reference)
            metric.add(values.detach(), rewards.detach(), pairs.is_counted)
            return values.sum()

        return batch.loss(decoder, summed_loss)

    @torch.no_grad()
    def compute_reference(self, trainer: pl.Trainer, decoder: Decoder, stop: StopRequest | None) -> None:
        """Compute the reference of all pairs, before the first step. Every rank must call it.

        Args:
            trainer: Trainer of the run, with its datamodule; stopped on a signal.
            decoder: The model before the first step.
            stop: Recorder of signals.
        """
        if self.preference is None or not self.preference.reads_reference or self.reference is not None:
            return
        loaders: list[DataLoader] = trainer.datamodule.pair_dataloaders()  # type: ignore[attr-defined]
        keys: list[int] = []
        log_probabilities: list[Tensor] = []
        shows = trainer.is_global_zero and trainer.progress_bar_callback is not None
        bar = progress_bar("Reference", unit="batches", total=sum(map(len, loaders)), show=shows)
        was_training = decoder.training
        decoder.eval()  # disables the dropout of adapters
        with bar, trainer.precision_plugin.val_step_context():
            for batch in (batch for loader in loaders for batch in loader):
                batch = trainer.strategy.batch_to_device(batch)
                assert batch.pairs is not None
                sums = batch.loss(decoder, partial(_sums_of_answers, pairs=batch.pairs, decoder=decoder))
                keys += batch.pairs.keys
                log_probabilities.append(sums.double().cpu())
                bar.update()
                if stop is not None and stop.agree():
                    trainer.should_stop = True
                    return
        decoder.train(was_training)
        own = np.asarray(keys, dtype=np.int64), torch.cat(log_probabilities).numpy()
        gathered = [own]
        if trainer.world_size > 1:
            gathered = [own] * trainer.world_size
            dist.all_gather_object(gathered, own)
        self.reference = Reference(*(np.concatenate(parts) for parts in zip(*gathered, strict=True)))

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Store the reference in a checkpoint."""
        if self.reference is not None:
            checkpoint[KEY][ENTRY] = self.reference.entry()

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Load the reference from a checkpoint."""
        if self.preference is not None and ENTRY in checkpoint[KEY]:
            self.reference = Reference.from_entry(checkpoint[KEY][ENTRY])


def _sums_of_answers(losses: Tensor, pairs: AnswerPairs, decoder: Decoder) -> Tensor:
    """Return the log-probabilities of answers, summed over their tokens on all ranks that share rows.

    Args:
        losses: [M] floating: cross-entropy of this rank's labels.
        pairs: P pairs.
        decoder: The model.

    Returns:
        [P, 2], float64 if the device supports it. Gradients are those of this rank's tokens.
    """
    if not pairs.keys:
        return losses.new_zeros((0, 2))
    exact = losses.to(exact_dtype(losses.device))
    # index_add is not deterministic on a GPU. unsafe=True skips a check of the lengths that synchronizes.
    sums = -torch.segment_reduce(exact, "sum", lengths=pairs.lengths, unsafe=True, initial=0)
    if decoder.context_group is not None:
        total = sums.detach().clone()
        dist.all_reduce(total, group=decoder.context_group.process_group)
        sums = sums + (total - sums.detach())
    return sums.view(-1, 2)
