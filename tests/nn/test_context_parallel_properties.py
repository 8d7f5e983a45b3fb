"""Sharded rows: each token once and in order, balanced scores, and exactly the keys of its document."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Documents, HeadLayout
from ropepp_lit.nn.context_parallel import (
    MODES,
    ContextShard,
    choose_mode,
    elements_moved,
    shard_documents,
    tokens_of_rank,
)


@given(ranks=st.integers(1, 9), size=st.integers(1, 4), mode=st.sampled_from(MODES))
def test_ranks_cover_all_tokens_and_gather_balances_scores(ranks, size, mode):
    chunks = ranks * (2 if mode == "gather" else 1)
    tokens = torch.arange(2 * size * chunks).view(2, -1)  # two rows
    parts = [tokens_of_rank(size * chunks, ranks, rank, mode) for rank in range(ranks)]
    whole = torch.full_like(tokens, -1)
    scores = []
    for rank, slices in enumerate(parts):
        taken = ContextShard(ranks, rank, mode).take(tokens)
        assert taken.shape == (2, size * chunks // ranks)
        assert (taken.diff(dim=1) > 0).all()
        for part, piece in zip(slices, taken.split([part.stop - part.start for part in slices], dim=1), strict=True):
            assert (whole[:, part] == -1).all()
            whole[:, part] = piece
        scores.append(int((taken[0] + 1).sum()))
    assert torch.equal(whole, tokens)
    if mode == "gather":
        assert len(set(scores)) == 1
        assert [part.start // size for part in parts[0]] == [0, 2 * ranks - 1]
    else:
        assert scores == sorted(scores)
    if chunks > 1:
        with pytest.raises(UsageError, match="context_parallel_size"):
            tokens_of_rank(size * chunks + 1, ranks, 0, mode)


@given(rows=st.integers(1, 3), ranks=st.integers(1, 5), size=st.integers(1, 4), data=st.data())
def test_segments_are_documents_up_to_a_chunk(rows, ranks, size, data):
    """The keys of each query are the tokens of its document up to itself."""
    num_tokens = 2 * ranks * size
    starts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * num_tokens, max_size=rows * num_tokens)))
    documents = Documents.from_starts(starts.view(rows, num_tokens))
    owners = (documents.ids + torch.arange(rows)[:, None] * num_tokens).flatten().tolist()
    first_of = {owner: owners.index(owner) for owner in set(owners)}
    assert documents.cu_seqlens.tolist() == [*sorted(first_of.values()), rows * num_tokens]
    asked = []
    for rank in range(ranks):
        actual = shard_documents(documents, rows, num_tokens, ranks, rank)
        tokens = torch.cat(
            [torch.arange(num_tokens)[part] for part in tokens_of_rank(num_tokens, ranks, rank, "gather")]
        )
        queries = (torch.arange(rows)[:, None] * num_tokens + tokens).flatten().tolist()
        asked += queries
        query_bounds, key_bounds = actual.segments.query_bounds.tolist(), actual.segments.key_bounds.tolist()
        assert (query_bounds[0], query_bounds[-1]) == (0, len(queries))
        assert (key_bounds[0], key_bounds[-1]) == (0, len(actual.key_indices))
        assert actual.segments.longest_query == max(b - a for a, b in pairwise(query_bounds))
        assert actual.segments.longest_key == max(b - a for a, b in pairwise(key_bounds))
        places = actual.key_indices.tolist()
        for i, (first, last) in enumerate(pairwise(query_bounds)):
            keys = places[key_bounds[i] : key_bounds[i + 1]]
            for j, query in enumerate(queries[first:last]):
                seen = keys[: len(keys) - (last - first) + j + 1]
                assert seen == list(range(first_of[owners[query]], query + 1))
        assert torch.equal(actual.positions, documents.positions[:, tokens])
    assert sorted(asked) == list(range(rows * num_tokens))


@given(key_heads=st.integers(1, 8), group=st.integers(1, 8), kinds=st.integers(1, 2), ranks=st.integers(1, 64))
def test_default_mode_has_less_communication(key_heads, group, kinds, ranks):
    layout = HeadLayout(group * key_heads, kinds * group * key_heads, key_heads)
    mode = choose_mode(layout, 16, ranks)
    moved = {name: elements_moved(layout, 16, ranks, name) for name in MODES}
    if layout.num_query_heads % ranks:
        assert mode == "gather"
    else:
        assert moved[mode] == min(moved.values())
        assert choose_mode(layout, 16, ranks, "heads") == "heads"
    if ranks == 1:
        assert set(moved.values()) == {0}
