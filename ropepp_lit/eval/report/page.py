"""The page of an evaluation: tables, findings and captions, put into `page.html`."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ropepp_lit.eval.report.captions import BESIDE, CAPTIONS, FAMILIES, METRICS, UNITS
from ropepp_lit.eval.report.panels import MOST_BANDS, Row, model_names, trained_contexts
from ropepp_lit.eval.report.tables import by_length, common_context, make_cell, make_table, show_value
from ropepp_lit.eval.results import CLEAN, select


@dataclass(kw_only=True)
class Section:
    """A heading and what stands below it; `more` are tables that open on a click."""

    id: str
    title: str
    text: str
    tables: list[dict[str, Any]] = field(default_factory=list)
    more: list[dict[str, Any]] = field(default_factory=list)
    plots: list[dict[str, str]] = field(default_factory=list)
    maps: list[dict[str, str]] = field(default_factory=list)
    families: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] | None = None
    """A plain table of how it was measured: `caption`, `columns`, `lines`."""


def render_page(results: dict[str, Any], *, plots: dict[str, bytes], maps: dict[str, bytes]) -> str:
    """One HTML file that needs nothing beside it.

    Args:
        results: As in results.json.
        plots: PNGs by the names in `plots.PLOTS`.
        maps: PNGs of attention maps by the names of their files, without `.png`.
    """
    # No loader: page.html is one template, and every value is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    names = model_names(results)
    sections = [build(results, plots) for build in (_perplexity, _retrieval, _noise)]
    sections += [_attention(results, plots, maps), _answers(results), _harness(results)]
    return template.render(
        title=_listed(names) if len(names) <= 4 else f"{len(names)} models",
        date=_date(results["date"]),
        results=results,
        names=names,
        models=_models(results),
        findings=_findings(results),
        sections=[section for section in sections if section.tables or section.plots or section.maps],
        runs=sorted({row["runs"] for row in results["scores"]} or {1}),
        paired={row["paired"] for row in results["scores"]},
        contexts=trained_contexts(results),
        settings={name: _plain(value) for name, value in results["settings"].items()},
        tasks={row["task"] for row in results["scores"]},
        plotted=bool(plots),
        most_bands=MOST_BANDS,
        noisy=any(row["noise_std"] is not None for row in results["scores"]),
    )


def _perplexity(results: dict[str, Any], plots: dict[str, bytes]) -> Section:
    rows = select(results["scores"], task="perplexity", part="", **CLEAN)
    told = (_counts(rows, "documents"), _more_context(rows, model_names(results)))
    section = Section(
        id="perplexity",
        title="Loss and perplexity by length",
        text=" ".join(("How well the models predict the next token of long texts.", *filter(None, told))),
        plots=_images(results, plots, "loss-by-length", "loss-by-position"),
    )
    tables = {metric: by_length(_title(metric), select(rows, metric=metric), results) for metric in METRICS}
    sets = [row for row in select(results["scores"], task="perplexity", metric="loss", **CLEAN) if row["part"]]
    by_set = by_length(f"{_title('loss')}, each set", sets, results, group=_set_of)
    section.tables = [table for table in [tables.pop("loss"), by_set] if table]
    section.more = [table for table in tables.values() if table]
    return section


def _set_of(row: Row) -> str:
    return f"{row['part']} ({row['examples']:,} documents)"


def _more_context(rows: list[Row], names: list[str]) -> str:
    """Which share of the tokens a length gives more to read than the length before does."""
    shares = select(rows, metric="more_context")
    first = next((name for name in names if select(shares, model=name)), None)
    words = [
        f"{row['value']:.0f}% at {row['length']:,}"
        for row in sorted(select(shares, model=first), key=lambda row: row["length"])
    ]
    if not words:
        return ""
    return (
        "All lengths are measured on the same tokens, and a longer window changes what a token has read only where it "
        f"reaches farther back: {_listed(words)} tokens of the predicted tokens had more to read than at the length "
        "before. The plot by position shows the loss where much was read."
    )


def _retrieval(results: dict[str, Any], plots: dict[str, bytes]) -> Section:
    rows = select(results["scores"], task="retrieval", metric="score", **CLEAN)
    families = list(dict.fromkeys(row["part"] for row in rows if row["part"] != "all"))
    section = Section(
        id="retrieval",
        title="Retrieval by length",
        text=f"Whether the models find what a long context holds. {_counts(rows, 'examples')}",
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


def _noise(results: dict[str, Any], plots: dict[str, bytes]) -> Section:
    rows = [row for row in select(results["scores"], position=None, depth=None) if row["noise_std"] is not None]
    section = Section(
        id="noise",
        title="Noise on one kind of heads",
        text="What it costs when the attention scores of the real heads, or of the imaginary heads, get Gaussian "
        f"noise. Columns: the noise's standard deviation. {_counts(rows, 'examples')}",
        plots=_images(results, plots, "noise-perplexity", "noise-retrieval"),
    )
    for metric, part in dict.fromkeys((row["metric"], row["part"]) for row in rows):
        place = section.tables if metric == "loss" or (metric == "score" and part in ("all", "")) else section.more
        words = [_title(metric), *([] if part in ("all", "") else [part.replace("_", " ")]), "by noise"]
        table = make_table(
            ", ".join(words),
            select(rows, metric=metric, part=part),
            results,
            across=lambda row: row["noise_std"],
            heading=lambda row: f"{row['noise_std']:g}",
            line=_model_and_heads,
            corner="Model, heads",
            group=_at_length,
        )
        place += [table] if table else []
    if not section.tables:
        section.tables, section.more = section.more[:1], section.more[1:]
    return section


def _attention(results: dict[str, Any], plots: dict[str, bytes], maps: dict[str, bytes]) -> Section:
    rows = select(results["scores"], task="attention", metric="attention")
    table = make_table(
        "Share of attention (%), by first distance of the range",
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
        title="Where attention goes",
        text=f"How far back the heads look. {_counts(rows, 'documents')}",
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
        text="The loss of the expected answers after their prompts, and what the model writes itself (the most likely "
        "token each time): how many answers are exactly the expected ones, and ROUGE-L, the F-measure of the longest "
        f"common subsequence of words. {_counts(rows, 'prompts')}",
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
        text="Run by lm-eval (the language model evaluation harness): its prompts, filters and aggregation. Where the "
        "lower value is the better one, as of perplexity, the task says so.",
        tables=[table] if table else [],
        facts={
            "caption": "How the tasks were run",
            "columns": ["Task, metric", *(name.replace("_", " ") for name in columns)],
            "lines": [[head, *(_plain(line.get(name)) for name in columns)] for head, line in facts.items()],
        }
        if facts
        else None,
    )


def _task_and_metric(row: Row) -> str:
    """A line for each task, metric and filter (lm-eval's `metric,filter`), and length."""
    return ", ".join(filter(None, (row["part"], row["metric"].replace(",", ", "), _at_length(row))))


def _findings(results: dict[str, Any]) -> list[dict[str, str]]:
    """For the trained and for the longest context: which model is best, and how sure that is."""
    trained = common_context(results)
    found = []
    for task, part, metric in (("perplexity", "", "loss"), ("retrieval", "all", "score")):
        rows = select(results["scores"], task=task, part=part, metric=metric, **CLEAN)
        lengths = sorted({row["length"] for row in rows})
        for length in lengths:
            if length in (trained, lengths[-1]):
                times = (
                    "" if trained is None else "as trained" if length == trained else f"{length / trained:g} × trained"
                )
                what = "Loss" if metric == "loss" else "Retrieval"
                place = f"{what} at {length:,} tokens{f' ({times})' if times else ''}"
                found.append({"place": place, "text": _best(select(rows, length=length), model_names(results)[0])})
    return found


def _best(rows: list[Row], first: str) -> str:
    """Which of the models' rows is best, beside the first model's, or beside the second best if it is the first's."""
    metric = rows[0]["metric"]
    ranked = sorted(rows, key=lambda row: row["value"] if metric == "loss" else -row["value"])
    best = ranked[0]
    value = show_value(metric, best["value"])
    if len(ranked) == 1:
        own = make_cell(best)["interval"]
        return f"{best['model']} has {value}{f', 95% interval {own}' if own else ''}."
    if value == show_value(metric, ranked[-1]["value"]):
        return f"All models have {value}."
    beside = next((row for row in rows if row["model"] == first), ranked[1])
    second = ranked[1] if best is beside else beside
    compared = make_cell(second if best["model"] == first else best)
    text = f"{best['model']} is {'lowest' if metric == 'loss' else 'highest'} with {value}; {second['model']} has "
    text += f"{show_value(metric, second['value'])}."
    if compared["difference"]:
        text += f" {'Its' if best['model'] == first else 'The'} difference"
        text += f" is {compared['difference']}, 95% interval {compared['spread']}"
        text += "." if compared["mark"] else ", which holds 0: these data do not tell the two apart."
    return text


def _models(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each name, with what its runs have in common, or each of it."""
    lines = []
    for name in model_names(results):
        runs = [model for model in results["models"] if model["name"] == name]
        line: dict[str, Any] = {"name": name, "runs": len(runs)}
        for key in ("positions", "parameters", "context_length", "kv_cache_bytes_per_token", "tokens_seen"):
            values = [f"{run[key]:,}" if isinstance(run[key], int) else _plain(run[key]) for run in runs]
            line[key] = ", ".join(dict.fromkeys(values))
        line["fingerprints"] = [run["fingerprint"].split(":")[-1][:12] for run in runs]
        lines.append(line)
    return lines


def _images(results: dict[str, Any], plots: dict[str, bytes], *names: str) -> list[dict[str, str]]:
    models = model_names(results)
    return [
        {
            "src": _data_uri(plots[name]),
            "title": CAPTIONS[name][0],
            "text": f"{CAPTIONS[name][1]} {BESIDE.get(name, '').format(first=models[0]) if len(models) > 1 else ''}",
            "alt": f"{CAPTIONS[name][0]}, of {_listed(models)}; the values are in scores.csv",
        }
        for name in names
        if name in plots
    ]


def _counts(rows: list[Row], what: str) -> str:
    """How many examples and runs a section's values are of."""
    if not rows:
        return ""
    fewest, most = min(row["examples"] for row in rows), max(row["examples"] for row in rows)
    several = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    runs = sorted({row["runs"] for row in rows})
    of_runs = f"{' or '.join(map(str, runs))} run{'s' if runs != [1] else ''}"
    return f"Each value is of {several} {what} and {of_runs} of a model."


def _at_length(row: Row) -> str:
    return "" if row["length"] is None else f"{row['length']:,} tokens"


def _model_and_heads(row: Row) -> str:
    return f"{row['model']}, {row['heads']}" if row["heads"] else row["model"]


def _title(metric: str) -> str:
    name = METRICS.get(metric, metric.replace("_", " "))
    return f"{name} ({UNITS[metric]})" if metric in UNITS else name


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _date(text: str) -> str:
    date = datetime.fromisoformat(text)
    return f"{date.day} {date:%B %Y, %H:%M} {date.tzname() or ''}".strip()


def _plain(value: Any) -> str:
    """A setting as people write it; a number as it is given to the command."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
