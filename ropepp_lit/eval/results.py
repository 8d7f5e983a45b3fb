"""What an evaluation found: measurements by example, and rows of values with confidence intervals.

A row says of one model (all runs of it that bear the same name):

| column                          | value                                                                            |
|---------------------------------|----------------------------------------------------------------------------------|
| `model`                         | its name                                                                         |
| `task`, `part`, `metric`        | `retrieval`, `single`, `score`                                                   |
| `length`                        | tokens of the context, or None                                                   |
| `position`                      | first position (or distance) of a range of them, or None                         |
| `depth`                         | where in the context the answer lies, from 0 (start) to 1, or None               |
| `heads`, `noise_std`            | which heads got noise, and its standard deviation                                |
| `value`, `low`, `high`          | the value, and its 95% interval by bootstrap                                     |
| `difference`, …`_low`, …`_high` | value - the first model's, and its 95% interval by paired bootstrap; None for it |
| `examples`, `runs`              | how many examples (documents) and runs (seeds) it is of                          |
| `run_values`                    | the values of its single runs, a list; not among COLUMNS                         |

Scores and `attention` are percent, losses nats per token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap."""

KEYS = ("task", "part", "metric", "length", "position", "depth", "heads", "noise_std")
"""What tells measurements of one model apart."""

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
"""What a metric's name ends with, if the lower value is the better one."""

CLEAN = {"position": None, "depth": None, "heads": "", "noise_std": None}
"""What the rows have that are of whole windows, all depths and heads as they are."""

COLUMNS = (
    "model", *KEYS, "value", "low", "high", "difference", "difference_low", "difference_high", "examples", "runs",
)  # fmt: skip

AGGREGATIONS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda ratio: ratio,
    "perplexity": np.exp,
    "bits_per_byte": lambda ratio: ratio / math.log(2),
    "score": lambda ratio: 100 * ratio,
    "attention": lambda ratio: 100 * ratio,
}
"""What makes a value of sum(numerators) / sum(denominators), by the name of an aggregation or metric. All increase."""


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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def select(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Those of the rows that have a value, and the wanted ones in the named columns."""
    return [
        row for row in rows if row["value"] is not None and all(row[name] == value for name, value in wanted.items())
    ]


def summarize(runs: Sequence[tuple[str, Iterable[Measurement]]]) -> list[dict[str, Any]]:
    """Rows with confidence intervals.

    Examples are drawn again with replacement, the same ones for every model (they saw the same), so differences are
    paired; where a model has several runs, those are drawn again too. With two or three runs that tells little of the
    spread between seeds: the values of the single runs are in `run_values`. Measurements in which nothing counts (all
    denominators 0) have no value and no row.

    Args:
        runs: Name of the model and its measurements; several entries of one name are runs (seeds) of it.

    Returns:
        Dicts with the keys COLUMNS and `run_values`, in the order of the first run's measurements, models in the order
        of their names' first appearance.
    """
    found: dict[tuple[Any, ...], dict[str, list[Measurement]]] = {}
    names: dict[str, None] = {}
    for name, measurements in runs:
        names.setdefault(name)
        for measurement in measurements:
            if not any(measurement.denominators):
                continue
            found.setdefault(measurement.key, {}).setdefault(name, []).append(measurement)
    rows = []
    for key, models in found.items():
        first: np.ndarray | None = None
        for name in names:
            if name not in models:
                continue
            several = models[name]
            values = _resample(several, seed=list(names).index(name))
            row = {"model": name, **dict(zip(KEYS, key, strict=True)), "value": float(values[0])}
            row["low"], row["high"] = (float(x) for x in np.nanpercentile(values[1:], INTERVAL))
            differences = None if first is None or first.shape != values.shape else values - first
            row["difference"] = None if differences is None else float(differences[0])
            low, high = (None, None) if differences is None else np.nanpercentile(differences[1:], INTERVAL)
            row["difference_low"], row["difference_high"] = (None if x is None else float(x) for x in (low, high))
            row["examples"], row["runs"] = len(several[0].numerators), len(several)
            row["run_values"] = [measurement.value for measurement in several]
            rows.append(row)
            first = values if first is None and name == next(iter(names)) else first
    return rows


def _resample(several: list[Measurement], *, seed: int) -> np.ndarray:
    """The value, and behind it that of each resample: [1 + RESAMPLES]."""
    examples = min(len(measurement.numerators) for measurement in several)
    numerators = np.array([measurement.numerators[:examples] for measurement in several], dtype=np.float64)
    denominators = np.array([measurement.denominators[:examples] for measurement in several], dtype=np.float64)
    runs = len(several)
    # The examples of one seed for every model, so that differences are paired.
    counts = np.random.default_rng(0).multinomial(examples, np.full(examples, 1 / examples), size=RESAMPLES)
    shares = np.random.default_rng(seed + 1).multinomial(runs, np.full(runs, 1 / runs), size=RESAMPLES)
    weights = [(np.ones((1, examples)), np.ones((1, runs))), (counts, shares)]
    with np.errstate(invalid="ignore"):  # a resample may hold no example that counts: it is left out
        ratios = [
            np.einsum("be,br,re->b", count, share, numerators) / np.einsum("be,br,re->b", count, share, denominators)
            for count, share in weights
        ]
    return several[0].finish(np.concatenate(ratios))
