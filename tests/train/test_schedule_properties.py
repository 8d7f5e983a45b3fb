"""Properties of learning rate schedules: bounds, end values, no jumps, and independence of resuming."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropepp_lit.errors import UsageError
from ropepp_lit.train.schedule import Constant, Cosine, WarmupStableDecay

SHARES = st.floats(0, 1)
STEPS = st.integers(1, 60)
WARMUPS = st.integers(0, 70)


def assert_schedule(schedule, total, *, final, biggest_step):
    """Check that a schedule rises to 1, then never rises, ends at `final`, and has no larger changes than allowed."""
    warmup = schedule.warmup_steps
    factors = [schedule.factor(step, total) for step in range(total + 3)]
    assert factors[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)][: total + 3])
    assert all(0 <= factor <= 1 for factor in factors)
    behind = factors[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(behind))
    assert all(abs(later - earlier) <= biggest_step + 1e-12 for earlier, later in pairwise(behind))
    if warmup < total:
        assert factors[total:] == pytest.approx([final] * 3)
    # The multiplier depends only on the step, so a resumed run has that of an uninterrupted one.
    assert [schedule.factor(step, total) for step in reversed(range(total + 3))] == factors[::-1]
    return factors


@given(warmup=WARMUPS, total=STEPS)
def test_constant(warmup, total):
    assert_schedule(Constant(warmup_steps=warmup), total, final=1.0, biggest_step=0)


@given(warmup=WARMUPS, total=STEPS, final=SHARES)
def test_cosine(warmup, total, final):
    length = max(1, total - warmup)
    factors = assert_schedule(
        Cosine(warmup_steps=warmup, final_factor=final), total, final=final,
        biggest_step=(1 - final) * math.pi / 2 / length,
    )  # fmt: skip
    for step in range(warmup, total):
        share = (step - warmup) / length
        assert factors[step] == pytest.approx(final + (1 - final) * math.cos(math.pi * share / 2) ** 2)


@given(warmup=WARMUPS, total=STEPS, final=SHARES, share=SHARES)
def test_warmup_stable_decay(warmup, total, final, share):
    decay = min(round(share * total), total - warmup)
    factors = assert_schedule(
        WarmupStableDecay(warmup_steps=warmup, final_factor=final, decay_share=share), total,
        final=final if decay else 1.0, biggest_step=(1 - final) / max(decay, 1),
    )  # fmt: skip
    for step in range(warmup, total):
        left = (total - step) / decay if decay else 1
        assert factors[step] == pytest.approx(final + (1 - final) * min(left, 1))


@given(warmup=WARMUPS, total=STEPS, final=SHARES, start=st.integers(0, 70))
def test_decay_from_a_step(warmup, total, final, start):
    settings = {"warmup_steps": warmup, "final_factor": final, "decay_share": None, "decay_from": start}
    if start < warmup:
        with pytest.raises(UsageError, match=r"model\.schedule\.decay_from"):
            WarmupStableDecay(**settings)
        return
    schedule = WarmupStableDecay(**settings)
    if start >= total:
        with pytest.raises(UsageError, match=r"model\.schedule\.decay_from"):
            schedule.check(total)
        return
    schedule.check(total)
    factors = assert_schedule(schedule, total, final=final, biggest_step=(1 - final) / (total - start))
    assert factors[warmup : start + 1] == [1.0] * (start + 1 - warmup)
    # It extends a constant schedule: a run that stopped at the peak decays from there.
    constant = Constant(warmup_steps=warmup)
    assert factors[:start] == [constant.factor(step, start) for step in range(start)]
