"""95% confidence intervals of values and of differences between models, over examples and runs (seeds).

A quantity is a ratio: the sum of numerators divided by the sum of denominators, over R runs on the same N examples.
The interval covers two sources of variance:

- **examples** (documents): the percentile bootstrap over examples. Its half-widths are multiplied by
  t(N - 1) / z · √(N / (N - 1)); without this factor they are too narrow for small N (Hesterberg, The American
  Statistician 69, 2015, "expanded percentile interval");
- **runs**: Student's t over the values of the runs, with R - 1 degrees of freedom. A difference between models is
  paired by seed if both have the same seeds, and otherwise uses Welch's two-sample interval. If one of the models has a
  single run, the variance of the other is used for both. If both have a single run, variance over seeds is not covered.

The two half-widths are combined as the square root of the sum of their squares (Graybill and Wang, JASA 75, 1980). Both
include the residual variance, so the combined interval is slightly conservative.

Proportions (scores, 0/1 metrics) get pseudo-examples: two successes and two failures for a value (Agresti and Coull,
The American Statistician 52, 1998), one discordant pair in each direction for a difference (after Agresti and Min,
Statistics in Medicine 24, 2005), because 0 successes in 40 examples do not prove a probability of 0. Their intervals
are clipped to [0, 1].

Simulated coverage (`tests/eval/test_statistics.py`): see recipes/evaluation.md.
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
"""Largest number of examples for which the bootstrap counts are cached (64 MB)."""

Transform = Callable[[Any], Any]


class Ratios(NamedTuple):
    """A quantity of one model, by run and example."""

    numerators: np.ndarray
    """[runs, examples]."""

    denominators: np.ndarray
    """[runs, examples]; 0 for examples that do not count."""

    @property
    def by_run(self) -> np.ndarray:
        """Ratio of each run, [runs]."""
        return self.numerators.sum(1) / self.denominators.sum(1)

    @property
    def value(self) -> float:
        """Ratio over all runs."""
        return float(self.numerators.sum() / self.denominators.sum())


def interval(ratios: Ratios, *, is_share: bool, is_proportion: bool) -> tuple[float, float] | None:
    """Return the 95% interval of a ratio.

    Args:
        ratios: Numerators and denominators of the model's runs.
        is_share: Whether the ratio is bounded by 0 and 1.
        is_proportion: Whether the ratio is a mean of successes; adds pseudo-examples.

    Returns:
        Lower and upper end; None if fewer than two examples count, because the variance is then unknown.
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
    runs = _half_width_of_runs(ratios.by_run)
    low, high = center - math.hypot(below, runs), center + math.hypot(above, runs)
    low, high = min(low, ratios.value), max(high, ratios.value)
    return (max(low, 0.0), min(high, 1.0)) if is_share else (low, high)


def difference_interval(
    first: Ratios, second: Ratios, *, transform: Transform, is_share: bool, is_proportion: bool, same_seeds: bool
) -> tuple[float, float] | None:
    """Return the 95% interval of transform(second ratio) - transform(first ratio).

    Args:
        first: Ratios of the reference model.
        second: Ratios of the model that is compared with it, over the same examples.
        transform: Increasing function that computes values from ratios.
        is_share: Whether the ratios are bounded by 0 and 1.
        is_proportion: Whether the ratios are means of successes; adds pseudo-examples.
        same_seeds: Whether the runs of both models have the same seeds, in the same order.

    Returns:
        Lower and upper end; None if fewer than two examples count.
    """
    pooled = np.concatenate((_pool(first), _pool(second)), axis=1)
    counts = (pooled[:, 1] != 0) | (pooled[:, 3] != 0)
    pooled, num_examples = pooled[counts], int(counts.sum())
    if num_examples < 2:
        return None
    if is_proportion:
        weights = pooled[:, 1].mean(), pooled[:, 3].mean()
        pseudo = [[weights[0], weights[0], 0, weights[1]], [0, weights[0], weights[1], weights[1]]]
        pooled = np.concatenate((pooled, np.array(pseudo)))
    sums = _resample(pooled)
    total = pooled.sum(0)
    center = float(transform(total[2] / total[3]) - transform(total[0] / total[1]))
    differences = transform(_divide(sums[:, 2], sums[:, 3])) - transform(_divide(sums[:, 0], sums[:, 1]))
    below, above = _half_widths(differences, center, num_examples)
    first_runs, second_runs = transform(first.by_run), transform(second.by_run)
    runs = _half_width_of_runs(second_runs - first_runs) if same_seeds else _half_width_welch(first_runs, second_runs)
    low, high = center - math.hypot(below, runs), center + math.hypot(above, runs)
    value = float(transform(second.value) - transform(first.value))
    low, high = min(low, value), max(high, value)
    if is_share:
        widest = float(transform(1.0) - transform(0.0))
        low, high = max(low, -widest), min(high, widest)
    return low, high


