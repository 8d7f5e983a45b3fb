"""Which conversations make up row k of a run: whole ones packed into rows, a pure function of seed, k and lengths.

Each chunk is packed by itself, best-fit decreasing: conversations from the longest to the shortest, each into the row
with the least room that still holds it. That depends on lengths alone, so a pass has the same number of rows as any
other. Passes differ in two ways: rows are permuted as :class:`~ropepp_lit.data.plan.BlockPlan` permutes blocks, and
conversations of equal length change places, so that a row holds others. The position in the data stays one integer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from typing import Literal, NamedTuple

import numpy as np

from ropepp_lit.data.plan import WINDOW_CHUNKS, ShuffledChunks, Span, permutation
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.data.trained_tokens import is_trained

TooLong = Literal["drop", "cut"]
"""What becomes of conversations that are longer than a row: they are left out, or their beginning is kept."""

PADDING_LENGTH = 128
"""Tokens of a document of padding at most: attention over many short ones costs less than over one long one."""


class Lengths(NamedTuple):
    """Conversations of a split, by chunk, and what of them fits into rows."""

    starts: list[np.ndarray]
    """Of each chunk: [documents] int64, each one's first token in the chunk."""

    kept: list[np.ndarray]
    """Of each chunk: [documents] int64, the tokens that are read from its beginning; 0 where it is left out."""

    shortest: int
    """Tokens of the shortest one."""

    longest: int
    """Tokens of the longest one."""

    too_long: int
    """Those of more tokens than a row has places."""

    untrained: int
    """Those of them that were cut and kept no trained token, so that they are left out."""

    @classmethod
    def read(cls, shards: TokenShards, *, places: int, too_long: TooLong) -> Lengths:
        """Find the bounds of all conversations; reads each chunk's header, and cut conversations.

        Args:
            shards: That mark trained tokens. A remote set is fetched.
            places: Tokens of a row.
            too_long: What becomes of conversations of more tokens.

        Raises:
            UsageError: a chunk is damaged, or cannot be fetched.
        """
        all_starts, all_kept, all_lengths, num_long, untrained = [], [], [], 0, 0
        for index in range(len(shards.chunks)):
            tokens, offsets = shards.open_chunk(index)
            bounds = (offsets.astype(np.int64) - int(offsets[0])) // tokens.itemsize
            starts, lengths = bounds[:-1], np.diff(bounds)
            all_lengths += [int(lengths.min()), int(lengths.max())]
            long = np.flatnonzero(lengths > places)
            num_long += len(long)
            lengths[long] = 0
            if too_long == "cut":
                for document in long:
                    start = starts[document]
                    if is_trained(tokens[start + 1 : start + places]).any():  # the first token is never predicted
                        lengths[document] = places
                    else:
                        untrained += 1
            all_starts.append(starts)
            all_kept.append(lengths)
        return cls(all_starts, all_kept, min(all_lengths), max(all_lengths), num_long, untrained)


class _PackedChunk(NamedTuple):
    """How a chunk's conversations fill rows. N conversations from the longest to the shortest."""

    slots: np.ndarray
    """[N] int64: the conversations, in that order, of one row after the other."""

    bounds: np.ndarray
    """[rows + 1] int64: where rows start among the slots, and the end."""


