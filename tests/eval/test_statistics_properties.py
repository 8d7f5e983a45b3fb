"""Properties of intervals: they contain the value, are bounded, and transform with their arguments."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropepp_lit.eval.statistics import Ratios, difference_interval, interval, t_quantile

SEEDS = st.integers(0, 2**32 - 1)
RUNS = st.integers(1, 4)
EXAMPLES = st.integers(1, 12)


def make_ratios(seed, runs, examples, *, is_share, share_counted=0.8):
    """Return random ratios, and the number of examples that count (at least one)."""
    rng = np.random.default_rng(seed)
    counts = rng.uniform(size=examples) < share_counted
    counts[0] = True
    denominators = np.tile(counts * rng.integers(1, 9, examples), (runs, 1)).astype(float)
    if is_share:
        shares = rng.choice([0.0, 1.0, rng.uniform()], size=(runs, examples))
    else:
        shares = rng.normal(4, rng.uniform(0, 3), (runs, examples))
    return Ratios(shares * denominators, denominators), int(counts.sum())


@given(seed=SEEDS, runs=RUNS, examples=EXAMPLES, kind=st.sampled_from(["number", "share", "proportion"]))
def test_an_interval_contains_the_value(seed, runs, examples, kind):
    ratios, counted = make_ratios(seed, runs, examples, is_share=kind != "number")
    settings = {"is_share": kind != "number", "is_proportion": kind == "proportion"}
    ends = interval(ratios, **settings)
    if counted < 2:
        assert ends is None
        return
    low, high = ends
    assert low <= ratios.value <= high
    if kind != "number":
        assert 0 <= low <= high <= 1
    if kind == "proportion":
        assert low < high
    assert interval(ratios, **settings) == ends
    # The order of the runs has no effect.
    swapped = Ratios(ratios.numerators[::-1], ratios.denominators[::-1])
    assert interval(swapped, **settings) == pytest.approx(ends)
    if kind == "number":  # scaled and shifted
        scaled = Ratios(3 * ratios.numerators + 2 * ratios.denominators, ratios.denominators)
        assert interval(scaled, **settings) == pytest.approx((3 * low + 2, 3 * high + 2))


@given(
    seed=SEEDS, runs=st.tuples(RUNS, RUNS), examples=EXAMPLES, kind=st.sampled_from(["number", "share", "proportion"])
)  # fmt: skip
def test_an_interval_of_a_difference_contains_it_and_is_antisymmetric(seed, runs, examples, kind):
    is_share = kind != "number"
    first, counted = make_ratios(seed, runs[0], examples, is_share=is_share)
    second, _ = make_ratios(seed, runs[1], examples, is_share=is_share)
    settings = {"is_share": is_share, "is_proportion": kind == "proportion", "same_seeds": runs[0] == runs[1]}
    settings["transform"] = (lambda ratio: 100 * ratio) if is_share else np.exp
    ends = difference_interval(first, second, **settings)
    if counted < 2:
        assert ends is None
        return
    low, high = ends
    value = settings["transform"](second.value) - settings["transform"](first.value)
    assert low <= value <= high
    if is_share:
        assert -100 <= low <= high <= 100
    swapped = difference_interval(second, first, **settings)
    # For proportions the pseudo-examples are swapped too, so the bootstrap samples differ.
    tolerance = 0.1 * (high - low) if kind == "proportion" else 1e-9 * max(1, abs(low), abs(high))
    assert swapped == pytest.approx((-high, -low), abs=tolerance)
    same = difference_interval(first, first, **{**settings, "same_seeds": True})
    assert same[0] <= 0 <= same[1]
    if kind != "proportion":
        assert same == (0, 0)


@given(degrees=st.floats(1, 1e5), more=st.floats(1e-3, 1e3))
def test_quantiles_decrease_to_that_of_the_normal_distribution(degrees, more):
    ends, later = t_quantile(degrees), t_quantile(degrees + more)
    assert 1.959963 < later <= ends + 1e-9
    assert math.isfinite(ends)
    assert ends <= 12.7063
