"""Print the tables of an evaluation as Markdown, a line for each model and a column for each length.

python tools/print_tables.py runs/study/pre-trained/results.json runs/study/continued/results.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from ropepp_lit.eval.report.captions import METRICS
from ropepp_lit.eval.report.panels import model_names
from ropepp_lit.eval.report.tables import make_cell
from ropepp_lit.eval.results import CLEAN, select


def table(results: dict[str, Any], title: str, **wanted: Any) -> str:
    rows = select(results["scores"], **wanted, **CLEAN)
    lengths = sorted({row["length"] for row in rows})
    lines = [f"| {' | '.join([title, *(f'{length:,}' for length in lengths)])} |", "|---" * (1 + len(lengths)) + "|"]
    for name in model_names(results):
        cells = [_cell(row) for length in lengths for row in select(rows, model=name, length=length)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    """Value and interval; difference, with a star where its interval excludes 0, and its interval."""
    cell = make_cell(row)
    text = f"{cell['value']} {cell['interval']}".strip()
    if cell["difference"]:
        star = r"\*" if cell["mark"] else ""
        text += f"; {cell['difference']}{star} {cell['spread']}"
    return text


def answers(results: dict[str, Any]) -> str:
    """A line for each model, a column for each metric of answers."""
    rows = select(results["scores"], task="answers")
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines = [
        f"| {' | '.join(['', *(METRICS.get(metric, metric) for metric in metrics)])} |",
        "|---" * (1 + len(metrics)) + "|",
    ]
    for name in model_names(results):
        cells = [_cell(row) for metric in metrics for row in select(rows, model=name, metric=metric)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> str:
    kinds = dict.fromkeys((row["task"], row["part"], row["metric"]) for row in select(results["scores"], **CLEAN))
    shown = [kind for kind in kinds if kind[2] in ("loss", "score") and kind[0] in ("perplexity", "retrieval")]
    return "\n\n".join(
        table(results, f"`{part}`" if part else metric, task=task, part=part, metric=metric)
        for task, part, metric in shown
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}:\n\n{tables(json.loads(Path(name).read_text()))}\n")
