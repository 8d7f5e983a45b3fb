"""Results of an evaluation: measurements by example, and rows of values with confidence intervals.

A row describes one model (all runs with the same name):

| column                          | value                                                                            |
|---------------------------------|----------------------------------------------------------------------------------|
| `model`                         | name of the model                                                                |
| `task`, `part`, `metric`        | such as `retrieval`, `single`, `score`; perplexity's part is a set of documents  |
| `length`                        | context length in tokens, or None                                                |
| `position`                      | first position (or distance) of a range, or None                                 |
| `depth`                         | depth of the answer in the context, from 0 (start) to 1 (end), or None           |
| `heads`, `noise_std`            | group of heads with noise, and the standard deviation of the noise               |
| `value`, `low`, `high`          | the value and its 95% interval (None for a single example)                       |
| `difference`, …`_low`, …`_high` | value - the first model's, and its 95% interval; None if the examples differ     |
| `paired`                        | how the difference is paired: `examples` or `examples and seeds`                 |
| `examples`, `runs`              | number of examples (documents) and of runs (seeds)                               |
| `higher_is_better`              | bool, or None if neither direction is better                                     |
| `run_values`                    | list of the values of the single runs; not in COLUMNS                            |
| `details`                       | dict with settings of the measurement; not in COLUMNS                            |

Scores, `attention`, `more_context` and `key_tokens` are in percent, losses in nats per token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ropepp_lit.eval.statistics import Ratios, difference_interval, interval

KEYS = ("task", "part", "metric", "length", "position", "depth", "heads", "noise_std")
"""Fields that identify a measurement of a model."""

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
"""Suffixes of the names of metrics for which lower is better."""

SHARES = ("attention", "more_context", "key_tokens")
"""Metrics between 0 and 100% that are not proportions of successes; neither direction is better."""

CLEAN = {"position": None, "depth": None, "heads": "", "noise_std": None}
"""Values of the fields in rows over full windows and all depths, without noise."""

COLUMNS = (
    "model", *KEYS, "value", "low", "high", "difference", "difference_low", "difference_high", "paired",
    "examples", "runs", "higher_is_better",
)  # fmt: skip

AGGREGATIONS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda ratio: ratio,
    "perplexity": np.exp,
    "bits_per_byte": lambda ratio: ratio / math.log(2),
    "score": lambda ratio: 100 * ratio,
    "percent": lambda ratio: 100 * ratio,
    "attention": lambda ratio: 100 * ratio,
    "more_context": lambda ratio: 100 * ratio,
    "key_tokens": lambda ratio: 100 * ratio,
}
"""Increasing functions that compute a value from sum(numerators) / sum(denominators), by aggregation or metric.

`score` is for examples with a score from 0 to 1; `percent` for other shares, such as the share of a document's tokens.
"""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One quantity of one model, by example.

    Its value is the aggregation of the ratio sum(numerators) / sum(denominators).
    """

    task: str
    metric: str
    part: str = ""
    """Family of a suite, set of documents, or lm-eval task; empty means all documents."""
    length: int | None = None
    position: int | None = None
    depth: float | None = None
    heads: str = ""
    noise_std: float | None = None
    numerators: list[float]
    """One for each example."""
    denominators: list[float]
    """One for each example; 0 for examples that do not count."""
    sample: str = ""
    """Digest of the examples, see :func:`sample_of`; differences are computed only between equal samples."""
    higher_is_better: bool | None = None
    """None derives it from the task and the metric, see :attr:`better_if_higher`."""
    aggregation: str | None = None
    """Key of :data:`AGGREGATIONS`; None uses the entry of the metric's name, or the ratio itself."""
    details: dict[str, Any] = field(default_factory=dict)
    """Settings of the measurement (plain values); for lm-eval's tasks `filter`, `shots`, `task_version` and others."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Values of the fields :data:`KEYS`."""
        return tuple(getattr(self, name) for name in KEYS)

    @property
    def value(self) -> float:
        """Value over all examples."""
        return float(self.transform(np.sum(self.numerators) / np.sum(self.denominators)))

    @property
    def transform(self) -> Callable[[Any], Any]:
        """Function that computes values from ratios."""
        return AGGREGATIONS.get(self.aggregation or self.metric, AGGREGATIONS["mean"])

    @property
    def is_share(self) -> bool:
        """Whether the ratio is bounded by 0 and 1."""
        return self.is_proportion or self.metric in SHARES or self.aggregation == "percent"

    @property
    def is_proportion(self) -> bool:
        """Whether the ratio is a mean of successes from 0 to 1: a score, or a mean of only zeros and ones."""
        if "score" in (self.metric.partition(",")[0], self.aggregation):
            return True
        return self.aggregation == "mean" and {*self.numerators, *self.denominators} <= {0.0, 1.0}

    @property
    def better_if_higher(self) -> bool | None:
        """`higher_is_better`, or else False for :data:`LOWER_IS_BETTER`, None for attention and :data:`SHARES`."""
        if self.higher_is_better is not None or self.task == "attention" or self.metric in SHARES:
            return self.higher_is_better
        return not self.metric.endswith(LOWER_IS_BETTER)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return dataclasses.asdict(self)


