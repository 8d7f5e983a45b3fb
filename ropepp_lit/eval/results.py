"""What an evaluation found: measurements by example, and rows of values with confidence intervals.

A row says of one model (all runs of it that bear the same name):

| column                          | value                                                                            |
|---------------------------------|----------------------------------------------------------------------------------|
| `model`                         | its name                                                                         |
| `task`, `part`, `metric`        | `retrieval`, `single`, `score`; the part of perplexity is a set of documents    |
| `length`                        | tokens of the context, or None                                                   |
| `position`                      | first position (or distance) of a range of them, or None                         |
| `depth`                         | where in the context the answer lies, from 0 (start) to 1, or None               |
| `heads`, `noise_std`            | which heads got noise, and its standard deviation                                |
| `value`, `low`, `high`          | the value, and its 95% interval (None of a single example)                       |
| `difference`, …`_low`, …`_high` | value - the first model's, and its 95% interval; None where examples differ      |
| `paired`                        | by what the difference is paired: `examples`, or `examples and seeds`            |
| `examples`, `runs`              | how many examples (documents) and runs (seeds) it is of                          |
| `higher_is_better`              | or None where neither is                                                         |
| `run_values`                    | the values of its single runs, a list; not among COLUMNS                         |
| `details`                       | how it was measured, by name; not among COLUMNS                                  |

Scores, `attention`, `more_context` and `key_tokens` are percent, losses nats per token.
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
"""What tells measurements of one model apart."""

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
"""What a metric's name ends with, if the lower value is the better one."""

SHARES = ("attention", "more_context", "key_tokens")
"""Metrics between 0 and 100% whose examples are no successes or failures; neither high nor low is better."""

CLEAN = {"position": None, "depth": None, "heads": "", "noise_std": None}
"""What the rows have that are of whole windows, all depths and heads as they are."""

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
"""What makes a value of sum(numerators) / sum(denominators), by the name of an aggregation or metric. All increase.

`score` is for examples that succeed or fail, each as a whole or by shares of it; `percent` for other shares between 0
and 1, such as of the tokens of documents.
"""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One quantity, example by example: the sum of the numerators over that of the denominators is its ratio.

    The value is that ratio, or what the metric's aggregation makes of it.
    """

    task: str
    metric: str
    part: str = ""
    """A family of retrieval, a set of documents, a task of lm-eval; empty means all together."""
    length: int | None = None
    position: int | None = None
    depth: float | None = None
    heads: str = ""
    noise_std: float | None = None
    numerators: list[float]
    """One for each example."""
    denominators: list[float]
    """One for each example; 0 where it does not count."""
    sample: str = ""
    """Names the examples (a digest): only measurements of one sample are of the very same examples and paired."""
    higher_is_better: bool | None = None
    """None: known from the metric's name (:data:`LOWER_IS_BETTER`), otherwise neither is better."""
    aggregation: str | None = None
    """A key of :data:`AGGREGATIONS`; None means that of the metric's name, or the ratio itself."""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values by name, how it was measured: of lm-eval's tasks `filter`, `shots`, `task_version` and so on."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is of."""
        return tuple(getattr(self, name) for name in KEYS)

    @property
    def value(self) -> float:
        """Over all examples."""
        return float(self.finish(np.sum(self.numerators) / np.sum(self.denominators)))

    @property
    def finish(self) -> Callable[[Any], Any]:
        """What makes values of ratios."""
        return AGGREGATIONS.get(self.aggregation or self.metric, AGGREGATIONS["mean"])

    @property
    def is_share(self) -> bool:
        """Whether the ratio lies between 0 and 1."""
        return self.is_proportion or self.metric in SHARES or self.aggregation == "percent"

    @property
    def is_proportion(self) -> bool:
        """Whether the ratio is a mean of examples' successes, each from 0 to 1: a score, or nothing but 0 and 1."""
        if "score" in (self.metric.partition(",")[0], self.aggregation):
            return True
        return self.aggregation == "mean" and {*self.numerators, *self.denominators} <= {0.0, 1.0}

    @property
    def better_if_higher(self) -> bool | None:
        """`higher_is_better`, or what the metric's name says; None where neither is better."""
        if self.higher_is_better is not None or self.task == "attention" or self.metric in SHARES:
            return self.higher_is_better
        return not self.metric.endswith(LOWER_IS_BETTER)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def checked(measurement: Measurement) -> Measurement:
    """The measurement.

    Raises:
        ValueError: it does not have a denominator for each numerator, or is aggregated in a way that is not known.
    """
    if len(measurement.numerators) != len(measurement.denominators):
        raise ValueError(f"{len(measurement.numerators)} numerators and {len(measurement.denominators)} denominators")
    if measurement.aggregation is not None and measurement.aggregation not in AGGREGATIONS:
        raise ValueError(f"no aggregation {measurement.aggregation!r}")
    return measurement


