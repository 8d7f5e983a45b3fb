"""Building blocks of plots: figures with panels, curves with intervals, and axes of lengths and positions.

A model has the same colour and marker in all plots. The colours are Okabe and Ito's colour-blind safe palette, without
its yellow, which has little contrast on white.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from PIL import Image

from ropepp_lit.eval.results import select

WIDTH = 7.2
"""Width of every figure in inches; on the page (700 pixels wide) a 10 pt font is 13 pixels high."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#8c6d31")
MARKERS = "os^DvPX"
GREY = "#6b7280"
MAX_BANDS = 4
"""Maximum number of models for which intervals are drawn as bands; more would cover each other."""

HEADS = ("real", "imaginary")
OWN_SECTION = ("perplexity", "retrieval", "attention", "answers", "harness")
"""Tasks with a specific section and plots."""

Row = dict[str, Any]


class _Style(NamedTuple):
    colour: str
    marker: str
    shift: float  # horizontal offset of error bars, from -1 to 1, so that those of different models do not overlap


def model_names(results: dict[str, Any]) -> list[str]:
    """Return the unique names of the models, in the order of their first run."""
    return list(dict.fromkeys(model["name"] for model in results["models"]))


def name_of_part(row: Row) -> str:
    """Return the name of a part for readers; numbers, such as pairs of `recall`, are prefixed with the task."""
    return f"{row['task']}:{row['part']}" if row["part"].isdecimal() else row["part"].replace("_", " ")


def other_tasks(results: dict[str, Any]) -> list[str]:
    """Return the tasks with generic sections and plots, in the order of their first row."""
    return list(dict.fromkeys(row["task"] for row in results["scores"] if row["task"] not in OWN_SECTION))


def trained_contexts(results: dict[str, Any]) -> dict[int, list[str]]:
    """Return names of models by training context length."""
    contexts: dict[int, list[str]] = {}
    for model in results["models"]:
        if model.get("context_length") and model["name"] not in contexts.setdefault(model["context_length"], []):
            contexts[model["context_length"]].append(model["name"])
    return contexts


def short_length(tokens: float) -> str:
    """Format a length as 512, 1k, 2k, …; k stands for 1,024."""
    return f"{tokens // 1024:.12g}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,.12g}"


def to_png(figure: Figure) -> bytes:
    """Render a figure as a PNG, with a higher resolution than on the page, and 256 colours to reduce its size."""
    rendered, compressed = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # for names with characters that the font lacks
        figure.savefig(rendered, format="png", dpi=160, facecolor="white")
    with Image.open(rendered) as image:
        image.convert("RGB").quantize(256).save(compressed, format="png", optimize=True)
    return compressed.getvalue()


def styles_of(results: dict[str, Any]) -> dict[str, _Style]:
    """Return colour and marker of each model, by name."""
    names = model_names(results)
    return {
        name: _Style(
            COLOURS[index % len(COLOURS)],
            MARKERS[index % len(MARKERS)],
            2 * index / max(len(names) - 1, 1) - 1 if len(names) > 1 else 0.0,
        )
        for index, name in enumerate(names)
    }