def checked(measurement: Measurement) -> Measurement:
    """Check a measurement and return it.

    Raises:
        ValueError: The numbers of numerators and denominators differ, or the aggregation is unknown.
    """
    if len(measurement.numerators) != len(measurement.denominators):
        raise ValueError(f"{len(measurement.numerators)} numerators and {len(measurement.denominators)} denominators")
    if measurement.aggregation is not None and measurement.aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {measurement.aggregation!r}")
    return measurement


def sample_of(examples: Iterable[object]) -> str:
    """Return a digest of examples (texts or lists of token ids), equal only for the same examples in the same order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def select(rows: Iterable[dict[str, Any]], **columns: Any) -> list[dict[str, Any]]:
    """Return the rows that have a value and match the given columns."""
    return [
        row for row in rows if row["value"] is not None and all(row[name] == value for name, value in columns.items())
    ]


def summarize(
    runs: Sequence[tuple[str, Iterable[Measurement]]], *, seeds: Sequence[Hashable] | None = None
) -> list[dict[str, Any]]:
    """Return rows with 95% intervals; see :mod:`ropepp_lit.eval.statistics`.

    A difference is computed only if both models were evaluated on the same examples (equal `sample` and number). Its
    interval is paired by example, and by seed if the runs of both models have the same seeds. A model whose runs were
    evaluated on different examples gets a value without interval. Measurements whose denominators are all 0 get no row.

    Args:
        runs: Name of the model and measurements of each run; entries with the same name are runs (seeds) of one model.
        seeds: Seed of each run; None if unknown.

    Returns:
        Dicts with the keys COLUMNS, `run_values` and `details`, in the order of the first run's measurements, models in
        the order in which they first appear.
    """
    groups: dict[tuple[Any, ...], dict[str, _Runs]] = {}
    names: dict[str, None] = {}
    for (name, measurements), seed in zip(runs, seeds or [None] * len(runs), strict=True):
        names.setdefault(name)
        for measurement in measurements:
            if any(measurement.denominators):
                groups.setdefault(measurement.key, {}).setdefault(name, []).append((seed, measurement))
    rows = []
    for models in groups.values():
        first = models.get(next(iter(names)))
        rows += [_row(name, models[name], first) for name in names if name in models]
    return rows


_Runs = list[tuple[Hashable, Measurement]]


def _row(name: str, runs: _Runs, first: _Runs | None) -> dict[str, Any]:
    """Return the row of a model; `first` are the runs of the first model, the reference of differences."""
    values = [measurement.value for _, measurement in runs]
    example = runs[0][1]
    row = {"model": name, **dict(zip(KEYS, example.key, strict=True))}
    row |= dict.fromkeys(("low", "high", "difference", "difference_low", "difference_high", "paired"))
    row |= {"examples": len(example.numerators), "runs": len(runs), "run_values": values}
    row |= {"higher_is_better": example.better_if_higher}
    row["details"] = {**example.details, "unit": "%"} if example.aggregation == "percent" else example.details
    ratios = _ratios(runs)
    if ratios is None:  # the runs were evaluated on different examples
        return {**row, "value": float(np.mean(values))}
    bounds = {"is_share": example.is_share, "is_proportion": example.is_proportion}
    row["value"] = float(example.transform(ratios.value))
    if (ends := interval(ratios, **bounds)) is not None:
        row["low"], row["high"] = (float(example.transform(end)) for end in ends)
    if first is None or first is runs or not _same_examples(first[0][1], example):
        return row
    same_seeds = _same_seeds(first, runs)
    if same_seeds:  # order the runs by the first model's seeds
        by_seed = dict(runs)
        runs = [(seed, by_seed[seed]) for seed, _ in first]
    reference, compared = _ratios(first), _ratios(runs)
    if reference is None or compared is None:
        return row
    ends = difference_interval(reference, compared, transform=example.transform, same_seeds=same_seeds, **bounds)
    if ends is not None:
        row["difference"] = float(example.transform(compared.value) - example.transform(reference.value))
        row["difference_low"], row["difference_high"] = ends
        row["paired"] = "examples and seeds" if same_seeds else "examples"
    return row


def _ratios(runs: _Runs) -> Ratios | None:
    """Return the ratios of the runs of a model; None if they were evaluated on different examples."""
    if not all(_same_examples(runs[0][1], measurement) for _, measurement in runs):
        return None
    columns = [(measurement.numerators, measurement.denominators) for _, measurement in runs]
    return Ratios(*(np.array(column, dtype=np.float64) for column in zip(*columns, strict=True)))


def _same_examples(first: Measurement, second: Measurement) -> bool:
    return first.sample == second.sample and len(first.numerators) == len(second.numerators)


def _same_seeds(first: _Runs, second: _Runs) -> bool:
    """Return whether both models have exactly one run of each of the same known seeds."""
    one, other = ([seed for seed, _ in runs] for runs in (first, second))
    return None not in one and len(set(one)) == len(one) == len(other) and set(one) == set(other)
