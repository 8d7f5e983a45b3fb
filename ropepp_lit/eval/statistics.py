"""95% intervals of values and of differences, over the examples that were read and the runs (seeds) of a model.

A quantity is a ratio: the sum of numerators over that of denominators, of R runs that all read the same N examples.
Two things vary it, and the interval covers both:

- **examples** (documents): the percentile bootstrap over examples, its half-widths multiplied by
  t(N - 1) / z · √(N / (N - 1)), without which it is too narrow for few examples (Hesterberg, The American
  Statistician 69, 2015, "expanded percentile interval");
- **runs**: Student's t over the values of single runs, R - 1 degrees of freedom. Differences of models are taken seed
  by seed where both have the same seeds, otherwise by Welch's two samples; where one of the models has a single run,
  its spread is taken to be the other's. With a single run of each model, seeds are not covered.

The two half-widths are joined as the root of the sum of their squares (Graybill and Wang, JASA 75, 1980). Both contain
the spread that is of neither, so the interval is a little too wide rather than too narrow.

Proportions (scores, 0/1 metrics) get pseudo-examples, two successes and two failures for a value (Agresti and Coull,
The American Statistician 52, 1998), a pair of each order for a difference (after Agresti and Min, Statistics in
Medicine 24, 2005): no hit in 40 examples does not prove a probability of 0. Their intervals stay between 0 and 1.

Simulated share of intervals that hold the true value (`tests/eval/test_statistics.py`): recipes/README.md, Evaluation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_Z = 1.959963984540054
_CACHED_EXAMPLES = 4000
"""Up to so many examples, what the bootstrap draws is kept (64 MB)."""

Finish = Callable[[Any], Any]


class Ratios(NamedTuple):
    """A quantity of one model."""

    numerators: np.ndarray
    """[runs, examples]."""

    denominators: np.ndarray
    """[runs, examples]; 0 where an example does not count."""

    @property
    def of_runs(self) -> np.ndarray:
        """[runs]: the ratio of each."""
        return self.numerators.sum(1) / self.denominators.sum(1)

    @property
    def value(self) -> float:
        """Of all runs together."""
        return float(self.numerators.sum() / self.denominators.sum())


def interval(ratios: Ratios, *, is_share: bool, is_proportion: bool) -> tuple[float, float] | None:
    """The 95% interval of a ratio.

    Args:
        ratios: Of the model's runs.
        is_share: The ratio lies between 0 and 1.
        is_proportion: It is a mean of examples' successes; gets pseudo-examples.

    Returns:
        Low and high; None with fewer than two examples that count, which tell nothing of others.
    """
    pooled = _pool(ratios)
    counts = pooled[:, 1] != 0
    pooled, num_examples = pooled[counts], int(counts.sum())
    if num_examples < 2:
        return None
    if is_proportion:
        weight = pooled[:, 1].mean()
        pooled = np.concatenate((pooled, weight * np.array([[1, 1], [1, 1], [0, 1], [0, 1]])))
    sums = _resample(pooled)
    center = pooled[:, 0].sum() / pooled[:, 1].sum()
    below, above = _half_widths(_divide(sums[:, 0], sums[:, 1]), center, num_examples)
    runs = _half_width_of_runs(ratios.of_runs)
    low, high = center - math.hypot(below, runs), center + math.hypot(above, runs)
    low, high = min(low, ratios.value), max(high, ratios.value)
    return (max(low, 0.0), min(high, 1.0)) if is_share else (low, high)


def difference_interval(
    first: Ratios, second: Ratios, *, finish: Finish, is_share: bool, is_proportion: bool, same_seeds: bool
) -> tuple[float, float] | None:
    """The 95% interval of a difference: what `finish` makes of the second model's ratio, less that of the first's.

    Args:
        first: Of the runs of the model that is compared with.
        second: Of the runs of the other one, over the same examples.
        finish: Makes values of ratios; increases.
        is_share: The ratios lie between 0 and 1.
        is_proportion: They are means of examples' successes.
        same_seeds: The runs of both are those of the same seeds, in one order.

    Returns:
        Low and high; None with fewer than two examples that count.
    """
    pooled = np.concatenate((_pool(first), _pool(second)), axis=1)
    counts = (pooled[:, 1] != 0) | (pooled[:, 3] != 0)
    pooled, num_examples = pooled[counts], int(counts.sum())
    if num_examples < 2:
        return None
    if is_proportion:
        one, other = pooled[:, 1].mean(), pooled[:, 3].mean()
        pooled = np.concatenate((pooled, np.array([[one, one, 0, other], [0, one, other, other]])))
    sums = _resample(pooled)
    total = pooled.sum(0)
    center = float(finish(total[2] / total[3]) - finish(total[0] / total[1]))
    differences = finish(_divide(sums[:, 2], sums[:, 3])) - finish(_divide(sums[:, 0], sums[:, 1]))
    below, above = _half_widths(differences, center, num_examples)
    ones, others = finish(first.of_runs), finish(second.of_runs)
    runs = _half_width_of_runs(others - ones) if same_seeds else _half_width_of_two(ones, others)
    low, high = center - math.hypot(below, runs), center + math.hypot(above, runs)
    value = float(finish(second.value) - finish(first.value))
    low, high = min(low, value), max(high, value)
    if is_share:
        widest = float(finish(1.0) - finish(0.0))
        low, high = max(low, -widest), min(high, widest)
    return low, high


def _pool(ratios: Ratios) -> np.ndarray:
    """[examples, 2]: numerators and denominators, summed over runs."""
    return np.stack((ratios.numerators.sum(0), ratios.denominators.sum(0)), axis=1)


def _divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Ratios, NaN where nothing counts."""
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators != 0)


