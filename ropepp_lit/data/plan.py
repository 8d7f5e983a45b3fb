"""Order of the data: sample k of a run is a pure function of the seed, k and the sizes of the chunks.

A pass over the data permutes the chunks and reads them as one stream of tokens, cut into blocks. Blocks are permuted
within windows of a few chunks, so that a remote set is fetched a few chunks at a time. There is no stateful random
generator: permutations sort hashes, which do not depend on library versions. So the position in the data is one
integer, independent of the number of ranks and workers and of the batch size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PATTERN_SAMPLES = 1000
"""Number of samples over which a mixture's proportions are exact."""

WINDOW_CHUNKS = 8
"""Number of chunks within which blocks are shuffled."""


class ChunkSlice(NamedTuple):
    """A range of consecutive tokens of one chunk."""

    chunk: int
    """Index of the chunk."""
    start: int
    """Index of the first token in the chunk."""
    num_tokens: int
    """Number of tokens."""


class ShuffledChunks:
    """Order of a pass: chunks are permuted and read as one stream of units, and samples are shuffled within windows.

    Units are tokens for :class:`BlockPlan`, and rows for :class:`~ropepp_lit.data.packing.PackedPlan`.

    Args:
        sizes: Number of units in each chunk.
        step: Number of units from one sample to the next.
        samples: Number of samples of a pass.
        seed: Seed of the permutations; None means to read in the order of the chunks.
    """

    def __init__(self, sizes: Sequence[int], *, step: int, samples: int, seed: int | None) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._step, self._samples, self._seed = step, samples, seed
        self._pass: tuple[int, list[int], list[int]] | None = None
        self._window: tuple[int, int, int, np.ndarray] | None = None

    def order(self, epoch: int) -> tuple[list[int], list[int]]:
        """Return the chunks of a pass in order, and the start of each in the pass's stream of units (and the end)."""
        if self._pass is None or self._pass[0] != epoch:
            count = len(self._sizes)
            order = np.arange(count) if self._seed is None else permutation(count, self._seed, epoch)
            starts = np.concatenate(([0], np.cumsum(self._sizes[order])))
            self._pass = epoch, order.tolist(), starts.tolist()
        return self._pass[1], self._pass[2]

    def shuffle(self, epoch: int, number: int) -> int:
        """Return the index in the stream of a pass's sample `number`."""
        if self._seed is None:
            return number
        first, _, shuffled = self._find_window(epoch, number)
        return first + int(shuffled[number - first])

    def next_window(self, epoch: int, number: int) -> list[int]:
        """Return the chunks of the window after that of a sample, in reading order."""
        order, starts = self.order(epoch)
        first = (self._window_of(number, starts) + 1) * WINDOW_CHUNKS
        return order[first : first + WINDOW_CHUNKS]

    def _window_of(self, number: int, starts: list[int]) -> int:
        return (bisect_right(starts, number * self._step) - 1) // WINDOW_CHUNKS

    def _find_window(self, epoch: int, number: int) -> tuple[int, int, np.ndarray]:
        """Return the first sample of a sample's window, the window's end, and the order of its samples."""
        cached = self._window
        if cached is None or cached[0] != epoch or not cached[1] <= number < cached[2]:
            assert self._seed is not None
            _, starts = self.order(epoch)
            window = self._window_of(number, starts)
            first, end = (
                min(-(-starts[min(bound * WINDOW_CHUNKS, len(starts) - 1)] // self._step), self._samples)
                for bound in (window, window + 1)
            )
            cached = self._window = epoch, first, end, permutation(end - first, self._seed, epoch, window)
        return cached[1:]


class BlockPlan:
    """Plan of blocks of `context_length` + 1 tokens, in which each token is predicted once per pass.

    Adjacent blocks share one token: the last label of one is the first input of the next.

    Args:
        chunk_tokens: Number of tokens in each chunk.
        context_length: Number of input tokens of a block.
        seed: Seed of the permutations; None means to read in the order of the chunks, with a shorter last block.
    """

    def __init__(self, chunk_tokens: list[int], *, context_length: int, seed: int | None) -> None:
        self._context_length = context_length
        predicted = sum(chunk_tokens) - 1
        self.samples_per_pass = predicted // context_length if seed is not None else -(-predicted // context_length)
        """Number of samples of a pass over the data."""
        self._chunks = ShuffledChunks(chunk_tokens, step=context_length, samples=self.samples_per_pass, seed=seed)

    def locate(self, sample: int) -> list[ChunkSlice]:
        """Return the slices of a sample: `context_length` + 1 tokens, fewer at the end of an unshuffled pass.

        Args:
            sample: Number of the sample, from 0; each pass after the first is shuffled differently.
        """
        epoch, number = divmod(sample, self.samples_per_pass)
        order, starts = self._chunks.order(epoch)
        position = self._chunks.shuffle(epoch, number) * self._context_length
        end = min(position + self._context_length + 1, starts[-1])
        slices = []
        while position < end:
            index = bisect_right(starts, position) - 1
            stop = min(end, starts[index + 1])
            slices.append(ChunkSlice(order[index], position - starts[index], stop - position))
            position = stop
        return slices

    def next_chunks(self, sample: int) -> list[int]:
        """Return the chunks of the window after that of a sample, in reading order."""
        return self._chunks.next_window(*divmod(sample, self.samples_per_pass))


class Mixture:
    """Mixture of sources: the source of sample k of a run, and the sample's number within that source.

    A pattern of 1,000 samples contains each source in proportion to its weight, in an order that depends on the seed,
    and repeats: proportions are exact over every 1,000 samples.

    Args:
        weights: Weight of each source, above 0; they are normalized to sum to 1.
        seed: Seed of the pattern's order.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        exact = PATTERN_SAMPLES * np.asarray(weights, dtype=np.float64) / sum(weights)
        self._quotas = np.floor(exact).astype(np.int64)
        rounded_down = np.argsort(self._quotas - exact, kind="stable")
        self._quotas[rounded_down[: PATTERN_SAMPLES - self._quotas.sum()]] += 1
        self._pattern = np.repeat(np.arange(len(weights)), self._quotas)[permutation(PATTERN_SAMPLES, seed, -1)]
        self._before = np.zeros(PATTERN_SAMPLES, dtype=np.int64)
        for source in range(len(weights)):
            mask = self._pattern == source
            self._before[mask] = np.arange(mask.sum())

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the source of a sample, and the sample's number within that source."""
        repetition, index = divmod(sample, PATTERN_SAMPLES)
        source = int(self._pattern[index])
        return source, repetition * int(self._quotas[source]) + int(self._before[index])


def permutation(count: int, *key: int) -> np.ndarray:
    """Return a permutation of `count` numbers that depends only on the key: the order of their hashes.

    Args:
        count: Number of elements.
        key: Integers, such as the seed and the number of the pass.

    Returns:
        [count] int64.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _splitmix64(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return np.argsort(_splitmix64(np.arange(count, dtype=np.uint64) + state), kind="stable")


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """Apply a bijective hash to 64-bit integers (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