def make_grid(
    results: dict[str, Any], rows: list[Row], *, height: float, lines: int = 1, columns: int = 1, sharey: Any = True
) -> tuple[Figure, np.ndarray]:
    """Create a figure with panels [lines, columns], and a legend of the models in `rows`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=sharey, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
    shown = {row["model"] for row in rows}
    styles = {name: style for name, style in styles_of(results).items() if name in shown}
    if styles:
        handles = [
            Line2D([], [], color=style.colour, marker=style.marker, markersize=5, linewidth=1.8)
            for style in styles.values()
        ]
        labels = [short_name(name) for name in styles]
        legend_columns = max(1, min(len(labels), 95 // (max(map(len, labels)) + 7)))
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=legend_columns, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure, grid


def fill_panels(grid: np.ndarray, names: Sequence[str]) -> Iterable[tuple[str, Axes]]:
    """Assign a panel to each name; unused panels are removed, and the lowest of each column gets tick labels."""
    panels = list(grid.ravel())
    for axes in panels[len(names) :]:
        axes.remove()
    for index, axes in enumerate(panels[: len(names)]):
        if index + grid.shape[1] >= len(names):
            axes.tick_params(labelbottom=True)
    return zip(names, panels, strict=False)


def short_name(name: str, max_length: int = 36) -> str:
    """Shorten a name for a plot; a leading underscore, with which matplotlib would skip the label, gets a space."""
    name = " ".join(name.split())
    name = name if len(name) <= max_length else f"{name[: max_length - 1]}…"
    return f" {name}" if name.startswith("_") else name


def draw_curves(
    axes: Axes,
    results: dict[str, Any],
    rows: list[Row],
    *,
    x: str,
    of: str = "value",
    spread: str = "band",
    marker_size: float = 4.5,
) -> None:
    """Draw a line for each model, with its intervals, and the values of single runs as small dots.

    Args:
        axes: The panel.
        results: Results, which define the colours of the models.
        rows: Result rows to draw.
        x: Column of the x axis.
        of: Column of the y axis: `value` or `difference`.
        spread: Style of the intervals: `band` (only with up to MAX_BANDS models; `bars` if there is a single x value),
            `bars`, or empty for none.
        marker_size: Size of the markers in points.
    """
    present = {row["model"] for row in rows}
    if spread == "band" and len({row[x] for row in rows}) == 1:
        spread = "bars"
    low_key, high_key = ("low", "high") if of == "value" else (f"{of}_low", f"{of}_high")
    for name, style in styles_of(results).items():
        if name not in present:
            continue
        own = sorted(select(rows, model=name), key=lambda row: row[x])
        xs, values, low, high = (np.array([row[key] for row in own], float) for key in (x, of, low_key, high_key))
        if spread == "bars":
            xs = xs * 2 ** (min(0.05 * len(present), 0.3) * style.shift)
            ends = np.abs(np.array([values - low, high - values]))
            axes.errorbar(xs, values, ends, color=style.colour, capsize=3, linewidth=1.2, fmt="none")
        elif spread == "band" and len(present) <= MAX_BANDS:
            axes.fill_between(xs, low, high, color=style.colour, alpha=0.13, linewidth=0)
        axes.plot(xs, values, color=style.colour, marker=style.marker, markersize=marker_size, linewidth=1.6)
        for position, row in zip(xs, own, strict=True) if of == "value" and spread else ():
            single = row.get("run_values") or []
            if len(single) > 1:
                axes.plot([position] * len(single), single, ".", color=style.colour, alpha=0.5, markersize=3.5)


def length_axis(
    axes: Axes, results: dict[str, Any], rows: list[Row], *, label: bool = True, max_ticks: int = 10
) -> None:
    """Set a logarithmic x axis with the lengths as ticks, and mark the training context lengths."""
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    shown = lengths[:: -(-len(lengths) // max_ticks)]
    axes.set_xticks(shown, [short_length(length) for length in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    contexts = trained_contexts(results)
    ends = [*lengths, *contexts]
    axes.set_xlim(min(ends) / 2**0.25, max(ends) * 2**0.25)
    mark_trained(axes, results, rows, label=label)


def log2_axis(axes: Axes, positions: Iterable[int]) -> None:
    """Set a logarithmic x axis that includes 0, with labels at up to seven of the positions."""
    ticks = sorted(set(positions))
    axes.set_xscale("symlog", base=2, linthresh=max(1, min((tick for tick in ticks if tick), default=1)))
    step = -(-len(ticks) // 7)
    axes.set_xticks(ticks[::step], [short_length(tick) for tick in ticks[::step]])
    axes.xaxis.set_minor_locator(NullLocator())


def mark_trained(
    axes: Axes, results: dict[str, Any], rows: list[Row], *, last: float = np.inf, label: bool = True
) -> None:
    """Draw vertical lines at the training context lengths, grey or in the colour of the only model with that length."""
    styles = styles_of(results)
    shown = {row["model"] for row in rows}
    contexts = {
        length: [name for name in names if name in shown] for length, names in trained_contexts(results).items()
    }
    contexts = {length: names for length, names in contexts.items() if names and length < last}
    for length, names in contexts.items():
        colour = styles[names[0]].colour if len(names) == 1 and len(contexts) > 1 else GREY
        axes.axvline(length, color=colour, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        if label:
            is_right = axes.transAxes.inverted().transform(axes.transData.transform((length, 0)))[0] > 0.5
            axes.annotate(
                f"trained: {short_length(length)}", (length, 1), xycoords=axes.get_xaxis_transform(),
                xytext=(-4 if is_right else 4, 0), textcoords="offset points", va="top", fontsize=8, color=colour,
                ha="right" if is_right else "left",
            )  # fmt: skip
