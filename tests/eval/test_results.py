import math

import numpy as np
import pytest

from ropepp_lit.eval.results import COLUMNS, KEYS, Measurement, select, summarize


def scores(values, counts=None, **key):
    return Measurement(
        **{"task": "retrieval", "part": "single", "metric": "score", "length": 512} | key,
        numerators=list(map(float, values)), denominators=[1.0] * len(values) if counts is None else counts,
    )  # fmt: skip


def losses(values, tokens, metric="loss"):
    return Measurement(task="perplexity", metric=metric, length=512, numerators=values, denominators=tokens)


def test_values_aggregate_the_ratio_of_the_sums():
    runs = [("a", [losses([30.0, 10.0], [10.0, 2.0]), losses([30.0, 10.0], [10.0, 2.0], "perplexity"),
                   losses([30.0, 10.0], [40.0, 8.0], "bits_per_byte"), scores([1, 0, 1, 1])])]  # fmt: skip
    values = {row["metric"]: row["value"] for row in summarize(runs)}
    ratio = 40 / 12
    assert values["loss"] == pytest.approx(ratio)
    assert values["perplexity"] == pytest.approx(np.exp(ratio))
    assert values["bits_per_byte"] == pytest.approx(40 / 48 / np.log(2))
    assert values["score"] == pytest.approx(75)
    for metric, value in values.items():
        of_one = next(measurement for measurement in runs[0][1] if measurement.metric == metric)
        assert of_one.value == pytest.approx(value)


def test_rows_have_all_columns_with_numbers_of_examples_and_runs():
    rows = summarize([("a", [scores([1, 0, 1])]), ("b", [scores([1, 1, 1])]), ("a", [scores([0, 0, 1])])])
    assert [row["model"] for row in rows] == ["a", "b"]
    assert all(set(row) == {*COLUMNS, "run_values", "details"} for row in rows)
    assert [(row["examples"], row["runs"]) for row in rows] == [(3, 2), (3, 1)]
    assert rows[0]["value"] == pytest.approx(50)
    assert rows[0]["run_values"] == pytest.approx([200 / 3, 100 / 3])
    assert rows[0]["difference"] is None
    assert rows[1]["difference"] == pytest.approx(50)
    assert {name: rows[0][name] for name in KEYS} == {
        "task": "retrieval", "part": "single", "metric": "score", "length": 512,
        "position": None, "depth": None, "heads": "", "noise_std": None,
    }  # fmt: skip


def test_coverage_of_a_known_probability():
    covered = 0
    for trial in range(100):
        successes = np.random.default_rng(trial).uniform(size=100) < 0.3
        row = summarize([("a", [scores(successes)])])[0]
        covered += row["low"] <= 30 <= row["high"]
    # Binomial(100, 0.95) lies from 88 to 99 in 99 of 100 cases; the percentile bootstrap falls a little short of 95%.
    assert 88 <= covered <= 99


def test_interval_width_matches_the_normal_approximation():
    successes = np.arange(400) % 10 < 3
    row = summarize([("a", [scores(successes)])])[0]
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * 100 * np.sqrt(0.3 * 0.7 / 400), rel=0.1)


def test_differences_are_paired():
    """Differences are more certain than the models' intervals suggest if the same documents are difficult for both."""
    hard = np.random.default_rng(0).normal(4, 0.5, 60)
    noise = np.random.default_rng(1).normal(0, 0.05, (2, 60))
    first, second = losses(list(hard + noise[0]), [1.0] * 60), losses(list(hard - 0.1 + noise[1]), [1.0] * 60)
    row, other = summarize([("a", [first]), ("b", [second])])
    widths = [item["high"] - item["low"] for item in (row, other)]
    paired = other["difference_high"] - other["difference_low"]
    assert paired < 0.25 * np.hypot(*widths)
    assert other["difference_low"] < other["difference"] < other["difference_high"] < 0
    assert row["high"] > other["low"]  # not significant without pairing


