"""Plots of an evaluation: one function each, from the results to a figure, or to None where their rows are missing.

A model has one colour and one marker in all of them. Colours are Okabe and Ito's, which people with colour-blindness
can tell apart, less their yellow, which is faint on white.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from PIL import Image

from ropepp_lit.eval.results import CLEAN, select

WIDTH = 7.2
"""Inches of every figure: at the 700 pixels that a page shows, letters of 10 points are 13 pixels high."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#8c6d31")
MARKERS = "os^DvPX"
GREY = "#6b7280"
MOST_BANDS = 4
"""More models than these, and bands of their intervals would hide one another."""

HEADS = ("real", "imaginary")
Row = dict[str, Any]


class _Style(NamedTuple):
    colour: str
    marker: str
    shift: float  # from -1 to 1: where a lone point stands among those of the other models


def model_names(results: dict[str, Any]) -> list[str]:
    """The models' names, each once, in the order of their first run."""
    return list(dict.fromkeys(model["name"] for model in results["models"]))


def trained_contexts(results: dict[str, Any]) -> dict[int, list[str]]:
    """Names of models by the tokens of the context that they were trained with."""
    contexts: dict[int, list[str]] = {}
    for model in results["models"]:
        if model.get("context_length") and model["name"] not in contexts.setdefault(model["context_length"], []):
            contexts[model["context_length"]].append(model["name"])
    return contexts


def short_length(tokens: float) -> str:
    """512, 1k, 2k, …: k stands for 1,024."""
    return f"{tokens // 1024:g}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,g}"


