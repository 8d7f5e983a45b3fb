"""What plots are made of: a figure and its panels, curves with intervals, axes of lengths and positions.

A model has one colour and one marker in all plots. Colours are Okabe and Ito's, which people with colour-blindness
can tell apart, less their yellow, which is faint on white.
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
"""Inches of every figure: at the 700 pixels that a page shows, letters of 10 points are 13 pixels high."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#8c6d31")
MARKERS = "os^DvPX"
GREY = "#6b7280"
MOST_BANDS = 4
"""More models than these, and bands of their intervals would hide one another."""

HEADS = ("real", "imaginary")
OWN_SECTION = ("perplexity", "retrieval", "attention", "answers", "harness")
"""Tasks that have a section of the page and plots of their own."""

Row = dict[str, Any]


class _Style(NamedTuple):
    colour: str
    marker: str
    shift: float  # from -1 to 1: where a lone point stands among those of the other models


def model_names(results: dict[str, Any]) -> list[str]:
    """The models' names, each once, in the order of their first run."""
    return list(dict.fromkeys(model["name"] for model in results["models"]))


def name_of_part(row: Row) -> str:
    """The part of a task, as readers see it; a number, such as pairs of `recall`, with its task."""
    return f"{row['task']}:{row['part']}" if row["part"].isdecimal() else row["part"].replace("_", " ")


def other_tasks(results: dict[str, Any]) -> list[str]:
    """The tasks that have no section and plots of their own, in the order of their first row."""
    return list(dict.fromkeys(row["task"] for row in results["scores"] if row["task"] not in OWN_SECTION))


def trained_contexts(results: dict[str, Any]) -> dict[int, list[str]]:
    """Names of models by the tokens of the context that they were trained with."""
    contexts: dict[int, list[str]] = {}
    for model in results["models"]:
        if model.get("context_length") and model["name"] not in contexts.setdefault(model["context_length"], []):
            contexts[model["context_length"]].append(model["name"])
    return contexts


def short_length(tokens: float) -> str:
    """512, 1k, 2k, …: k stands for 1,024."""
    return f"{tokens // 1024:.12g}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,.12g}"


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG, of more than one pixel for each that a page shows, in 256 colours to be small."""
    drawn, written = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks: boxes
        figure.savefig(drawn, format="png", dpi=160, facecolor="white")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256).save(written, format="png", optimize=True)
    return written.getvalue()


def styles_of(results: dict[str, Any]) -> dict[str, _Style]:
    """Colour and marker of each model, by name."""
    names = model_names(results)
    return {
        name: _Style(
            COLOURS[place % len(COLOURS)],
            MARKERS[place % len(MARKERS)],
            2 * place / max(len(names) - 1, 1) - 1 if len(names) > 1 else 0.0,
        )
        for place, name in enumerate(names)
    }


def make_grid(
    results: dict[str, Any], rows: list[Row], *, height: float, lines: int = 1, columns: int = 1, sharey: Any = True
) -> tuple[Figure, np.ndarray]:
    """A figure, its panels [lines, columns], and over them the names of the models that the rows are of."""
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


def fill_panels(grid: np.ndarray, things: Sequence[str]) -> Iterable[tuple[str, Axes]]:
    """A panel for each thing; those left over are taken away, and the ones above them get their labels."""
    panels = list(grid.ravel())
    for axes in panels[len(things) :]:
        axes.remove()
    for place, axes in enumerate(panels[: len(things)]):
        if place + grid.shape[1] >= len(things):
            axes.tick_params(labelbottom=True)
    return zip(things, panels, strict=False)


def short_name(name: str, most: int = 36) -> str:
    """A name as a plot shows it; matplotlib leaves labels out that begin with an underscore."""
    name = " ".join(name.split())
    name = name if len(name) <= most else f"{name[: most - 1]}…"
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
    """For each model a line, its intervals, and as small dots the values of single runs.

    Args:
        axes: The panel.
        results: Gives the models' colours.
        rows: What to draw.
        x: The column along the panel.
        of: The column upwards: `value` or `difference`.
        spread: How intervals are drawn: as a `band`, if there are no more than MOST_BANDS models; as `bars`, side by
            side, as they also are at a lone point; or not (empty).
        marker_size: Points.
    """
    present = {row["model"] for row in rows}
    if spread == "band" and len({row[x] for row in rows}) == 1:
        spread = "bars"
    low_key, high_key = ("low", "high") if of == "value" else (f"{of}_low", f"{of}_high")
    for name, style in styles_of(results).items():
        if name not in present:
            continue
        own = sorted(select(rows, model=name), key=lambda row: row[x])
        places, values, low, high = (np.array([row[key] for row in own], float) for key in (x, of, low_key, high_key))
        if spread == "bars":
            places = places * 2 ** (min(0.05 * len(present), 0.3) * style.shift)
            ends = np.abs(np.array([values - low, high - values]))
            axes.errorbar(places, values, ends, color=style.colour, capsize=3, linewidth=1.2, fmt="none")
        elif spread == "band" and len(present) <= MOST_BANDS:
            axes.fill_between(places, low, high, color=style.colour, alpha=0.13, linewidth=0)
        axes.plot(places, values, color=style.colour, marker=style.marker, markersize=marker_size, linewidth=1.6)
        for place, row in zip(places, own, strict=True) if of == "value" and spread else ():
            single = row.get("run_values") or []
            if len(single) > 1:
                axes.plot([place] * len(single), single, ".", color=style.colour, alpha=0.5, markersize=3.5)


def length_axis(axes: Axes, results: dict[str, Any], rows: list[Row], *, label: bool = True, most: int = 10) -> None:
    """A logarithmic axis of the lengths there are, with a mark where models were trained."""
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    shown = lengths[:: -(-len(lengths) // most)]
    axes.set_xticks(shown, [short_length(length) for length in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    contexts = trained_contexts(results)
    ends = [*lengths, *contexts]
    axes.set_xlim(min(ends) / 2**0.25, max(ends) * 2**0.25)
    mark_trained(axes, results, rows, label=label)


def log2_axis(axes: Axes, places: Iterable[int]) -> None:
    """A logarithmic axis that holds 0 too, with labels at some of the places."""
    shown = sorted(set(places))
    axes.set_xscale("symlog", base=2, linthresh=max(1, min((place for place in shown if place), default=1)))
    step = -(-len(shown) // 7)
    axes.set_xticks(shown[::step], [short_length(place) for place in shown[::step]])
    axes.xaxis.set_minor_locator(NullLocator())


def mark_trained(
    axes: Axes, results: dict[str, Any], rows: list[Row], *, last: float = np.inf, label: bool = True
) -> None:
    """Upright lines at the contexts that models were trained with: grey, or in the colour of the one it belongs to."""
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
