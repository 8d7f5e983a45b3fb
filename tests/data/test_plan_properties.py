"""Property-based tests of the data order, for any chunk sizes, seeds, ranks, batch sizes and resumed positions."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ropepp_lit.data.loader import TrainLoader
from ropepp_lit.data.plan import PATTERN_SAMPLES, WINDOW_CHUNKS, BlockPlan, Mixture, permutation

SEEDS = st.integers(0, 2**31 - 1)
CHUNKS = st.lists(st.integers(1, 12), min_size=1, max_size=2 * WINDOW_CHUNKS + 2)
CONTEXTS = st.integers(1, 15)


def tokens_of(spans):
    return [(span.chunk, token) for span in spans for token in range(span.start, span.start + span.num_tokens)]


@given(chunks=CHUNKS, context=CONTEXTS)
def test_in_order_every_token_is_predicted_once(chunks, context):
    plan = BlockPlan(chunks, context_length=context, seed=None)
    stream = [(chunk, token) for chunk, size in enumerate(chunks) for token in range(size)]
    samples = [tokens_of(plan.locate(sample)) for sample in range(plan.samples_per_pass)]
    assert [token for sample in samples for token in sample[1:]] == stream[1:]
    assert [token for sample in samples for token in sample[:-1]] == stream[:-1]


@given(chunks=CHUNKS, context=CONTEXTS, seed=SEEDS, epoch=st.integers(0, 1000))
def test_a_shuffled_pass_predicts_every_token_at_most_once_and_misses_less_than_a_block(chunks, context, seed, epoch):
    assume(sum(chunks) > context)
    plan, other = (BlockPlan(chunks, context_length=context, seed=seed) for _ in range(2))
    count = plan.samples_per_pass
    located = [plan.locate(epoch * count + number) for number in range(count)]
    samples = [tokens_of(spans) for spans in located]
    assert all(len(sample) == context + 1 for sample in samples)
    labels = [token for sample in samples for token in sample[1:]]
    assert len(set(labels)) == len(labels) == count * context > sum(chunks) - 1 - context
    assert all(0 <= token < chunks[chunk] for sample in samples for chunk, token in sample)
    # Tokens are consecutive within a chunk, and a chunk's last token is followed by the first of the next chunk.
    for (chunk, token), (next_chunk, next_token) in (pair for sample in samples for pair in pairwise(sample)):
        assert (chunk, token + 1) == (next_chunk, next_token) or (token == chunks[chunk] - 1 and next_token == 0)
    asked = permutation(count, seed)[:5].tolist()
    assert [other.locate(epoch * count + number) for number in asked] == [located[number] for number in asked]


@given(chunks=CHUNKS, context=CONTEXTS, seed=SEEDS)
def test_samples_of_a_window_are_read_before_those_of_the_next(chunks, context, seed):
    assume(sum(chunks) > context)
    plan = BlockPlan(chunks, context_length=context, seed=seed)
    samples = range(plan.samples_per_pass)
    order = permutation(len(chunks), seed, 0).tolist()
    windows = [order.index(plan.locate(sample)[0].chunk) // WINDOW_CHUNKS for sample in samples]
    assert windows == sorted(windows)
    for sample, window in zip(samples, windows, strict=True):
        assert plan.next_chunks(sample) == order[(window + 1) * WINDOW_CHUNKS :][:WINDOW_CHUNKS]


@given(count=st.integers(0, 300), key=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
def test_permutations_are_permutations(count, key):
    assert np.array_equal(np.sort(permutation(count, *key)), np.arange(count))


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(weights=WEIGHTS, seed=SEEDS, patterns=st.integers(0, 10**6))
def test_proportions_of_a_mixture_are_exact_over_a_pattern_and_no_sample_is_skipped(weights, seed, patterns):
    mixture = Mixture(weights, seed=seed)
    first = patterns * PATTERN_SAMPLES
    located = [mixture.locate(sample) for sample in range(first, first + PATTERN_SAMPLES)]
    later = mixture.locate(first + PATTERN_SAMPLES)
    for source, weight in enumerate(weights):
        numbers = [number for found, number in located if found == source]
        share = PATTERN_SAMPLES * weight / sum(weights)
        assert abs(len(numbers) - share) < 1
        assert numbers == list(range(patterns * len(numbers), (patterns + 1) * len(numbers)))
        if later[0] == source:
            assert later[1] == (patterns + 1) * len(numbers)


RUNS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4)
"""Number of ranks, batch size and number of batches of a run, and of the runs that resume from its checkpoints."""


class Numbers(torch.utils.data.Dataset):
    """Dataset whose samples are their numbers."""

    def __getitems__(self, samples):
        return samples

    def collate(self, samples, shard):
        return samples


@given(runs=RUNS, stop=st.integers(1, 4))
def test_ranks_read_each_sample_once_and_runs_resume_after_the_last_sample(runs, stop):
    loading = {"num_workers": 0, "shard": None, "pin_memory": False}
    identity = {"names": [], "contents": [], "context_length": 4, "seed": 0, "sources": []}
    read, state = [], {"samples": 0, "identity": identity}
    for ranks, batch_size, batches in runs:
        batches_of_ranks, states = [], []
        for rank in range(ranks):
            loader = TrainLoader(
                Numbers(), batch_size=batch_size, num_batches=batches, num_replicas=ranks, rank=rank,
                identity=identity, **loading,
            )  # fmt: skip
            loader.load_state_dict(state)
            found = []
            for batch, _ in zip(loader, range(min(stop, batches)), strict=False):
                found.append(batch)
                states.append(loader.state_dict())
            batches_of_ranks.append(found)
            assert len(loader) == batches
        # In each step, the ranks' batches are consecutive.
        step_samples = [sample for step in zip(*batches_of_ranks, strict=True) for batch in step for sample in batch]
        read += step_samples
        per_rank = len(states) // ranks
        assert all(states[rank * per_rank : (rank + 1) * per_rank] == states[:per_rank] for rank in range(ranks))
        state = states[per_rank - 1]
        assert state["samples"] == len(read)
    assert read == list(range(len(read)))