def sample_of(examples: Iterable[object]) -> str:
    """A name for examples (texts, lists of token ids): equal where they are the very same, in the same order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def select(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Those of the rows that have a value, and the wanted ones in the named columns."""
    return [
        row for row in rows if row["value"] is not None and all(row[name] == value for name, value in wanted.items())
    ]


def summarize(
    runs: Sequence[tuple[str, Iterable[Measurement]]], *, seeds: Sequence[Hashable] | None = None
) -> list[dict[str, Any]]:
    """Rows with 95% intervals; see :mod:`ropepp_lit.eval.statistics`.

    A difference is given only where both models read the very same examples (equal `sample`, equally many). Its
    interval is paired by example, and by seed where both models have runs of the same seeds. Runs of a model that read
    different examples have a value and no interval. Measurements in which nothing counts (all denominators 0) have no
    value and no row.

    Args:
        runs: Name of the model and its measurements; several entries of one name are runs (seeds) of it.
        seeds: What each run's randomness came from; None where it is not known.

    Returns:
        Dicts with the keys COLUMNS, `run_values` and `details`, in the order of the first run's measurements, models in
        the order of their names' first appearance.
    """
    found: dict[tuple[Any, ...], dict[str, list[tuple[Hashable, Measurement]]]] = {}
    names: dict[str, None] = {}
    for (name, measurements), seed in zip(runs, seeds or [None] * len(runs), strict=True):
        names.setdefault(name)
        for measurement in measurements:
            if any(measurement.denominators):
                found.setdefault(measurement.key, {}).setdefault(name, []).append((seed, measurement))
    rows = []
    for models in found.values():
        first = models.get(next(iter(names)))
        rows += [_row(name, models[name], first) for name in names if name in models]
    return rows


_Runs = list[tuple[Hashable, Measurement]]


def _row(name: str, several: _Runs, first: _Runs | None) -> dict[str, Any]:
    """A model's row; `first` are the runs of the model that differences are to."""
    values = [measurement.value for _, measurement in several]
    example = several[0][1]
    row = {"model": name, **dict(zip(KEYS, example.key, strict=True))}
    row |= dict.fromkeys(("low", "high", "difference", "difference_low", "difference_high", "paired"))
    row |= {"examples": len(example.numerators), "runs": len(several), "run_values": values}
    row |= {"higher_is_better": example.better_if_higher}
    row["details"] = {**example.details, "unit": "%"} if example.aggregation == "percent" else example.details
    own = _ratios(several)
    if own is None:  # runs of different examples
        return {**row, "value": float(np.mean(values))}
    kind = {"is_share": example.is_share, "is_proportion": example.is_proportion}
    row["value"] = float(example.finish(own.value))
    if (ends := interval(own, **kind)) is not None:
        row["low"], row["high"] = (float(example.finish(end)) for end in ends)
    if first is None or first is several or not _same_examples(first[0][1], example):
        return row
    same_seeds = _same_seeds(first, several)
    if same_seeds:  # runs in the order of the first model's seeds
        by_seed = dict(several)
        several = [(seed, by_seed[seed]) for seed, _ in first]
    one, other = _ratios(first), _ratios(several)
    if one is None or other is None:
        return row
    ends = difference_interval(one, other, finish=example.finish, same_seeds=same_seeds, **kind)
    if ends is not None:
        row["difference"] = float(example.finish(other.value) - example.finish(one.value))
        row["difference_low"], row["difference_high"] = ends
        row["paired"] = "examples and seeds" if same_seeds else "examples"
    return row


def _ratios(several: _Runs) -> Ratios | None:
    """Of the runs of a model; None where they are of different examples."""
    if not all(_same_examples(several[0][1], measurement) for _, measurement in several):
        return None
    columns = [(measurement.numerators, measurement.denominators) for _, measurement in several]
    return Ratios(*(np.array(column, dtype=np.float64) for column in zip(*columns, strict=True)))


def _same_examples(one: Measurement, other: Measurement) -> bool:
    return one.sample == other.sample and len(one.numerators) == len(other.numerators)


def _same_seeds(first: _Runs, second: _Runs) -> bool:
    """Whether the models have a run of each of the same seeds."""
    one, other = ([seed for seed, _ in several] for several in (first, second))
    return None not in one and len(set(one)) == len(one) == len(other) and set(one) == set(other)
