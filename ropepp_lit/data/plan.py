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


class BlockPlan:
    """Blocks of `context_length` + 1 tokens over chunks, each token predicted once per pass.

    Neighbouring blocks share one token: the last label of one is the first input of the next.

    Args:
        chunk_tokens: Tokens in each chunk.
        context_length: Tokens that a model reads at once.
        seed: Of the permutations; None reads in the order of the chunks, and the last block may be shorter.
    """

    def __init__(self, chunk_tokens: list[int], *, context_length: int, seed: int | None) -> None:
        self._chunk_tokens = np.asarray(chunk_tokens, dtype=np.int64)
        self._context_length, self._seed = context_length, seed
        self._pass: tuple[int, list[int], list[int]] | None = None
        self._window: tuple[int, int, int, np.ndarray] | None = None
        predicted = int(self._chunk_tokens.sum()) - 1
        self.blocks_per_pass = predicted // context_length if seed is not None else -(-predicted // context_length)
        """Samples before the data come again."""

    def locate(self, sample: int) -> list[Span]:
        """The tokens of a sample, in order: `context_length` + 1 of them, fewer at the end of an unshuffled pass.

        Args:
            sample: k, from 0; beyond one pass the next begins, shuffled anew.
        """
        epoch, block = divmod(sample, self.blocks_per_pass)
        order, starts = self._chunk_order(epoch)
        if self._seed is not None:
            first, _, shuffled = self._find_window(epoch, block)
            block = first + int(shuffled[block - first])
        position = block * self._context_length
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
        epoch, block = divmod(sample, self.blocks_per_pass)
        order, starts = self._chunk_order(epoch)
        behind = (self._window_of(block, starts) + 1) * WINDOW_CHUNKS
        return order[behind : behind + WINDOW_CHUNKS]

    def _chunk_order(self, epoch: int) -> tuple[list[int], list[int]]:
        """The chunks of a pass in order, and where each starts in the pass's stream of tokens (and its end)."""
        if self._pass is None or self._pass[0] != epoch:
            count = len(self._chunk_tokens)
            order = np.arange(count) if self._seed is None else permutation(count, self._seed, epoch)
            starts = np.concatenate(([0], np.cumsum(self._chunk_tokens[order])))
            self._pass = epoch, order.tolist(), starts.tolist()
        return self._pass[1], self._pass[2]

    def _window_of(self, block: int, starts: list[int]) -> int:
        return (bisect_right(starts, block * self._context_length) - 1) // WINDOW_CHUNKS

    def _find_window(self, epoch: int, block: int) -> tuple[int, int, np.ndarray]:
        """First block of the window that holds a block, the end of the window, and the order of its blocks."""
        found = self._window
        if found is None or found[0] != epoch or not found[1] <= block < found[2]:
            assert self._seed is not None
            _, starts = self._chunk_order(epoch)
            window = self._window_of(block, starts)
            first, end = (
                min(
                    -(-starts[min(bound * WINDOW_CHUNKS, len(starts) - 1)] // self._context_length),
                    self.blocks_per_pass,
                )
                for bound in (window, window + 1)
            )
            found = self._window = epoch, first, end, permutation(end - first, self._seed, epoch, window)
        return found[1:]


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