class PackedPlan:
    """Rows of whole conversations, each read once per pass.

    Args:
        lengths: Of the conversations.
        places: Tokens of a row.
        seed: Of the permutations; None reads rows in the order in which they were packed.
    """

    def __init__(self, lengths: Lengths, *, places: int, seed: int | None) -> None:
        self.lengths, self.places, self._seed = lengths, places, seed
        self._packed = [_pack(kept, places) for kept in lengths.kept]
        rows = [len(chunk.bounds) - 1 for chunk in self._packed]
        self.samples_per_pass = sum(rows)
        """Rows before the data come again."""
        self.documents = sum(len(chunk.slots) for chunk in self._packed)
        """Conversations of a pass."""
        self.tokens = sum(int(kept.sum()) for kept in lengths.kept)
        """Tokens of a pass, without padding."""
        self._chunks = ShuffledChunks(rows, step=1, samples=self.samples_per_pass, seed=seed)
        self._placed: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def padding(self) -> float:
        """Share of the places of all rows that hold no token."""
        return 1 - self.tokens / (self.samples_per_pass * self.places)

    def locate(self, sample: int) -> list[Span]:
        """The conversations of a row: `places` tokens together, or fewer.

        Args:
            sample: k, from 0; beyond one pass the next begins, shuffled anew.
        """
        epoch, number = divmod(sample, self.samples_per_pass)
        order, starts = self._chunks.order(epoch)
        row = self._chunks.shuffle(epoch, number)
        place = bisect_right(starts, row) - 1
        chunk, row = order[place], row - starts[place]
        first, end = self._packed[chunk].bounds[row : row + 2]
        documents = self._documents(epoch, chunk)[first:end]
        return [
            Span(chunk, start, num_tokens)
            for start, num_tokens in zip(
                self.lengths.starts[chunk][documents].tolist(),
                self.lengths.kept[chunk][documents].tolist(),
                strict=True,
            )
        ]

    def chunks_behind(self, sample: int) -> list[int]:
        """Chunks of the window that follows the one of a sample, in the order in which they are read."""
        return self._chunks.behind(*divmod(sample, self.samples_per_pass))

    def _documents(self, epoch: int, chunk: int) -> np.ndarray:
        """Numbers of a chunk's conversations in a pass, of one row after the other."""
        key = epoch, chunk
        if key not in self._placed:
            kept = self.lengths.kept[chunk]
            documents = np.flatnonzero(kept)
            if self._seed is not None:  # four numbers, where windows have three
                documents = documents[permutation(len(documents), self._seed, epoch, chunk, 0)]
            falling = documents[np.argsort(-kept[documents], kind="stable")]
            self._placed[key] = falling[self._packed[chunk].slots]
            if len(self._placed) > 2 * WINDOW_CHUNKS:
                self._placed.popitem(last=False)
        self._placed.move_to_end(key)
        return self._placed[key]


def _pack(kept: np.ndarray, places: int) -> _PackedChunk:
    falling = -np.sort(-kept[kept > 0])
    rows = best_fit_decreasing(falling, places)
    counts = np.bincount(rows)
    return _PackedChunk(np.argsort(rows, kind="stable"), np.concatenate(([0], np.cumsum(counts))))


def best_fit_decreasing(lengths: np.ndarray, places: int) -> np.ndarray:
    """Pack documents into rows: each into the row with the least room that holds it, else into a new one.

    Documents of equal length are placed together, and rows with equal room are filled together, so that a million
    documents take seconds.

    Args:
        lengths: [documents] integers from the largest to the smallest, each 1 to `places`.
        places: Of a row.

    Returns:
        [documents] int64: the row of each, from 0.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    rooms: list[int] = []  # of open rows, rising
    rows_with: dict[int, list[np.ndarray]] = {}
    placed = [np.empty(0, dtype=np.int64)]
    num_rows = 0

    def keep(rows: np.ndarray, room: int) -> None:
        """Rows stay open if they have room."""
        if not room or not len(rows):
            return
        if room not in rows_with:
            insort(rooms, room)
            rows_with[room] = []
        rows_with[room].append(rows)

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            index = bisect_left(rooms, size)
            if index < len(rooms):
                room = rooms.pop(index)
                rows = np.concatenate(rows_with.pop(room))
            else:
                room, needed = places, -(-left // (places // size))
                rows = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            each = room // size  # what a row holds: once it has one of them it has the least room of all
            full = min(len(rows), left // each)
            placed.append(np.repeat(rows[:full], each))
            keep(rows[:full], room - each * size)
            left -= full * each
            if full < len(rows):
                placed.append(np.repeat(rows[full : full + 1], left))
                keep(rows[full : full + 1], room - left * size)
                keep(rows[full + 1 :], room)
                left = 0
    return np.concatenate(placed)
