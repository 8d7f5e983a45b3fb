import numpy as np
import pytest

from ropepp_lit.data.plan import WINDOW_CHUNKS, BlockPlan, Span, permutation

CHUNKS = [1000, 37, 2500, 1, 640, 999, 1280, 50, 3000, 770, 12, 1111]


def tokens_of(plan, sample):
    return [
        (span.chunk, place) for span in plan.locate(sample) for place in range(span.start, span.start + span.num_tokens)
    ]


def test_in_order_every_token_is_predicted_once():
    plan = BlockPlan(CHUNKS, context_length=64, seed=None)
    stream = [(chunk, place) for chunk, size in enumerate(CHUNKS) for place in range(size)]
    labels = [token for sample in range(plan.samples_per_pass) for token in tokens_of(plan, sample)[1:]]
    assert labels == stream[1:]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_a_shuffled_pass_predicts_every_token_at_most_once_and_misses_less_than_a_block(epoch):
    plan = BlockPlan(CHUNKS, context_length=64, seed=3)
    samples = range(epoch * plan.samples_per_pass, (epoch + 1) * plan.samples_per_pass)
    labels = [token for sample in samples for token in tokens_of(plan, sample)[1:]]
    assert len(labels) == len(set(labels)) == 64 * plan.samples_per_pass
    assert sum(CHUNKS) - 1 - len(labels) < 64


def test_any_sample_can_be_asked_first():
    one, other = (BlockPlan(CHUNKS, context_length=64, seed=3) for _ in range(2))
    samples = [5, 900, 0, 3, 901, 5000, 4]
    by_sample = {sample: other.locate(sample) for sample in sorted(samples)}
    assert [one.locate(sample) for sample in samples] == [by_sample[sample] for sample in samples]


def test_passes_and_seeds_differ():
    plan, other = (BlockPlan(CHUNKS, context_length=64, seed=seed) for seed in (3, 4))
    count = plan.samples_per_pass
    orders = [
        [plan.locate(k) for k in range(count)],
        [plan.locate(k) for k in range(count, 2 * count)],
        [other.locate(k) for k in range(count)],
    ]
    assert len({str(order) for order in orders}) == 3


def test_blocks_stay_within_a_window_of_chunks():
    chunks = [1024] * (4 * WINDOW_CHUNKS)
    plan = BlockPlan(chunks, context_length=64, seed=0)
    per_window = WINDOW_CHUNKS * 1024 // 64
    for window in range(4):
        samples = range(window * per_window, min((window + 1) * per_window, plan.samples_per_pass))
        touched = {span.chunk for sample in samples for span in plan.locate(sample)}
        assert len(touched) <= WINDOW_CHUNKS + 1


def test_the_order_never_changes():
    # A change here makes running experiments read other data after they resume: it needs a new format version.
    assert permutation(8, 0).tolist() == [5, 7, 1, 4, 2, 0, 6, 3]
    assert BlockPlan(CHUNKS, context_length=64, seed=3).locate(10) == [Span(11, 1068, 43), Span(6, 0, 22)]


def test_permutations_are_permutations():
    for count in (0, 1, 2, 1000):
        assert np.array_equal(np.sort(permutation(count, 1, 2)), np.arange(count))
    assert not np.array_equal(permutation(1000, 1, 2), permutation(1000, 2, 1))
