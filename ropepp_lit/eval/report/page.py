"""The page of an evaluation: tables, findings and captions, put into `page.html`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ropepp_lit.eval.report.examples import Examples
from ropepp_lit.eval.report.panels import MOST_BANDS, Row, model_names, trained_contexts
from ropepp_lit.eval.report.sections import listed, make_sections, plain
from ropepp_lit.eval.report.tables import common_context, make_cell, show_value
from ropepp_lit.eval.results import CLEAN, select


def render_page(results: dict[str, Any], *, plots: dict[str, bytes], maps: dict[str, bytes], examples: Examples) -> str:
    """One HTML file that needs nothing beside it.

    Args:
        results: As in results.json.
        plots: PNGs by the names of `plots.draw`.
        maps: PNGs of attention maps by the names of their files, without `.png`.
        examples: Of :func:`~ropepp_lit.eval.report.examples.choose_examples`.
    """
    # No loader: page.html is one template, and every value is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    names = model_names(results)
    return template.render(
        title=listed(names) if len(names) <= 4 else f"{len(names)} models",
        date=_date(results["date"]),
        results=results,
        names=names,
        models=_models(results),
        findings=_findings(results),
        sections=make_sections(results, plots=plots, maps=maps, examples=examples),
        runs=sorted({row["runs"] for row in results["scores"]} or {1}),
        paired={row["paired"] for row in results["scores"]},
        contexts=trained_contexts(results),
        settings={name: plain(value) for name, value in results["settings"].items()},
        tasks={row["task"] for row in results["scores"]},
        plotted=bool(plots),
        most_bands=MOST_BANDS,
        noisy=any(row["noise_std"] is not None for row in results["scores"]),
    )


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
            values = [f"{run[key]:,}" if isinstance(run[key], int) else plain(run[key]) for run in runs]
            line[key] = ", ".join(dict.fromkeys(values))
        line["fingerprints"] = [run["fingerprint"].split(":")[-1][:12] for run in runs]
        lines.append(line)
    return lines


def _date(text: str) -> str:
    date = datetime.fromisoformat(text)
    return f"{date.day} {date:%B %Y, %H:%M} {date.tzname() or ''}".strip()
