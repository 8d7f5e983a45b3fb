"""Renders the HTML page of an evaluation with the template `page.html`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ropepp_lit.eval.report.examples import Examples
from ropepp_lit.eval.report.panels import MAX_BANDS, Row, model_names, trained_contexts
from ropepp_lit.eval.report.sections import listed, make_sections, plain
from ropepp_lit.eval.report.tables import common_context, make_cell, show_value
from ropepp_lit.eval.results import CLEAN, select


def render_page(results: dict[str, Any], *, plots: dict[str, bytes], maps: dict[str, bytes], examples: Examples) -> str:
    """Render a self-contained HTML page.

    Args:
        results: Content of results.json.
        plots: PNGs by plot name, see :func:`~ropepp_lit.eval.report.plots.draw`.
        maps: PNGs of attention maps by file name, without `.png`.
        examples: Result of :func:`~ropepp_lit.eval.report.examples.choose_examples`.
    """
    # No loader is needed for a single template; every value is escaped.
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
        max_bands=MAX_BANDS,
        noisy=any(row["noise_std"] is not None for row in results["scores"]),
    )


def _findings(results: dict[str, Any]) -> list[dict[str, str]]:
    """Summarize the best model at the training context length and at the longest length, with its uncertainty."""
    trained = common_context(results)
    findings = []
    for task, part, metric in (("perplexity", "", "loss"), ("retrieval", "all", "score")):
        rows = select(results["scores"], task=task, part=part, metric=metric, **CLEAN)
        lengths = sorted({row["length"] for row in rows})
        for length in lengths:
            if length in (trained, lengths[-1]):
                quantity = "Loss" if metric == "loss" else "Retrieval"
                heading = f"{quantity} at {length:,} tokens"
                if trained is not None:
                    multiple = "" if length == trained else f"{length / trained:g} × "
                    heading += f" ({multiple}training length)"
                text = _best(select(rows, length=length), model_names(results)[0])
                findings.append({"heading": heading, "text": text})
    return findings


def _best(rows: list[Row], first: str) -> str:
    """Compare the best model with the first model, or with the second best if the first is the best."""
    metric = rows[0]["metric"]
    ranked = sorted(rows, key=lambda row: row["value"] if metric == "loss" else -row["value"])
    best = ranked[0]
    value = show_value(metric, best["value"])
    if len(ranked) == 1:
        own = make_cell(best)["interval"]
        return f"{best['model']} has {value}{f', 95% interval {own}' if own else ''}."
    if value == show_value(metric, ranked[-1]["value"]):
        return f"All models have {value}."
    reference = next((row for row in rows if row["model"] == first), ranked[1])
    second = ranked[1] if best is reference else reference
    compared = make_cell(second if best["model"] == first else best)
    extreme = "lowest loss" if metric == "loss" else "highest score"
    text = f"{best['model']} has the {extreme} with {value}; {second['model']} has "
    text += f"{show_value(metric, second['value'])}."
    if compared["difference"]:
        text += f" The difference to {first} is {compared['difference']}, 95% interval "
        text += compared["spread"]
        text += "." if compared["mark"] else ", which includes 0: the difference is not significant."
    return text


def _models(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a table row for each model, with the distinct values of its runs."""
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
