"""Packing of complete conversations into rows: row k of a run is a pure function of seed, k and lengths.

Each chunk is packed separately, by best-fit decreasing: conversations from the longest to the shortest, each into the
row with the least remaining space that fits it. This depends only on lengths, so all passes have the same number of
rows. Passes differ in two ways: rows are permuted as :class:`~ropepp_lit.data.plan.BlockPlan` permutes blocks, and
conversations of equal length are exchanged, so that rows contain different ones. The data position is one integer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from typing import Literal, NamedTuple

import numpy as np

from ropepp_lit.data.plan import WINDOW_CHUNKS, ChunkSlice, ShuffledChunks, permutation
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.data.trained_tokens import is_trained

TooLong = Literal["drop", "cut"]
"""Handling of conversations that are longer than a row: skip them, or keep_open their beginning."""

PADDING_LENGTH = 128
"""Maximum length of a padding document: attention over many short documents is cheaper than over a long one."""


class Lengths(NamedTuple):
    """Lengths of a split's conversations by chunk, and how much of each is read."""

    starts: list[np.ndarray]
    """For each chunk: [documents] int64, index of each document's first token in the chunk."""

    kept: list[np.ndarray]
    """For each chunk: [documents] int64, number of tokens read of each document; 0 if it is skipped."""

    shortest: int
    """Number of tokens of the shortest conversation."""

    longest: int
    """Number of tokens of the longest conversation."""

    too_long: int
    """Number of conversations that are longer than a row."""

    untrained: int
    """Number of those that have no trained token after truncation, so that they are skipped."""

    @classmethod
    def read(cls, shards: TokenShards, *, row_length: int, too_long: TooLong) -> Lengths:
        """Find the lengths of all conversations; reads each chunk's header, and truncated conversations.

        Args:
            shards: Shards that mark trained tokens. A remote set is fetched.
            row_length: Number of tokens of a row.
            too_long: Handling of longer conversations.

        Raises:
            UsageError: A chunk is damaged, or cannot be fetched.
        """
        all_starts, all_kept, all_lengths, num_long, untrained = [], [], [], 0, 0
        for index in range(len(shards.chunks)):
            tokens, offsets = shards.open_chunk(index)
            bounds = (offsets.astype(np.int64) - int(offsets[0])) // tokens.itemsize
            starts, lengths = bounds[:-1], np.diff(bounds)
            all_lengths += [int(lengths.min()), int(lengths.max())]
            long = np.flatnonzero(lengths > row_length)
            num_long += len(long)
            lengths[long] = 0
            if too_long == "cut":
                for document in long:
                    start = starts[document]
                    if is_trained(tokens[start + 1 : start + row_length]).any():  # the first token is never predicted
                        lengths[document] = row_length
                    else:
                        untrained += 1
            all_starts.append(starts)
            all_kept.append(lengths)
        return cls(all_starts, all_kept, min(all_lengths), max(all_lengths), num_long, untrained)


class _PackedChunk(NamedTuple):
    """Rows of a chunk's N conversations, which are sorted from the longest to the shortest."""

    slots: np.ndarray
    """[N] int64: index of each conversation in the sorted order, grouped by row."""

    bounds: np.ndarray
    """[rows + 1] int64: start of each row in `slots`, and the end."""


