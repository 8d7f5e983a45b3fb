import pytest

from ropepp_lit.errors import UsageError
from ropepp_lit.train.schedule import Constant, Cosine, WarmupStableDecay


def factors(schedule, steps, total_steps):
    return [schedule.factor(step, total_steps) for step in range(steps)]


def test_constant():
    assert factors(Constant(warmup_steps=3), 6, 6) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_cosine():
    multipliers = factors(Cosine(warmup_steps=2, final_factor=0.1), 13, 12)
    assert multipliers[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert multipliers[7] == pytest.approx(0.55)  # half-way down
    assert multipliers[12] == pytest.approx(0.1)
    assert multipliers[2:] == sorted(multipliers[2:], reverse=True)


def test_warmup_stable_decay():
    multipliers = factors(WarmupStableDecay(warmup_steps=1, decay_share=0.4), 11, 10)
    assert multipliers == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_decay_from_a_step():
    schedule = WarmupStableDecay(warmup_steps=1, decay_share=None, decay_from=6)
    schedule.check(10)
    assert factors(schedule, 11, 10) == factors(WarmupStableDecay(warmup_steps=1, decay_share=0.4), 11, 10)
    for steps in (5, 6):
        with pytest.raises(UsageError, match=rf"model\.schedule\.decay_from: 6 must be below the {steps} steps"):
            schedule.check(steps)


def test_decay_without_a_constant_phase():
    assert factors(WarmupStableDecay(decay_share=1.0), 5, 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("schedule", [Cosine(warmup_steps=9), WarmupStableDecay(warmup_steps=9)])
def test_a_schedule_shorter_than_its_warmup(schedule):
    assert factors(schedule, 4, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("schedule", [Cosine(final_factor=0.2), WarmupStableDecay(final_factor=0.2)])
def test_the_final_factor_applies_after_the_end(schedule):
    assert schedule.factor(1000, 10) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Constant(warmup_steps=-1), "warmup_steps"),
        (lambda: Cosine(total_steps=0), "total_steps"),
        (lambda: Cosine(final_factor=2), "final_factor"),
        (lambda: WarmupStableDecay(decay_share=-0.1), "decay_share"),
        (lambda: WarmupStableDecay(decay_share=None, decay_from=3, warmup_steps=5), "decay_from"),
        (lambda: WarmupStableDecay(decay_from=3), ""),
        (lambda: WarmupStableDecay(decay_share=None), ""),
    ],
)
def test_invalid_settings(make, name):
    with pytest.raises(UsageError, match=rf"model\.schedule\.{name}" if name else "give decay_share, or decay_from"):
        make()