def _pool(ratios: Ratios) -> np.ndarray:
    """Return numerators and denominators summed over runs, [examples, 2]."""
    return np.stack((ratios.numerators.sum(0), ratios.denominators.sum(0)), axis=1)


def _divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Divide elementwise; NaN if the denominator is 0."""
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators != 0)


def _half_widths(resampled: np.ndarray, center: float, num_examples: int) -> tuple[float, float]:
    """Return the lower and upper half-width of the interval over examples."""
    factor = t_quantile(num_examples - 1) / _Z * math.sqrt(num_examples / (num_examples - 1))
    low, high = np.nanpercentile(resampled, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return factor * max(center - low, 0.0), factor * max(high - center, 0.0)


def _half_width_of_runs(values: np.ndarray) -> float:
    """Return the half-width of Student's t interval of a mean of independent values."""
    return 0.0 if len(values) < 2 else t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


def _half_width_welch(first: np.ndarray, second: np.ndarray) -> float:
    """Return the half-width of Welch's interval of a difference of means; a single value gets the other's variance."""
    runs = np.array([len(first), len(second)])
    if max(runs) < 2:
        return 0.0
    if min(runs) < 2:
        larger = first if len(first) > 1 else second
        return t_quantile(max(runs) - 1) * larger.std(ddof=1) * math.sqrt((1 / runs).sum())
    variances = np.array([first.var(ddof=1), second.var(ddof=1)]) / runs
    if not variances.any():
        return 0.0
    return t_quantile(variances.sum() ** 2 / (variances**2 / (runs - 1)).sum()) * math.sqrt(variances.sum())


def _resample(columns: np.ndarray) -> np.ndarray:
    """Sum [examples, columns] over bootstrap samples to [RESAMPLES, columns]; the samples are the same in each call."""
    examples = len(columns)
    if examples <= _CACHED_EXAMPLES:
        return _bootstrap_counts(examples) @ columns
    rng = np.random.default_rng(0)
    probabilities = np.full(examples, 1 / examples)
    return np.stack([rng.multinomial(examples, probabilities) @ columns for _ in range(RESAMPLES)])


@functools.lru_cache(maxsize=4)
def _bootstrap_counts(examples: int) -> np.ndarray:
    """Return how often each bootstrap sample contains each example, [RESAMPLES, examples]."""
    probabilities = np.full(examples, 1 / examples)
    return np.random.default_rng(0).multinomial(examples, probabilities, size=RESAMPLES).astype(np.float64)


@functools.lru_cache(maxsize=1024)
def t_quantile(degrees: float) -> float:
    """Return the two-sided quantile of Student's t: P(|t| < quantile) = LEVEL.

    With t = √ν tan θ, P(|t| < √ν tan φ) is the integral of cos^(ν-1) from 0 to φ divided by that from 0 to π/2, which
    is √π Γ(ν/2) / 2Γ((ν+1)/2). φ is found by bisection. The error is about 1e-9 for 1 to 1e6 degrees of freedom.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    log_total = math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2) + math.log(math.pi) / 2 - math.log(2)
    low, high = 0.0, math.atan(20 / math.sqrt(degrees))
    for _ in range(60):
        middle = (low + high) / 2
        logs = (degrees - 1) * np.log(np.cos(middle / 2 * (nodes + 1)))
        if middle / 2 * float(weights @ np.exp(logs - log_total)) < LEVEL:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)
