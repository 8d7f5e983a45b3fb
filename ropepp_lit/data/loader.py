"""Data loaders: batches of a whole run with a resumable position, and of validation sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from ropepp_lit.data.batch import Batch
from ropepp_lit.data.comparison import continued_at
from ropepp_lit.data.sampler import RankBatches
from ropepp_lit.data.samples import Samples
from ropepp_lit.nn.context_parallel import ContextShard


class TrainLoader:
    """Stateful loader of the batches of a complete run.

    Its length is that of the run, so that Lightning neither prefetches a batch nor starts a second epoch. Its state is
    the number of samples that all ranks together have read or skipped, which is equal on all ranks.

    Args:
        samples: Samples of the training split.
        batch_size: Number of samples in each batch of a rank.
        num_batches: Number of batches of the run.
        num_replicas: Number of ranks that read different data.
        rank: Rank of this process among them.
        identity: Identity of the data, see :func:`~ropepp_lit.data.comparison.identity_of`.
        skipped: Ranges of samples to skip, each with first and exclusive end; a checkpoint's are added.
        loading: Arguments of :func:`make_loader`.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        num_batches: int,
        num_replicas: int,
        rank: int,
        identity: dict[str, Any],
        skipped: Sequence[Sequence[int]] = (),
        **loading: Any,
    ) -> None:
        self._samples, self._batch_size, self._num_batches = samples, batch_size, num_batches
        self._replica = {"num_replicas": num_replicas, "rank": rank}
        self._identity, self._loading = identity, loading
        self._skipped = sorted(map(list, skipped))
        self.samples = 0
        """Number of samples read or skipped by all ranks together."""

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        batches = RankBatches(
            self.samples, self._num_batches, self._skipped, batch_size=self._batch_size, **self._replica
        )
        for batch, samples in zip(
            make_loader(self._samples, batches, **self._loading), batches.global_batches(), strict=True
        ):
            self.samples = samples[-1] + 1
            yield batch

    def state_dict(self) -> dict:
        """Return the position in the data."""
        skipped = {"skipped": self._skipped} if self._skipped else {}
        return {"samples": self.samples, "identity": self._identity, **skipped}

    def load_state_dict(self, state: dict) -> None:
        """Resume at a checkpoint's position, as decided by :func:`~ropepp_lit.data.comparison.continued_at`."""
        self.samples, reason_for_restart = continued_at(state, self._identity)
        if not reason_for_restart:
            self._skipped += [each for each in state.get("skipped", ()) if each not in self._skipped]
            self._skipped.sort()


def make_loader(
    samples: Samples, batches: RankBatches, *, num_workers: int, shard: ContextShard | None, pin_memory: bool
) -> DataLoader:
    """Create a loader of batches.

    Args:
        samples: Samples of a split.
        batches: Sampler of the batches.
        num_workers: Number of worker processes that prefetch batches.
        shard: Tokens of a row that this rank computes; None means all.
        pin_memory: Whether to return batches in pinned memory, for asynchronous copies to the GPU.
    """
    collate = partial(samples.collate, shard=shard)
    return DataLoader(
        samples, batch_sampler=batches, num_workers=num_workers, collate_fn=collate, pin_memory=pin_memory
    )


def replica_of(trainer: Trainer) -> dict[str, int]:
    """Return `num_replicas`, the number of ranks that read different data, and the `rank` of this process."""
    return trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