class PackedPlan:
    """Plan of rows of complete conversations, each read once per pass.

    Args:
        lengths: Lengths of the conversations.
        row_length: Number of tokens of a row.
        seed: Seed of the permutations; None means to read rows in the order in which they were packed.
    """

    def __init__(self, lengths: Lengths, *, row_length: int, seed: int | None) -> None:
        self.lengths, self.row_length, self._seed = lengths, row_length, seed
        self._packed = [_pack(kept, row_length) for kept in lengths.kept]
        rows = [len(chunk.bounds) - 1 for chunk in self._packed]
        self.samples_per_pass = sum(rows)
        """Number of rows of a pass over the data."""
        self.documents = sum(len(chunk.slots) for chunk in self._packed)
        """Number of conversations of a pass."""
        self.tokens = sum(int(kept.sum()) for kept in lengths.kept)
        """Number of tokens of a pass, without padding."""
        self._chunks = ShuffledChunks(rows, step=1, samples=self.samples_per_pass, seed=seed)
        self._row_documents: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def padding(self) -> float:
        """Fraction of padding in all rows."""
        return 1 - self.tokens / (self.samples_per_pass * self.row_length)

    def locate(self, sample: int) -> list[ChunkSlice]:
        """Return the slices of a row's conversations: `row_length` tokens in total, or fewer.

        Args:
            sample: Number of the row, from 0; each pass after the first is shuffled differently.
        """
        epoch, number = divmod(sample, self.samples_per_pass)
        order, starts = self._chunks.order(epoch)
        row = self._chunks.shuffle(epoch, number)
        index = bisect_right(starts, row) - 1
        chunk, row = order[index], row - starts[index]
        first, end = self._packed[chunk].bounds[row : row + 2]
        documents = self._documents(epoch, chunk)[first:end]
        return [
            ChunkSlice(chunk, start, num_tokens)
            for start, num_tokens in zip(
                self.lengths.starts[chunk][documents].tolist(),
                self.lengths.kept[chunk][documents].tolist(),
                strict=True,
            )
        ]

    def next_chunks(self, sample: int) -> list[int]:
        """Return the chunks of the window after that of a sample, in reading order."""
        return self._chunks.next_window(*divmod(sample, self.samples_per_pass))

    def _documents(self, epoch: int, chunk: int) -> np.ndarray:
        """Return the numbers of a chunk's conversations in a pass, grouped by row."""
        key = epoch, chunk
        if key not in self._row_documents:
            kept = self.lengths.kept[chunk]
            documents = np.flatnonzero(kept)
            if self._seed is not None:  # a key of four numbers; windows use three
                documents = documents[permutation(len(documents), self._seed, epoch, chunk, 0)]
            longest_first = documents[np.argsort(-kept[documents], kind="stable")]
            self._row_documents[key] = longest_first[self._packed[chunk].slots]
            if len(self._row_documents) > 2 * WINDOW_CHUNKS:
                self._row_documents.popitem(last=False)
        self._row_documents.move_to_end(key)
        return self._row_documents[key]


def _pack(kept: np.ndarray, row_length: int) -> _PackedChunk:
    longest_first = -np.sort(-kept[kept > 0])
    rows = best_fit_decreasing(longest_first, row_length)
    counts = np.bincount(rows)
    return _PackedChunk(np.argsort(rows, kind="stable"), np.concatenate(([0], np.cumsum(counts))))


def best_fit_decreasing(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Pack documents into rows: each into the row with the least remaining space that fits it, or into a new row.

    Documents of equal length, and rows with equal remaining space, are processed together, so that a million documents
    take seconds.

    Args:
        lengths: [documents] integers in descending order, each from 1 to `row_length`.
        row_length: Number of tokens of a row.

    Returns:
        [documents] int64: the row of each document, from 0.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    rooms: list[int] = []  # remaining spaces of open rows, ascending
    rows_with: dict[int, list[np.ndarray]] = {}
    assigned = [np.empty(0, dtype=np.int64)]
    num_rows = 0

    def keep_open(rows: np.ndarray, room: int) -> None:
        """Keep rows open if they have remaining space."""
        if not room or not len(rows):
            return
        if room not in rows_with:
            insort(rooms, room)
            rows_with[room] = []
        rows_with[room].append(rows)

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        remaining = count
        while remaining:
            index = bisect_left(rooms, size)
            if index < len(rooms):
                room = rooms.pop(index)
                rows = np.concatenate(rows_with.pop(room))
            else:
                room, needed = row_length, -(-remaining // (row_length // size))
                rows = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            each = room // size  # documents per row: once a row has one of them, it has the least space of all
            full = min(len(rows), remaining // each)
            assigned.append(np.repeat(rows[:full], each))
            keep_open(rows[:full], room - each * size)
            remaining -= full * each
            if full < len(rows):
                assigned.append(np.repeat(rows[full : full + 1], remaining))
                keep_open(rows[full : full + 1], room - remaining * size)
                keep_open(rows[full + 1 :], room)
                remaining = 0
    return np.concatenate(assigned)
