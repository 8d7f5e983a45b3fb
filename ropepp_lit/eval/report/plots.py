"""Plots of an evaluation: functions from the results to a figure, or to None if the results have no such rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ropepp_lit.eval.report.captions import UNITS
from ropepp_lit.eval.report.panels import (
    GREY,
    HEADS,
    Row,
    draw_curves,
    fill_panels,
    length_axis,
    log2_axis,
    make_grid,
    mark_trained,
    model_names,
    name_of_part,
    other_tasks,
    short_length,
    short_name,
)
from ropepp_lit.eval.results import CLEAN, select


def loss_by_length(results: dict[str, Any]) -> Figure | None:
    """Plot loss (and perplexity) by window length, and in a second panel the differences to the first model."""
    rows = select(results["scores"], task="perplexity", part="", metric="loss", **CLEAN)
    if not rows:
        return None
    figure, axes = _with_differences(results, rows, xlabel="window length (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.secondary_yaxis("right", functions=(_exp, _log)).set_ylabel("perplexity")
    return figure


def loss_by_position(results: dict[str, Any]) -> Figure | None:
    """Plot the loss by position of the token in the longest windows."""
    rows = [row for row in select(results["scores"], task="perplexity", metric="loss", heads="", noise_std=None)
            if row["position"] is not None]  # fmt: skip
    if not rows:
        return None
    length = max(row["length"] for row in rows)
    rows = [row for row in rows if row["length"] == length]
    starts = sorted({row["position"] for row in rows})
    ends = dict(zip(starts, [*starts[1:], max(length, starts[-1] + 1)], strict=True))
    figure, [[axes]] = make_grid(results, rows, height=3.2)
    middles = [{**row, "middle": (row["position"] + ends[row["position"]]) / 2} for row in rows]
    draw_curves(axes, results, middles, x="middle", marker_size=3)
    later = [row for row in rows if row["position"] > starts[0]] or rows
    lowest, highest = min(row["value"] for row in later), max(row["high"] or row["value"] for row in later)
    margin = 0.15 * (highest - lowest)
    if max(row["value"] for row in rows) > highest + margin > highest:  # the first positions would determine the scale
        axes.set_ylim(lowest - margin, highest + margin)
    widths = [ends[start] - start for start in starts]
    if max(widths) > 4 * min(widths):
        log2_axis(axes, [*starts, length])
    else:
        ticks = np.linspace(0, length, 5)
        axes.set_xticks(ticks, [short_length(tick) for tick in ticks])
    mark_trained(axes, results, rows, last=length)
    axes.set(xlabel=f"position in the window of {length:,} tokens", ylabel="loss (nats per token)")
    return figure


def retrieval_by_length(results: dict[str, Any]) -> Figure | None:
    """Plot the mean retrieval score by context length, and in a second panel the differences to the first model."""
    rows = select(results["scores"], task="retrieval", part="all", metric="score", **CLEAN)
    if not rows:
        return None
    figure, axes = _with_differences(results, rows, xlabel="context length (tokens)")
    axes.set(ylabel="score (0 to 100)", ylim=(-3, 103))
    return figure


def retrieval_families(results: dict[str, Any]) -> Figure | None:
    """Plot the score of each family of retrieval tasks by context length."""
    rows = [row for row in select(results["scores"], task="retrieval", metric="score", **CLEAN) if row["part"] != "all"]
    return _by_part(results, rows) if rows else None


def _by_part(results: dict[str, Any], rows: list[Row], *, x: str = "length") -> Figure:
    """Plot the values of one metric by context length or position, with a panel for each part."""
    families = list(dict.fromkeys(row["part"] for row in rows))
    columns = min(len(families), 4)
    lines = -(-len(families) // columns)
    figure, grid = make_grid(results, rows, height=0.5 + 1.75 * lines, lines=lines, columns=columns)
    for family, axes in fill_panels(grid, families):
        draw_curves(axes, results, select(rows, part=family), x=x, marker_size=3.5, spread="")
        if x == "length":
            length_axis(axes, results, rows, label=False, max_ticks=4)
        else:
            log2_axis(axes, [row["position"] for row in rows])
        if rows[0]["metric"] == "score":
            axes.set(ylim=(-4, 104))
        axes.set_title(name_of_part({**rows[0], "part": family}), fontsize=10, parse_math=False)
    by_position = f"position or distance (tokens, first of each range), at {short_length(rows[0]['length'] or 0)}"
    figure.supxlabel("context length (tokens)" if x == "length" else by_position, fontsize=10)
    metric = rows[0]["metric"]
    unit = f" ({UNITS[metric]})" if metric in UNITS else ""
    figure.supylabel(f"{metric.replace('_', ' ')}{unit}", fontsize=10, parse_math=False)
    return figure


def retrieval_by_depth(results: dict[str, Any], task: str = "retrieval") -> Figure | None:
    """Plot heat maps of the score by context length and depth of the answer, one for each family and model."""
    rows = [row for row in select(results["scores"], task=task, metric="score", heads="", noise_std=None)
            if row["depth"] is not None]  # fmt: skip
    if not rows:
        return None
    names = [name for name in model_names(results) if select(rows, model=name)]
    families = list(dict.fromkeys(row["part"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)  # per family; each family starts on a new line
    panel = 0.75 + 0.24 * max(len(depths), 4)
    height = 0.3 + panel * lines * len(families)
    figure, grid = make_grid(results, [], height=height, lines=lines * len(families), columns=columns)
    for (line, column), axes in np.ndenumerate(grid):
        family, number = families[line // lines], line % lines * columns + column
        if number >= len(names):
            axes.remove()
            continue
        axes.tick_params(labelbottom=line + 1 == len(grid) or number + columns >= len(names))
        scores = np.full((len(depths), len(lengths)), np.nan)
        for row in select(rows, model=names[number], part=family):
            scores[depths.index(row["depth"]), lengths.index(row["length"])] = row["value"]
        axes.grid(False)
        axes.set_facecolor("#d1d5db")  # cells that were not measured
        axes.imshow(scores, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
        axes.tick_params(length=0, labelsize=8)
        title = short_name(f"{family.replace('_', ' ')}: {names[number]}", 72 // columns)
        axes.set_title(title, fontsize=10, parse_math=False)
        for cell, score in np.ndenumerate(scores):
            if np.isfinite(score) and len(lengths) * columns <= 21:
                colour = "white" if score < 55 else "black"
                axes.text(cell[1], cell[0], f"{score:.0f}", ha="center", va="center", fontsize=8, color=colour)
    scale = ScalarMappable(Normalize(0, 100), "cividis")
    figure.colorbar(scale, ax=figure.axes, label="score", shrink=0.9, aspect=18, pad=0.02)
    figure.supxlabel("context length (tokens)", fontsize=10)
    figure.supylabel("depth of the answer (%)", fontsize=10)
    return figure


def noise_perplexity(results: dict[str, Any]) -> Figure | None:
    """Plot the loss by the noise on the attention scores of one group of heads."""
    return _noise(results, task="perplexity", metric="loss", label="loss (nats per token)")


def noise_retrieval(results: dict[str, Any]) -> Figure | None:
    """Plot the retrieval score by the noise on the attention scores of one group of heads."""
    return _noise(results, task="retrieval", metric="score", label="score (0 to 100)")


def attention_by_distance(results: dict[str, Any]) -> Figure | None:
    """Plot the share of attention in each range of distances, for real and imaginary heads."""
    rows = select(results["scores"], task="attention", metric="attention", part="")
    if not rows:
        return None
    figure, panels = _by_heads(results, rows, x="position", title="{} heads")
    for axes in panels:
        log2_axis(axes, [row["position"] for row in rows])
        axes.set_ylim(bottom=0)
    figure.supxlabel("distance (tokens, first of each range)", fontsize=10)
    figure.supylabel("share of attention (%)", fontsize=10)
    return figure


PLOTS: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
    "loss-by-length": loss_by_length,
    "loss-by-position": loss_by_position,
    "retrieval-by-length": retrieval_by_length,
    "retrieval-families": retrieval_families,
    "retrieval-by-depth": retrieval_by_depth,
    "noise-perplexity": noise_perplexity,
    "noise-retrieval": noise_retrieval,
    "distance-attention": attention_by_distance,
}
"""Plot functions by file name; names with `attention-` are reserved for attention maps."""


def draw(results: dict[str, Any]) -> Iterator[tuple[str, Figure | None]]:
    """Yield all plots with their file names; the names of generic plots start with `task-`."""
    for name, plot in PLOTS.items():
        yield name, plot(results)
    for task in other_tasks(results):
        rows = select(results["scores"], task=task, **CLEAN)
        for metric in dict.fromkeys(row["metric"] for row in rows if row["length"] is not None):
            yield f"task-{task}-{metric}", _by_part(results, select(rows, metric=metric))
        yield from _by_position(results, task)
        yield f"task-{task}-by-depth", retrieval_by_depth(results, task)


def _by_position(results: dict[str, Any], task: str) -> Iterator[tuple[str, Figure]]:
    """Yield a plot of each metric of a task by position or distance, at the longest length."""
    rows = select(results["scores"], task=task, depth=None, heads="", noise_std=None)
    rows = [row for row in rows if row["position"] is not None]
    longest = max((row["length"] or 0 for row in rows), default=0)
    rows = [row for row in rows if (row["length"] or 0) == longest]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        yield f"task-{task}-{metric}-by-position", _by_part(results, select(rows, metric=metric), x="position")


def _with_differences(results: dict[str, Any], rows: list[Row], *, xlabel: str) -> tuple[Figure, Axes]:
    """Plot values by length, and the differences to the first model (if there are any) in a second panel."""
    compared = [row for row in rows if row["difference"] is not None]
    figure, grid = make_grid(results, rows, height=3.4, columns=2 if compared else 1, sharey=False)
    for axes in grid.flat:
        length_axis(axes, results, rows, label=axes is grid[0, 0])
    draw_curves(grid[0, 0], results, rows, x="length")
    if compared:
        draw_curves(grid[0, 1], results, compared, x="length", of="difference", spread="bars")
        grid[0, 1].axhline(0, color=GREY, linewidth=1.1, zorder=1)
        grid[0, 1].set_title(f"difference to {short_name(model_names(results)[0], 24)}", fontsize=10, parse_math=False)
    figure.supxlabel(xlabel, fontsize=10)
    return figure, grid[0, 0]


def _noise(results: dict[str, Any], *, task: str, metric: str, label: str) -> Figure | None:
    rows = [row for row in select(results["scores"], task=task, metric=metric, position=None, depth=None)
            if row["noise_std"] is not None]  # fmt: skip
    if not rows:
        return None
    part = "all" if select(rows, part="all") else rows[0]["part"]
    figure, panels = _by_heads(results, select(rows, part=part), x="noise_std", title="noise on {} heads")
    if metric == "score":
        panels[0].set_ylim(-3, 103)
    figure.supxlabel("standard deviation of the noise", fontsize=10)
    figure.supylabel(label, fontsize=10)
    return figure


def _by_heads(results: dict[str, Any], rows: list[Row], *, x: str, title: str) -> tuple[Figure, list[Axes]]:
    """Plot a column of panels for each group of heads and a line of panels, with a common y axis, for each length."""
    groups = [heads for heads in HEADS if select(rows, heads=heads)] or sorted({row["heads"] for row in rows})
    lengths = sorted({row["length"] for row in rows}, key=lambda length: length or 0)
    height = 0.8 + 2.4 * len(lengths)
    figure, grid = make_grid(results, rows, height=height, lines=len(lengths), columns=len(groups), sharey="row")
    for length, panels in zip(lengths, grid, strict=True):
        for heads, axes in zip(groups, panels, strict=True):
            draw_curves(axes, results, select(rows, heads=heads, length=length), x=x)
            suffix = f", {length:,} tokens" if length is not None else ""
            axes.set_title(f"{title.format(heads)}{suffix}", fontsize=10)
    return figure, list(grid.ravel())


def _exp(values: Any) -> Any:
    """Compute the perplexity of a loss, clipped to avoid an overflow at extreme axis limits."""
    return np.exp(np.minimum(values, 700))


def _log(values: Any) -> Any:
    """Compute the logarithm, clipped because matplotlib may evaluate it at 0."""
    return np.log(np.maximum(values, 1e-12))
