"""Coverage of the intervals, simulated, and their parts against plain numbers."""

import math

import numpy as np
import pytest

from ropepp_lit.eval.results import Measurement, summarize
from ropepp_lit.eval.statistics import t_quantile

TRIALS = 200


def test_quantiles_of_students_t_are_those_of_tables():
    tabled = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 9: 2.262157, 30: 2.042272, 120: 1.979930}
    assert {degrees: t_quantile(degrees) for degrees in tabled} == pytest.approx(tabled, abs=1e-6)
    for degrees in (1.3, 2.5, 7.7):  # Welch's are not whole numbers
        places = np.linspace(0, t_quantile(degrees), 200_001)
        density = (1 + places**2 / degrees) ** (-(degrees + 1) / 2)
        density *= math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi * degrees)
        assert 2 * np.sum((density[1:] + density[:-1]) / 2 * np.diff(places)) == pytest.approx(0.95, abs=1e-8)
    assert t_quantile(1e6) == pytest.approx(1.959964, abs=1e-5)


def losses(random, runs, *, seed_sd, noise):
    """[2 models, runs, 36 documents]: equal models; the documents' own difficulty is shared; and the true value."""
    hard = random.normal(4, 0.5, 36)
    return hard + random.normal(0, seed_sd, (2, runs, 1)) + random.normal(0, noise, (2, runs, 36)), 4.0


def hits(random, runs, *, seed_sd, rate):
    """[2 models, runs, 40 examples] of 0 and 1, of equal models, and the true score."""
    logits = math.log(rate / (1 - rate)) + random.normal(0, 1, 40) + random.normal(0, seed_sd, (2, runs, 1))
    draws = np.random.default_rng(0).normal(0, math.hypot(1, seed_sd), 100_000)
    truth = 100 * (1 / (1 + np.exp(-math.log(rate / (1 - rate)) - draws))).mean()
    return (random.uniform(size=(2, runs, 40)) < 1 / (1 + np.exp(-logits))).astype(float), truth


@pytest.mark.parametrize("same_seeds", [True, False], ids=["paired", "welch"])
@pytest.mark.parametrize("runs", [3, 5])
@pytest.mark.parametrize(
    ("draw", "settings"),
    [
        (losses, {"seed_sd": 0.03, "noise": 0.02}),
        (losses, {"seed_sd": 0.0, "noise": 0.02}),
        (losses, {"seed_sd": 0.3, "noise": 0.02}),
        (hits, {"seed_sd": 0.5, "rate": 0.5}),
        (hits, {"seed_sd": 0.5, "rate": 0.03}),
    ],
    ids=["losses", "no-seed-spread", "large-seed-spread", "hits", "few-hits"],
)
def test_intervals_of_equal_models_hold_the_truth(draw, settings, runs, same_seeds):
    random = np.random.default_rng(runs)
    held = held_zero = 0
    for _ in range(TRIALS):
        values, truth = draw(random, runs, **settings)
        metric = {"task": "retrieval", "metric": "score"} if draw is hits else {"task": "perplexity", "metric": "loss"}
        entries = [
            (name, [Measurement(**metric, numerators=run.tolist(), denominators=[1.0] * len(run))])
            for name, model in zip("ab", values, strict=True)
            for run in model
        ]
        row, other = summarize(entries, seeds=[*range(runs)] * 2 if same_seeds else None)
        assert other["paired"] == ("examples and seeds" if same_seeds else "examples")
        held += row["low"] <= truth <= row["high"]
        held_zero += other["difference_low"] <= 0 <= other["difference_high"]
    assert held / TRIALS >= 0.93
    assert held_zero / TRIALS >= 0.93


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.98])
def test_one_run_covers_documents_and_keeps_percentages_between_0_and_100(rate):
    random = np.random.default_rng(0)
    held = 0
    for _ in range(TRIALS):
        drawn = (random.uniform(size=40) < rate).astype(float)
        kept = Measurement(task="retrieval", metric="score", numerators=drawn.tolist(), denominators=[1.0] * 40)
        row = summarize([("a", [kept])])[0]
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 100
        assert row["low"] < row["high"]
        held += row["low"] <= 100 * rate <= row["high"]
    assert held / TRIALS >= 0.93


def test_the_half_width_of_runs_is_students():
    """Runs that differ by constants: nothing but the spread between them is in the difference."""
    documents = np.linspace(3, 5, 30)
    first, second = [0.0, 0.1, 0.2], [0.3, 0.1, 0.5]
    entries = [
        (name, [Measurement(task="perplexity", metric="loss", numerators=(documents + s).tolist(),
                            denominators=[1.0] * 30)])
        for name, shifts in (("a", first), ("b", second)) for s in shifts
    ]  # fmt: skip
    difference = np.subtract(second, first)
    half = 4.302653 * difference.std(ddof=1) / math.sqrt(3)
    paired = summarize(entries, seeds=[0, 1, 2, 2, 1, 0])[1]  # in another order
    turned = np.subtract(second[::-1], first)
    assert paired["difference_high"] - paired["difference"] == pytest.approx(
        4.302653 * turned.std(ddof=1) / math.sqrt(3), rel=1e-5
    )
    paired = summarize(entries, seeds=[0, 1, 2, 0, 1, 2])[1]
    assert paired["difference"] == pytest.approx(0.2)
    assert (paired["difference_low"], paired["difference_high"]) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-5)
    assert paired["difference_low"] < 0  # three seeds do not carry a star here
    parts = np.var(first, ddof=1) / 3, np.var(second, ddof=1) / 3
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2)
    welch = summarize(entries)[1]
    assert welch["difference_high"] - 0.2 == pytest.approx(t_quantile(degrees) * math.sqrt(sum(parts)), rel=1e-5)
    lone = summarize([entries[0], *entries[3:]])[1]  # a single run has the other's spread
    half = 4.302653 * np.std(second, ddof=1) * math.sqrt(1 + 1 / 3)
    assert lone["difference_high"] - lone["difference"] == pytest.approx(half, rel=1e-5)
