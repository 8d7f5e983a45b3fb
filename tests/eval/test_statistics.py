"""Simulated coverage of intervals, and their components compared with reference values."""

import math

import numpy as np
import pytest

from ropepp_lit.eval.results import Measurement, summarize
from ropepp_lit.eval.statistics import t_quantile

TRIALS = 200


def test_quantiles_of_students_t_match_published_tables():
    table = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 9: 2.262157, 30: 2.042272, 120: 1.979930}
    assert {degrees: t_quantile(degrees) for degrees in table} == pytest.approx(table, abs=1e-6)
    for degrees in (1.3, 2.5, 7.7):  # degrees of freedom of Welch's interval are not integers
        places = np.linspace(0, t_quantile(degrees), 200_001)
        density = (1 + places**2 / degrees) ** (-(degrees + 1) / 2)
        density *= math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi * degrees)
        assert 2 * np.sum((density[1:] + density[:-1]) / 2 * np.diff(places)) == pytest.approx(0.95, abs=1e-8)
    assert t_quantile(1e6) == pytest.approx(1.959964, abs=1e-5)


def losses(random, runs, *, seed_sd, noise):
    """Return losses [2, runs, 36] of two equal models on the same documents, and the true value."""
    hard = random.normal(4, 0.5, 36)
    return hard + random.normal(0, seed_sd, (2, runs, 1)) + random.normal(0, noise, (2, runs, 36)), 4.0


def hits(random, runs, *, seed_sd, rate):
    """Return successes [2, runs, 40] (0 or 1) of two equal models, and the true score."""
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
def test_coverage_of_intervals_of_equal_models(draw, settings, runs, same_seeds):
    random = np.random.default_rng(runs)
    covered = covered_zero = 0
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
        covered += row["low"] <= truth <= row["high"]
        covered_zero += other["difference_low"] <= 0 <= other["difference_high"]
    assert covered / TRIALS >= 0.93
    assert covered_zero / TRIALS >= 0.93


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.98])
def test_coverage_of_scores_of_a_single_run(rate):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(TRIALS):
        values = (random.uniform(size=40) < rate).astype(float)
        measurement = Measurement(task="retrieval", metric="score", numerators=values.tolist(), denominators=[1.0] * 40)
        row = summarize([("a", [measurement])])[0]
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 100
        assert row["low"] < row["high"]
        covered += row["low"] <= 100 * rate <= row["high"]
    assert covered / TRIALS >= 0.93


def test_half_width_over_runs_is_that_of_students_t():
    """Runs differ by constants, so the interval of the difference contains only the variance between runs."""
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
    reversed_difference = np.subtract(second[::-1], first)
    assert paired["difference_high"] - paired["difference"] == pytest.approx(
        4.302653 * reversed_difference.std(ddof=1) / math.sqrt(3), rel=1e-5
    )
    paired = summarize(entries, seeds=[0, 1, 2, 0, 1, 2])[1]
    assert paired["difference"] == pytest.approx(0.2)
    assert (paired["difference_low"], paired["difference_high"]) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-5)
    assert paired["difference_low"] < 0  # not significant with three seeds
    parts = np.var(first, ddof=1) / 3, np.var(second, ddof=1) / 3
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2)
    welch = summarize(entries)[1]
    assert welch["difference_high"] - 0.2 == pytest.approx(t_quantile(degrees) * math.sqrt(sum(parts)), rel=1e-5)
    single = summarize([entries[0], *entries[3:]])[1]  # a single run gets the variance of the other model
    half = 4.302653 * np.std(second, ddof=1) * math.sqrt(1 + 1 / 3)
    assert single["difference_high"] - single["difference"] == pytest.approx(half, rel=1e-5)
