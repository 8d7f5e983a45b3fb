"""Property-based tests of packing, for any lengths, row lengths and seeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropepp_lit.data.packing import Lengths, PackedPlan, best_fit_decreasing


@st.composite
def all_lengths(draw):
    """Draw lengths of conversations in a few chunks, some of them skipped (0), and a row length."""
    row_length = draw(st.integers(1, 24))
    sizes = np.array([row_length, *draw(st.lists(st.integers(0, row_length), max_size=40))])
    kept = np.array_split(sizes, draw(st.integers(1, min(10, len(sizes)))))
    return Lengths([np.cumsum(chunk) - chunk for chunk in kept], kept, 1, row_length, 0, 0), row_length


@given(drawn_lengths=all_lengths(), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000))
def test_every_conversation_is_in_one_row_of_each_pass(drawn_lengths, seed, epoch):
    lengths, row_length = drawn_lengths
    expected = {
        (chunk, start, size)
        for chunk, (starts, sizes) in enumerate(zip(lengths.starts, lengths.kept, strict=True))
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
        if size
    }
    plan, other = (PackedPlan(lengths, row_length=row_length, seed=seed) for _ in range(2))
    in_order = PackedPlan(lengths, row_length=row_length, seed=None)
    count = plan.samples_per_pass
    assert count == in_order.samples_per_pass
    passes = [[plan.locate(sample + number * count) for sample in range(count)] for number in (epoch, epoch + 1)]
    for rows in (*passes, [in_order.locate(sample) for sample in range(count)]):
        spans = [tuple(span) for row in rows for span in row]
        assert len(spans) == len(set(spans)) == plan.documents
        assert set(spans) == expected
        assert all(0 < sum(span.num_tokens for span in row) <= row_length for row in rows)
        assert all(len({span.chunk for span in row}) == 1 for row in rows)
    assert plan.tokens == sum(size for _, _, size in expected)
    assert plan.padding == pytest.approx(1 - plan.tokens / (count * row_length))
    for sample in (count - 1, 0, count // 2):  # any sample can be requested first
        assert [other.locate(sample + (epoch + 1) * count)] == [passes[1][sample]]


@given(row_length=st.integers(1, 300), data=st.data())
def test_rows_are_those_of_best_fit_decreasing(row_length, data):
    lengths = data.draw(st.lists(st.integers(1, row_length), min_size=1, max_size=60))
    falling = np.array(sorted(lengths, reverse=True))
    rooms = []  # simple reference implementation
    for length in falling:
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(row_length)
        rooms[min(fitting, key=lambda row: rooms[row], default=-1)] -= length
    rows = best_fit_decreasing(falling, row_length)
    found = np.bincount(rows, weights=falling)
    assert len(rows) == len(falling)
    assert sorted(row_length - found) == sorted(rooms)
    # Two rows that fit into one would have been joined: at most one row is less than half full.
    assert len(found) <= max(1, 2 * sum(lengths) / row_length)
