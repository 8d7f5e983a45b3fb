"""Sections of the evaluation page: one for each kind of task, with tables, plots and descriptions."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

from ropepp_lit.eval.report.captions import CAPTIONS, DIFFERENCES, FAMILIES, METRICS, TASKS, UNITS
from ropepp_lit.eval.report.examples import Examples
from ropepp_lit.eval.report.panels import Row, model_names, name_of_part, other_tasks
from ropepp_lit.eval.report.tables import by_length, make_table
from ropepp_lit.eval.results import CLEAN, select


@dataclass(kw_only=True)
class Section:
    """Content of a section; `more` are collapsed tables."""

    id: str
    title: str
    text: str
    tables: list[dict[str, Any]] = field(default_factory=list)
    more: list[dict[str, Any]] = field(default_factory=list)
    plots: list[dict[str, str]] = field(default_factory=list)
    maps: list[dict[str, str]] = field(default_factory=list)
    families: dict[str, str] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] | None = None
    """Plain table of settings: `caption`, `columns`, `lines`."""


def make_sections(
    results: dict[str, Any], *, plots: dict[str, bytes], maps: dict[str, bytes], examples: Examples
) -> list[Section]:
    """Create the sections that are not empty; see :func:`~ropepp_lit.eval.report.page.render_page`."""
    sections = [_perplexity(results, plots), _retrieval(results, plots)]
    sections += [_other(results, plots, task) for task in other_tasks(results)]
    sections += [_noise(results, plots), _attention(results, plots, maps), _answers(results), _harness(results)]
    for section in sections:
        section.examples = [part for (task, _), part in examples.items() if section.id in (task, f"task-{task}")]
    return [section for section in sections if section.tables or section.plots or section.maps]


def _perplexity(results: dict[str, Any], plots: dict[str, bytes]) -> Section:
    rows = select(results["scores"], task="perplexity", part="", **CLEAN)
    details = (_counts(rows, "documents"), _more_context(rows, model_names(results)))
    section = Section(
        id="perplexity",
        title="Loss and perplexity by length",
        text=" ".join(("How well the models predict the next token of long texts.", *filter(None, details))),
        plots=_images(results, plots, "loss-by-length", "loss-by-position"),
    )
    tables = {metric: by_length(_title(metric), select(rows, metric=metric), results) for metric in METRICS}
    sets = [row for row in select(results["scores"], task="perplexity", metric="loss", **CLEAN) if row["part"]]
    by_set = by_length(f"{_title('loss')}, each set of documents", sets, results, group=_set_of)
    section.tables = [table for table in [tables.pop("loss"), by_set] if table]
    section.more = [table for table in tables.values() if table]
    return section


def _set_of(row: Row) -> str:
    return f"{row['part']} ({row['examples']:,} documents)"


def _more_context(rows: list[Row], names: list[str]) -> str:
    """Describe the share of the tokens with more context at each length than at the previous length."""
    shares = select(rows, metric="more_context")
    first = next((name for name in names if select(shares, model=name)), None)
    at_lengths = [
        f"{row['value']:.0f}% at {row['length']:,}"
        for row in sorted(select(shares, model=first), key=lambda row: row["length"])
    ]
    if not at_lengths:
        return ""
    return (
        "All lengths are measured on the same tokens, but a longer window gives only a part of them more context: "
        f"{listed(at_lengths)} tokens, each compared with the previous length. The plot by position shows the loss of "
        "tokens with a long context."
    )


def _retrieval(results: dict[str, Any], plots: dict[str, bytes]) -> Section:
    rows = select(results["scores"], task="retrieval", metric="score", **CLEAN)
    families = list(dict.fromkeys(row["part"] for row in rows if row["part"] != "all"))
    section = Section(
        id="retrieval",
        title="Retrieval by length",
        text=f"Whether the models find information in a long context. {_counts(rows, 'examples')}",
        plots=_images(results, plots, "retrieval-by-length", "retrieval-families", "retrieval-by-depth"),
        families={family.replace("_", " "): FAMILIES[family] for family in families if family in FAMILIES},
    )
    overall = by_length("Score (0 to 100), all families", select(rows, part="all"), results)
    single = [row for row in rows if row["part"] != "all"]
    by_family = by_length(
        "Score (0 to 100), each family", single, results, group=lambda row: row["part"].replace("_", " ")
    )
    tables = [table for table in (overall, by_family) if table]
    section.tables, section.more = tables[:1], tables[1:]
    return section


def _other(results: dict[str, Any], plots: dict[str, bytes], task: str) -> Section:
    """Create the generic section of a task: for each metric a table by length (or one value) and one by position."""
    rows = select(results["scores"], task=task, depth=None, heads="", noise_std=None)
    title, text = TASKS.get(task, (task, ""))
    parts = list(dict.fromkeys(row["part"] for row in rows))
    about = {item["part"]: item["text"] for item in results.get("about", []) if item["task"] == task and item["text"]}
    overall = select(rows, position=None)
    section = Section(
        id=f"task-{task}",
        title=title,
        text=" ".join(filter(None, (text, _counts(overall or rows, "examples")))),
        plots=[
            _image(plots[name], f"{_title(name.removeprefix(f'task-{task}-'))}, {title}", "", model_names(results))
            for name in plots
            if name.startswith(f"task-{task}-")
        ],
        families={part.replace("_", " ") or title: about[part] for part in parts if part in about},
    )
    for metric in dict.fromkeys(row["metric"] for row in rows):
        of_metric = select(rows, metric=metric)
        name = _title(metric)
        if metric not in UNITS and (unit := of_metric[0]["details"].get("unit")):
            name = f"{name} ({unit})"
        by_part = [row for row in of_metric if row["position"] is None and row["length"] is not None]
        tables = [
            by_length(name, by_part, results, group=name_of_part),
            _once(name, of_metric, results),
        ]
        section.tables += [table for table in tables if table]
        by_position = make_table(
            f"{name}, by position or distance (first of each range)",
            [row for row in of_metric if row["position"] is not None],
            results,
            across=lambda row: row["position"],
            heading=lambda row: f"{row['position']:,}",
            line=lambda row: row["model"],
            corner="Model",
            group=lambda row: ", ".join(filter(None, (name_of_part(row), _at_length(row)))),
        )
        section.more += [by_position] if by_position else []
    return section


def _once(caption: str, rows: list[Row], results: dict[str, Any]) -> dict[str, Any] | None:
    """Create a table of values without a length, with a column for each model."""
    names = model_names(results)
    return make_table(
        caption,
        [row for row in rows if row["position"] is None and row["length"] is None],
        results,
        across=lambda row: names.index(row["model"]),
        heading=lambda row: row["model"],
        line=lambda row: name_of_part(row) or row["metric"],
        corner="Part",
    )


def _noise(results: dict[str, Any], plots: dict[str, bytes]) -> Section:
    rows = [row for row in select(results["scores"], position=None, depth=None) if row["noise_std"] is not None]
    section = Section(
        id="noise",
        title="Noise on one group of heads",
        text="Results with Gaussian noise on the attention scores of either the real or the imaginary heads, by "
        f"standard deviation of the noise. {_counts(rows, 'examples')}",
        plots=_images(results, plots, "noise-perplexity", "noise-retrieval"),
    )
    for task, metric, part in dict.fromkeys((row["task"], row["metric"], row["part"]) for row in rows):
        tables = section.tables if metric == "loss" or (metric == "score" and part in ("all", "")) else section.more
        others = [task] if task in other_tasks(results) else []
        caption = [_title(metric), *others, *([] if part in ("all", "") else [part.replace("_", " ")]), "by noise"]
        table = make_table(
            ", ".join(caption),
            select(rows, task=task, metric=metric, part=part),
            results,
            across=lambda row: row["noise_std"],
            heading=lambda row: f"{row['noise_std']:g}",
            line=_model_and_heads,
            corner="Model, heads",
            group=_at_length,
        )
        tables += [table] if table else []
    if not section.tables:
        section.tables, section.more = section.more[:1], section.more[1:]
    return section


def _attention(results: dict[str, Any], plots: dict[str, bytes], maps: dict[str, bytes]) -> Section:
    rows = select(results["scores"], task="attention", metric="attention")
    table = make_table(
        "Share of attention (%), by distance (first of each range)",
        rows,
        results,
        across=lambda row: -1 if row["part"] else row["position"],
        heading=lambda row: row["part"] or f"{row['position']:,}",
        line=_model_and_heads,
        corner="Model, heads",
        group=_at_length,
    )
    return Section(
        id="attention",
        title="Attention by distance",
        text=f"Distribution of the attention weights over distances. {_counts(rows, 'documents')}",
        tables=[table] if table else [],
        plots=_images(results, plots, "distance-attention"),
        maps=[{"title": name.removeprefix("attention-"), "src": _data_uri(png)} for name, png in sorted(maps.items())],
    )


def _answers(results: dict[str, Any]) -> Section:
    rows = select(results["scores"], task="answers")
    names = model_names(results)
    table = make_table(
        "Answers to held-out prompts",
        rows,
        results,
        across=lambda row: names.index(row["model"]),
        heading=lambda row: row["model"],
        line=lambda row: _title(row["metric"]),
        corner="Metric",
        group=lambda row: row["part"],
    )
    return Section(
        id="answers",
        title="Answers",
        text="Loss of the expected answers given their prompts, and comparison of generated answers (greedy decoding) "
        "with the expected ones: the share of exact matches, and ROUGE-L, the F-measure of the longest common "
        f"subsequence of words. {_counts(rows, 'prompts')}",
        tables=[table] if table else [],
    )


def _harness(results: dict[str, Any]) -> Section:
    rows = select(results["scores"], task="harness")
    names = model_names(results)
    table = make_table(
        "Tasks of lm-eval",
        rows,
        results,
        across=lambda row: names.index(row["model"]),
        heading=lambda row: row["model"],
        line=_task_and_metric,
        corner="Task, metric",
    )
    facts: dict[str, dict[str, Any]] = {}
    for row in rows:
        facts.setdefault(_task_and_metric(row), {"examples": row["examples"], **row["details"]})
    columns = list(dict.fromkeys(name for line in facts.values() for name in line))
    return Section(
        id="harness",
        title="Public benchmarks",
        text="Results of lm-eval (the Language Model Evaluation Harness), with its prompts, filters and aggregation. "
        "Whether higher or lower is better depends on the metric.",
        tables=[table] if table else [],
        facts={
            "caption": "How the tasks were run",
            "columns": ["Task, metric", *(name.replace("_", " ") for name in columns)],
            "lines": [[head, *(plain(line.get(name)) for name in columns)] for head, line in facts.items()],
        }
        if facts
        else None,
    )


def _task_and_metric(row: Row) -> str:
    """Return the heading of a line: task, metric, filter (lm-eval's `metric,filter`) and length."""
    return ", ".join(filter(None, (row["part"], row["metric"].replace(",", ", "), _at_length(row))))


def _images(results: dict[str, Any], plots: dict[str, bytes], *names: str) -> list[dict[str, str]]:
    models = model_names(results)
    return [
        _image(
            plots[name],
            CAPTIONS[name][0],
            f"{CAPTIONS[name][1]} {DIFFERENCES.get(name, '').format(first=models[0]) if len(models) > 1 else ''}",
            models,
        )
        for name in names
        if name in plots
    ]


def _image(png: bytes, title: str, text: str, models: list[str]) -> dict[str, str]:
    alt = f"{title}: {listed(models)}; the values are in scores.csv"
    return {"src": _data_uri(png), "title": title, "text": text, "alt": alt}


def _counts(rows: list[Row], what: str) -> str:
    """Describe how many examples and runs the values of a section are computed from."""
    if not rows:
        return ""
    fewest, most = min(row["examples"] for row in rows), max(row["examples"] for row in rows)
    examples = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    counts = sorted({row["runs"] for row in rows})
    runs = f"{' or '.join(map(str, counts))} run{'s' if counts != [1] else ''}"
    return f"Each value is computed from {examples} {what} and {runs} of a model."


def _at_length(row: Row) -> str:
    return "" if row["length"] is None else f"{row['length']:,} tokens"


def _model_and_heads(row: Row) -> str:
    return f"{row['model']}, {row['heads']}" if row["heads"] else row["model"]


def _title(metric: str) -> str:
    name = METRICS.get(metric) or metric[:1].upper() + metric[1:].replace("_", " ")
    return f"{name} ({UNITS[metric]})" if metric in UNITS else name


def listed(names: list[str]) -> str:
    """Join names with commas, and `and` before the last one."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def plain(value: Any) -> str:
    """Format a setting for readers; numbers as on the command line."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
