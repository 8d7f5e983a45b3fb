"""Assign sample numbers to the batches of each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class RankBatches:
    """Batch sampler of one rank: each batch of all ranks together is split into consecutive batches by rank.

    Args:
        first: Number of the first sample.
        count: Number of batches.
        skipped: Ranges of samples to skip, each with first and exclusive end, ascending.
        batch_size: Number of samples in each batch of a rank.
        num_replicas: Number of ranks that read different data.
        rank: Rank of this process among them.
    """

    def __init__(
        self,
        first: int,
        count: int,
        skipped: Sequence[Sequence[int]],
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
    ) -> None:
        self._first, self._count, self._batch_size = first, count, batch_size
        self._num_replicas, self._rank, self._skipped = num_replicas, rank, skipped

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        start = self._rank * self._batch_size
        for samples in self.global_batches():
            yield list(samples[start : start + self._batch_size])

    def global_batches(self) -> Iterator[Sequence[int]]:
        """Iterate over the batches of all ranks together, as ascending sample numbers."""
        sample, size = self._first, self._num_replicas * self._batch_size
        for _ in range(self._count):
            if not any(end > sample for _, end in self._skipped):
                yield range(sample, sample + size)
                sample += size
                continue
            chosen: list[int] = []
            while len(chosen) < size:
                for first, end in self._skipped:
                    sample = end if first <= sample < end else sample
                chosen.append(sample)
                sample += 1
            yield chosen
