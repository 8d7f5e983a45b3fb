from ropepp_lit.data.plan import WINDOW_CHUNKS, BlockPlan, ChunkSlice, permutation

CHUNKS = [1000, 37, 2500, 1, 640, 999, 1280, 50, 3000, 770, 12, 1111]


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
    assert BlockPlan(CHUNKS, context_length=64, seed=3).locate(10) == [ChunkSlice(11, 1068, 43), ChunkSlice(6, 0, 22)]