def loss_by_length(results: dict[str, Any]) -> Figure | None:
    """Loss (and perplexity) against the length of the windows; beside it, differences to the first model."""
    rows = select(results["scores"], task="perplexity", part="", metric="loss", **CLEAN)
    if not rows:
        return None
    figure, axes = _with_differences(results, rows, xlabel="length of the window (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.secondary_yaxis("right", functions=(_exp, _log)).set_ylabel("perplexity")
    return figure


def loss_by_position(results: dict[str, Any]) -> Figure | None:
    """Loss of the tokens against their position, inside the longest windows."""
    rows = [row for row in select(results["scores"], task="perplexity", metric="loss", heads="", noise_std=None)
            if row["position"] is not None]  # fmt: skip
    if not rows:
        return None
    length = max(row["length"] for row in rows)
    rows = [row for row in rows if row["length"] == length]
    starts = sorted({row["position"] for row in rows})
    ends = dict(zip(starts, [*starts[1:], max(length, starts[-1] + 1)], strict=True))
    figure, [[axes]] = _grid(results, rows, height=3.2)
    middles = [{**row, "middle": (row["position"] + ends[row["position"]]) / 2} for row in rows]
    _curves(axes, results, middles, x="middle", marker_size=3)
    later = [row for row in rows if row["position"] > starts[0]] or rows
    lowest, highest = min(row["value"] for row in later), max(row["high"] or row["value"] for row in later)
    margin = 0.15 * (highest - lowest)
    if max(row["value"] for row in rows) > highest + margin > highest:  # the start, where little was read, would rule
        axes.set_ylim(lowest - margin, highest + margin)
    widths = [ends[start] - start for start in starts]
    if max(widths) > 4 * min(widths):
        _log2_axis(axes, [*starts, length])
    else:
        ticks = np.linspace(0, length, 5)
        axes.set_xticks(ticks, [short_length(tick) for tick in ticks])
    _mark_trained(axes, results, rows, last=length)
    axes.set(xlabel=f"position inside the window of {length:,} tokens", ylabel="loss (nats per token)")
    return figure


def retrieval_by_length(results: dict[str, Any]) -> Figure | None:
    """The average retrieval score against the length of the context; beside it, differences to the first model."""
    rows = select(results["scores"], task="retrieval", part="all", metric="score", **CLEAN)
    if not rows:
        return None
    figure, axes = _with_differences(results, rows, xlabel="length of the context (tokens)")
    axes.set(ylabel="score (0 to 100)", ylim=(-3, 103))
    return figure


def retrieval_families(results: dict[str, Any]) -> Figure | None:
    """The score of each family of retrieval tasks against the length of the context."""
    rows = [row for row in select(results["scores"], task="retrieval", metric="score", **CLEAN) if row["part"] != "all"]
    families = list(dict.fromkeys(row["part"] for row in rows))
    if not families:
        return None
    columns = min(len(families), 4)
    lines = -(-len(families) // columns)
    figure, grid = _grid(results, rows, height=0.5 + 1.75 * lines, lines=lines, columns=columns)
    for family, axes in _fill(grid, families):
        _curves(axes, results, select(rows, part=family), x="length", marker_size=3.5, spread="")
        _lengths(axes, results, rows, label=False, most=4)
        axes.set(ylim=(-4, 104))
        axes.set_title(family.replace("_", " "), fontsize=10, parse_math=False)
    figure.supxlabel("length of the context (tokens)", fontsize=10)
    figure.supylabel("score (0 to 100)", fontsize=10)
    return figure


def retrieval_by_depth(results: dict[str, Any]) -> Figure | None:
    """Heat maps, one for each model: score by length of the context and by where in it the answer lies.

    Of the average over families where it is there, otherwise of the first family that has depths.
    """
    rows = [row for row in select(results["scores"], task="retrieval", metric="score", heads="", noise_std=None)
            if row["depth"] is not None]  # fmt: skip
    if not rows:
        return None
    part = "all" if select(rows, part="all") else rows[0]["part"]
    rows = select(rows, part=part)
    names = [name for name in model_names(results) if select(rows, model=name)]
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    panel = 0.75 + 0.24 * max(len(depths), 4)
    figure, grid = _grid(results, [], height=0.3 + panel * lines, lines=lines, columns=columns)
    for name, axes in _fill(grid, names):
        scores = np.full((len(depths), len(lengths)), np.nan)
        for row in select(rows, model=name):
            scores[depths.index(row["depth"]), lengths.index(row["length"])] = row["value"]
        axes.grid(False)
        axes.set_facecolor("#d1d5db")  # what was not measured
        axes.imshow(scores, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
        axes.tick_params(length=0, labelsize=8)
        axes.set_title(_label(name, 24), fontsize=10, parse_math=False)
        for place, score in np.ndenumerate(scores):
            if np.isfinite(score) and len(lengths) * columns <= 21:
                colour = "white" if score < 55 else "black"
                axes.text(place[1], place[0], f"{score:.0f}", ha="center", va="center", fontsize=8, color=colour)
    scale = ScalarMappable(Normalize(0, 100), "cividis")
    figure.colorbar(scale, ax=figure.axes, label="score", shrink=0.9, aspect=18, pad=0.02)
    figure.supxlabel("length of the context (tokens)", fontsize=10)
    figure.supylabel("depth of the answer (%)", fontsize=10)
    return figure


def noise_perplexity(results: dict[str, Any]) -> Figure | None:
    """Loss against the noise on the scores of one kind of heads."""
    return _noise(results, task="perplexity", metric="loss", label="loss (nats per token)")


def noise_retrieval(results: dict[str, Any]) -> Figure | None:
    """Retrieval score against the noise on the scores of one kind of heads."""
    return _noise(results, task="retrieval", metric="score", label="score (0 to 100)")


def attention_by_distance(results: dict[str, Any]) -> Figure | None:
    """The share of attention that goes to each range of distances, of real and of imaginary heads."""
    rows = select(results["scores"], task="attention", metric="attention", part="")
    if not rows:
        return None
    figure, panels = _by_heads(results, rows, x="position", title="{} heads")
    for axes in panels:
        _log2_axis(axes, [row["position"] for row in rows])
        axes.set_ylim(bottom=0)
    figure.supxlabel("first distance of the range (tokens back)", fontsize=10)
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
"""By the name of the file; no name begins with `attention-`, as those of attention maps do."""


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG, of more than one pixel for each that a page shows, in 256 colours to be small."""
    drawn, written = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks: boxes
        figure.savefig(drawn, format="png", dpi=160, facecolor="white")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256).save(written, format="png", optimize=True)
    return written.getvalue()


def _with_differences(results: dict[str, Any], rows: list[Row], *, xlabel: str) -> tuple[Figure, Axes]:
    """Values against length, and where there are any, their differences to the first model in a panel beside it."""
    compared = [row for row in rows if row["difference"] is not None]
    figure, grid = _grid(results, rows, height=3.4, columns=2 if compared else 1, sharey=False)
    for axes in grid.flat:
        _lengths(axes, results, rows, label=axes is grid[0, 0])
    _curves(grid[0, 0], results, rows, x="length")
    if compared:
        _curves(grid[0, 1], results, compared, x="length", of="difference", spread="bars")
        grid[0, 1].axhline(0, color=GREY, linewidth=1.1, zorder=1)
        grid[0, 1].set_title(f"difference to {_label(model_names(results)[0], 24)}", fontsize=10, parse_math=False)
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
    """A column of panels for each kind of heads, a line of them for each length; values of a line on one scale."""
    heads = [kind for kind in HEADS if select(rows, heads=kind)] or sorted({row["heads"] for row in rows})
    lengths = sorted({row["length"] for row in rows}, key=lambda length: length or 0)
    height = 0.8 + 2.4 * len(lengths)
    figure, grid = _grid(results, rows, height=height, lines=len(lengths), columns=len(heads), sharey="row")
    for length, panels in zip(lengths, grid, strict=True):
        for kind, axes in zip(heads, panels, strict=True):
            _curves(axes, results, select(rows, heads=kind, length=length), x=x)
            where = f", {length:,} tokens" if length is not None else ""
            axes.set_title(f"{title.format(kind)}{where}", fontsize=10)
    return figure, list(grid.ravel())


def _styles(results: dict[str, Any]) -> dict[str, _Style]:
    names = model_names(results)
    return {
        name: _Style(
            COLOURS[place % len(COLOURS)],
            MARKERS[place % len(MARKERS)],
            2 * place / max(len(names) - 1, 1) - 1 if len(names) > 1 else 0.0,
        )
        for place, name in enumerate(names)
    }


def _grid(
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
    styles = {name: style for name, style in _styles(results).items() if name in shown}
    if styles:
        handles = [
            Line2D([], [], color=style.colour, marker=style.marker, markersize=5, linewidth=1.8)
            for style in styles.values()
        ]
        labels = [_label(name) for name in styles]
        legend_columns = max(1, min(len(labels), 95 // (max(map(len, labels)) + 7)))
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=legend_columns, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure, grid


def _fill(grid: np.ndarray, things: Sequence[str]) -> Iterable[tuple[str, Axes]]:
    """A panel for each thing; those left over are taken away, and the ones above them get their labels."""
    panels = list(grid.ravel())
    for axes in panels[len(things) :]:
        axes.remove()
    for place, axes in enumerate(panels[: len(things)]):
        if place + grid.shape[1] >= len(things):
            axes.tick_params(labelbottom=True)
    return zip(things, panels, strict=False)


def _label(name: str, most: int = 36) -> str:
    """A name as a plot shows it; matplotlib leaves labels out that begin with an underscore."""
    name = " ".join(name.split())
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return f" {name}" if name.startswith("_") else name


def _curves(
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
    for name, style in _styles(results).items():
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


def _lengths(axes: Axes, results: dict[str, Any], rows: list[Row], *, label: bool = True, most: int = 10) -> None:
    """A logarithmic axis of the lengths there are, with a mark where models were trained."""
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    shown = lengths[:: -(-len(lengths) // most)]
    axes.set_xticks(shown, [short_length(length) for length in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    contexts = trained_contexts(results)
    ends = [*lengths, *contexts]
    axes.set_xlim(min(ends) / 2**0.25, max(ends) * 2**0.25)
    _mark_trained(axes, results, rows, label=label)


def _log2_axis(axes: Axes, places: Iterable[int]) -> None:
    """A logarithmic axis that holds 0 too, with labels at some of the places."""
    shown = sorted(set(places))
    axes.set_xscale("symlog", base=2, linthresh=max(1, min((place for place in shown if place), default=1)))
    step = -(-len(shown) // 7)
    axes.set_xticks(shown[::step], [short_length(place) for place in shown[::step]])
    axes.xaxis.set_minor_locator(NullLocator())


def _mark_trained(
    axes: Axes, results: dict[str, Any], rows: list[Row], *, last: float = np.inf, label: bool = True
) -> None:
    """Upright lines at the contexts that models were trained with: grey, or in the colour of the one it belongs to."""
    styles = _styles(results)
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


def _exp(values: Any) -> Any:
    """Perplexity of a loss, for an axis that may begin far away."""
    return np.exp(np.minimum(values, 700))


def _log(values: Any) -> Any:
    """The logarithm that matplotlib may also ask of 0, to find an axis' ends."""
    return np.log(np.maximum(values, 1e-12))
