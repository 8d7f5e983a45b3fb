"""Which tokens are sample k of a run: a pure function of the seed, k and the sizes of the chunks.

A pass over the data permutes the chunks and reads them as one stream of tokens, cut into blocks; blocks are permuted
within windows of a few chunks, so that a remote set is fetched a few chunks at a time. Nothing is drawn from a
generator with a state: permutations sort hashes, the same with every version of every library. So the position in the
data is one integer, whatever the number of ranks, workers and the batch size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PATTERN_SAMPLES = 1000
"""Samples over which a mixture's shares are exact."""

WINDOW_CHUNKS = 8
"""Chunks in which blocks are shuffled together."""


class Span(NamedTuple):
    """Consecutive tokens of one chunk."""

    chunk: int
    start: int
    num_tokens: int


class ShuffledChunks:
    """The order of a pass: chunks are permuted and read as one stream of units, samples are shuffled within windows.

    Units are tokens for :class:`BlockPlan`, and rows for :class:`~ropepp_lit.data.packing.PackedPlan`.

    Args:
        sizes: Units in each chunk.
        step: Units from one sample to the next.
        samples: Of a pass.
        seed: Of the permutations; None reads in the order of the chunks.
    """

    def __init__(self, sizes: Sequence[int], *, step: int, samples: int, seed: int | None) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._step, self._samples, self._seed = step, samples, seed
        self._pass: tuple[int, list[int], list[int]] | None = None
        self._window: tuple[int, int, int, np.ndarray] | None = None

    def order(self, epoch: int) -> tuple[list[int], list[int]]:
        """The chunks of a pass in order, and where each starts in the pass's stream of units (and its end)."""
        if self._pass is None or self._pass[0] != epoch:
            count = len(self._sizes)
            order = np.arange(count) if self._seed is None else permutation(count, self._seed, epoch)
            starts = np.concatenate(([0], np.cumsum(self._sizes[order])))
            self._pass = epoch, order.tolist(), starts.tolist()
        return self._pass[1], self._pass[2]

    def shuffle(self, epoch: int, number: int) -> int:
        """Which sample of the stream is read as a pass's sample of that number."""
        if self._seed is None:
            return number
        first, _, shuffled = self._find_window(epoch, number)
        return first + int(shuffled[number - first])

    def behind(self, epoch: int, number: int) -> list[int]:
        """Chunks of the window that follows the one of a sample, in the order in which they are read."""
        order, starts = self.order(epoch)
        behind = (self._window_of(number, starts) + 1) * WINDOW_CHUNKS
        return order[behind : behind + WINDOW_CHUNKS]

    def _window_of(self, number: int, starts: list[int]) -> int:
        return (bisect_right(starts, number * self._step) - 1) // WINDOW_CHUNKS

    def _find_window(self, epoch: int, number: int) -> tuple[int, int, np.ndarray]:
        """First sample of the window that holds a sample, the end of the window, and the order of its samples."""
        found = self._window
        if found is None or found[0] != epoch or not found[1] <= number < found[2]:
            assert self._seed is not None
            _, starts = self.order(epoch)
            window = self._window_of(number, starts)
            first, end = (
                min(-(-starts[min(bound * WINDOW_CHUNKS, len(starts) - 1)] // self._step), self._samples)
                for bound in (window, window + 1)
            )
            found = self._window = epoch, first, end, permutation(end - first, self._seed, epoch, window)
        return found[1:]


class BlockPlan:
    """Blocks of `context_length` + 1 tokens over chunks, each token predicted once per pass.

    Neighbouring blocks share one token: the last label of one is the first input of the next.

    Args:
        chunk_tokens: Tokens in each chunk.
        context_length: Tokens that a model reads at once.
        seed: Of the permutations; None reads in the order of the chunks, and the last block may be shorter.
    """

    def __init__(self, chunk_tokens: list[int], *, context_length: int, seed: int | None) -> None:
        self._context_length = context_length
        predicted = sum(chunk_tokens) - 1
        self.samples_per_pass = predicted // context_length if seed is not None else -(-predicted // context_length)
        """Samples before the data come again."""
        self._chunks = ShuffledChunks(chunk_tokens, step=context_length, samples=self.samples_per_pass, seed=seed)

    def locate(self, sample: int) -> list[Span]:
        """The tokens of a sample, in order: `context_length` + 1 of them, fewer at the end of an unshuffled pass.

        Args:
            sample: k, from 0; beyond one pass the next begins, shuffled anew.
        """
        epoch, number = divmod(sample, self.samples_per_pass)
        order, starts = self._chunks.order(epoch)
        position = self._chunks.shuffle(epoch, number) * self._context_length
        end = min(position + self._context_length + 1, starts[-1])
        spans = []
        while position < end:
            place = bisect_right(starts, position) - 1
            stop = min(end, starts[place + 1])
            spans.append(Span(order[place], position - starts[place], stop - position))
            position = stop
        return spans

    def chunks_behind(self, sample: int) -> list[int]:
        """Chunks of the window that follows the one of a sample, in the order in which they are read."""
        return self._chunks.behind(*divmod(sample, self.samples_per_pass))


class Mixture:
    """Which source sample k of a run is read from, and its number among the samples of that source.

    A pattern of 1,000 samples holds each source as often as its weight says, in an order that depends on the seed, and
    comes again and again: shares are exact over every 1,000 samples.

    Args:
        weights: One for each source, above 0; they are divided by their sum.
        seed: Of the pattern's order.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        exact = PATTERN_SAMPLES * np.asarray(weights, dtype=np.float64) / sum(weights)
        self._quotas = np.floor(exact).astype(np.int64)
        rounded_down = np.argsort(self._quotas - exact, kind="stable")
        self._quotas[rounded_down[: PATTERN_SAMPLES - self._quotas.sum()]] += 1
        self._pattern = np.repeat(np.arange(len(weights)), self._quotas)[permutation(PATTERN_SAMPLES, seed, -1)]
        self._before = np.zeros(PATTERN_SAMPLES, dtype=np.int64)
        for source in range(len(weights)):
            places = self._pattern == source
            self._before[places] = np.arange(places.sum())

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and the sample's number within it."""
        round_, place = divmod(sample, PATTERN_SAMPLES)
        source = int(self._pattern[place])
        return source, round_ * int(self._quotas[source]) + int(self._before[place])


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of `count` numbers that depends on the key alone: the order of their hashes.

    Args:
        count: How many numbers.
        key: Integers, such as the seed and the number of the pass.

    Returns:
        [count] int64.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _splitmix64(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return np.argsort(_splitmix64(np.arange(count, dtype=np.uint64) + state), kind="stable")


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """A bijective hash of 64-bit integers (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