def test_equal_measurements_have_no_difference():
    measurement = losses([4.0, 5.0, 3.0, 4.5, 4.0], [1.0] * 5)
    other = summarize([("a", [measurement]), ("b", [measurement])])[1]
    assert (other["difference"], other["difference_low"], other["difference_high"]) == (0, 0, 0)


def test_variance_between_runs_widens_the_interval():
    """Even if all examples of a run are equal; and 0 successes in 20 examples do not prove a score of 0."""
    runs = [("a", [scores([0] * 20)]), ("a", [scores([1] * 20)])]
    row = summarize(runs)[0]
    assert (row["value"], row["low"], row["high"]) == (50, 0, 100)
    assert summarize(runs[:1])[0]["low"] == 0
    assert 10 < summarize(runs[:1])[0]["high"] < 25  # 1 - 0.05 ** (1 / 20) is 14%, Wilson's 16%


def test_examples_that_do_not_count_have_no_effect():
    row = summarize([("a", [losses([6.0, 0.0, 3.0, 0.0], [2.0, 0.0, 1.0, 0.0])])])[0]
    assert (row["value"], row["low"], row["high"]) == (
        3,
        3,
        3,
    )  # bootstrap samples without counted examples are dropped
    assert row["examples"] == 4


def test_measurements_without_counted_examples_have_no_row():
    empty = losses([0.0, 0.0], [0.0, 0.0])
    assert summarize([("a", [empty])]) == []
    rows = summarize([("a", [empty]), ("b", [losses([2.0, 4.0], [1.0, 1.0])])])
    assert [(row["model"], row["value"], row["difference"]) for row in rows] == [("b", 3, None)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (scores([1, 0, 1]), scores([1, 1])),
        (scores([1, 0, 1], sample="first texts"), scores([1, 1, 0], sample="other texts")),
        (losses([3.0], [1.0]), losses([4.0], [1.0])),  # a single document has no variance
    ],
)  # fmt: skip
def test_different_examples_have_no_difference(one, other):
    _, second = summarize([("a", [one]), ("b", [other])])
    assert [second[key] for key in ("difference", "difference_low", "difference_high", "paired")] == [None] * 4
    assert second["value"] == pytest.approx(other.value)
    assert (second["low"] is None) == (len(other.numerators) == 1)
    pooled = summarize([("a", [one]), ("a", [other])])[0]  # nor are runs with different examples combined
    assert pooled["value"] == pytest.approx((one.value + other.value) / 2)
    assert pooled["low"] is None


@pytest.mark.parametrize(
    ("metric", "fields", "value", "higher"),
    [
        ("perplexity", {"task": "harness", "aggregation": "perplexity"}, math.exp(3), False),
        ("ppl,none", {"task": "harness", "aggregation": "perplexity", "higher_is_better": False}, math.exp(3), False),
        ("wer", {"task": "harness", "aggregation": "mean", "higher_is_better": False}, 3, False),
        ("brier_score", {"task": "harness", "aggregation": "mean", "higher_is_better": False}, 3, False),
        ("acc", {"task": "harness", "aggregation": "mean"}, 3, True),
        ("attention", {"task": "attention"}, 300, None),
        ("loss", {"task": "perplexity"}, 3, False),
    ],
)  # fmt: skip
def test_aggregation_and_direction_of_metrics(metric, fields, value, higher):
    row = summarize([("a", [Measurement(metric=metric, numerators=[2.0, 4.0], denominators=[1.0, 1.0], **fields)])])[0]
    assert row["value"] == pytest.approx(value)
    assert row["higher_is_better"] is higher


def test_rows_are_reproducible():
    successes = [np.random.default_rng(seed).uniform(size=30) < 0.5 for seed in range(4)]
    runs = [("ab"[place % 2], [scores(values), scores(values, length=1024)]) for place, values in enumerate(successes)]
    assert summarize(runs) == summarize(runs)


def test_select():
    rows = summarize([("a", [scores([1, 0]), scores([1, 1], length=1024), scores([0, 1], depth=0.5)])])
    assert [row["length"] for row in select(rows, depth=None)] == [512, 1024]
    assert [row["value"] for row in select(rows, depth=0.5, length=512)] == [50]
    assert select([{**rows[0], "value": None}]) == []