def _half_widths(resampled: np.ndarray, center: float, num_examples: int) -> tuple[float, float]:
    """How far the interval over examples reaches below and above."""
    factor = t_quantile(num_examples - 1) / _Z * math.sqrt(num_examples / (num_examples - 1))
    low, high = np.nanpercentile(resampled, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return factor * max(center - low, 0.0), factor * max(high - center, 0.0)


def _half_width_of_runs(values: np.ndarray) -> float:
    """Student's t over independent values."""
    return 0.0 if len(values) < 2 else t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


def _half_width_of_two(first: np.ndarray, second: np.ndarray) -> float:
    """Of the difference of two means, by Welch; a lone value has the spread of the other sample."""
    runs = np.array([len(first), len(second)])
    if max(runs) < 2:
        return 0.0
    if min(runs) < 2:
        several = first if len(first) > 1 else second
        return t_quantile(max(runs) - 1) * several.std(ddof=1) * math.sqrt((1 / runs).sum())
    parts = np.array([first.var(ddof=1), second.var(ddof=1)]) / runs
    if not parts.any():
        return 0.0
    return t_quantile(parts.sum() ** 2 / (parts**2 / (runs - 1)).sum()) * math.sqrt(parts.sum())


def _resample(columns: np.ndarray) -> np.ndarray:
    """[RESAMPLES, columns]: sums over examples drawn with replacement, the same in each call; from [examples, …]."""
    examples = len(columns)
    if examples <= _CACHED_EXAMPLES:
        return _draws(examples) @ columns
    random = np.random.default_rng(0)
    shares = np.full(examples, 1 / examples)
    return np.stack([random.multinomial(examples, shares) @ columns for _ in range(RESAMPLES)])


@functools.lru_cache(maxsize=4)
def _draws(examples: int) -> np.ndarray:
    """[RESAMPLES, examples]: how often each is drawn."""
    shares = np.full(examples, 1 / examples)
    return np.random.default_rng(0).multinomial(examples, shares, size=RESAMPLES).astype(np.float64)


@functools.lru_cache(maxsize=1024)
def t_quantile(degrees: float) -> float:
    """The number that the absolute value of Student's t stays below with probability LEVEL.

    With t = √ν tan θ, P(|t| < √ν tan φ) is the integral of cos^(ν-1) from 0 to φ over that from 0 to π/2, which is
    √π Γ(ν/2) / 2Γ((ν+1)/2); φ is found by bisection. Exact to about 1e-9 for 1 to 1e6 degrees of freedom.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    log_whole = math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2) + math.log(math.pi) / 2 - math.log(2)
    low, high = 0.0, math.atan(20 / math.sqrt(degrees))
    for _ in range(60):
        middle = (low + high) / 2
        logs = (degrees - 1) * np.log(np.cos(middle / 2 * (nodes + 1)))
        if middle / 2 * float(weights @ np.exp(logs - log_whole)) < LEVEL:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)
