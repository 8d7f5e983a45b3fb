"""Tables of the evaluation page, as data for the template `page.html`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ropepp_lit.eval.report.panels import HEADS, Row, model_names

DIGITS = {
    "loss": 3,
    "bits_per_byte": 3,
    "perplexity": 2,
    "score": 1,
    "attention": 2,
    "more_context": 0,
    "exact": 1,
    "rouge_l": 1,
    "percent": 1,
}
"""Decimal places by metric; others have four."""


def show_value(metric: str, value: float, *, signed: bool = False) -> str:
    """Format a value for a table, with a typographic minus sign."""
    metric = metric.partition(",")[0]  # lm-eval appends the filter after a comma
    digits = DIGITS.get(metric, 4)
    if metric == "perplexity" and abs(value) >= 1000:
        digits = 0
    text = f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text.lstrip("+−")  # no sign before a 0


def by_length(
    caption: str, rows: list[Row], results: dict[str, Any], *, group: Callable[[Row], str] = lambda row: ""
) -> dict[str, Any] | None:
    """Create a table with a column for each length; see :func:`make_table`."""
    return make_table(
        f"{caption}, by length in tokens",
        rows,
        results,
        across=lambda row: row["length"],
        heading=lambda row: f"{row['length']:,}",
        line=lambda row: row["model"],
        corner="Model",
        group=group,
        trained=common_context(results),
    )


def make_table(
    caption: str,
    rows: list[Row],
    results: dict[str, Any],
    *,
    across: Callable[[Row], Any],
    heading: Callable[[Row], str],
    line: Callable[[Row], str],
    corner: str,
    group: Callable[[Row], str] = lambda row: "",
    trained: int | None = None,
) -> dict[str, Any] | None:
    """Create the data of a table; None if there are no rows.

    Args:
        caption: Title of the table.
        rows: Result rows, one for each cell.
        results: Results, which define the order of the models.
        across: Key that identifies and sorts the column of a row.
        heading: Heading of the column of a row.
        line: Heading of the line of a row.
        corner: Heading of the column with the line headings.
        group: Heading of the group of lines of a row.
        trained: Key of the column that is marked as the training context length.
    """
    if not rows:
        return None
    names = model_names(results)
    head_order = {"": 0, **{heads: index for index, heads in enumerate(HEADS, 1)}}
    ordered = sorted(rows, key=lambda row: (names.index(row["model"]), head_order.get(row["heads"], len(head_order))))
    columns = {across(row): heading(row) for row in ordered}
    groups: dict[str, dict[str, dict[Any, dict[str, str]]]] = {}
    for row in rows:
        groups.setdefault(group(row), {})
    for row in ordered:
        groups[group(row)].setdefault(line(row), {})[across(row)] = make_cell(row)
    return {
        "caption": caption,
        "corner": corner,
        "columns": [{"text": columns[key], "trained": key == trained} for key in sorted(columns)],
        "groups": [
            {
                "heading": heading,
                "lines": [
                    {"head": head, "cells": [cells.get(key) for key in sorted(columns)]}
                    for head, cells in lines.items()
                ],
            }
            for heading, lines in groups.items()
        ],
    }


def make_cell(row: Row) -> dict[str, str]:
    """Format a cell: value, interval, difference to the first model, its interval, and a mark if it is significant."""
    metric = _format_key(row)
    difference, low, high = (row[key] for key in ("difference", "difference_low", "difference_high"))
    cell = {"value": show_value(metric, row["value"]), "interval": "", "difference": "", "spread": "", "mark": ""}
    if row["low"] is not None and row["high"] is not None:
        cell["interval"] = f"[{show_value(metric, row['low'])}, {show_value(metric, row['high'])}]"
    if difference is not None and low is not None and high is not None:
        cell["difference"] = show_value(metric, difference, signed=True)
        cell["spread"] = f"[{show_value(metric, low, signed=True)}, {show_value(metric, high, signed=True)}]"
        cell["mark"] = _verdict(row)
    return cell


def _format_key(row: Row) -> str:
    """Return the key of :data:`DIGITS` for a row."""
    return "percent" if row["details"].get("unit") == "%" else row["metric"]


def _verdict(row: Row) -> str:
    """Return `better`, `worse`, or `differs` (for metrics without a direction) if the interval excludes 0.

    A difference that is rounded to 0 gets no mark.
    """
    if row["difference_low"] <= 0 <= row["difference_high"]:
        return ""
    if not show_value(_format_key(row), row["difference"]).strip("−0."):
        return ""
    if row["higher_is_better"] is None:
        return "differs"
    return "better" if (row["difference"] > 0) == row["higher_is_better"] else "worse"


def common_context(results: dict[str, Any]) -> int | None:
    """Return the training context length that all models share; None if they differ or one is unknown."""
    contexts = {model["context_length"] for model in results["models"]}
    return contexts.pop() if len(contexts) == 1 else None
