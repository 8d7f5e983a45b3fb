"""Writes the results of an evaluation as JSON, CSV, plots, TensorBoard events and an HTML page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from matplotlib.image import imread

from ropepp_lit.eval.report.examples import choose_examples
from ropepp_lit.eval.report.page import render_page
from ropepp_lit.eval.report.panels import model_names, to_png
from ropepp_lit.eval.report.plots import draw
from ropepp_lit.eval.results import COLUMNS
from ropepp_lit.files import escaped, write_whole

FORMAT_VERSION = 1
ANSWERS = "answers.jsonl"
"""File of the models' answers, which is written before the report."""


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, scores.csv, plots as PNG, TensorBoard events, and the self-contained index.html.

    Each file is written atomically, index.html last. Non-finite numbers become null, and bytes of file names that are
    not UTF-8 are escaped. Files of an earlier report in the folder are replaced, and so is the complete folder
    `tensorboard`. The page includes every attention-*.png in the folder, and examples of answers.jsonl.

    Args:
        results: Dict with `format_version`, `command`, `date` (ISO 8601), `versions` and `settings` (by name),
            `machine` (`device`, `cpu`, `cores`), `models` (a dict for each run with `name`, `path`, `fingerprint`,
            `positions`, `parameters`, `context_length` and `tokens_seen` in tokens, `kv_cache_bytes_per_token` and
            `seconds`, None if unknown; entries with the same name are runs of one model), `notices` (lines for the top
            of the page), `about` (`task`, `part` and `text` of tasks with a description) and `scores` (the rows of
            `summarize`).
        folder: Output folder; created if missing.
    """
    results = _writable(results)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "scores.csv", _csv(results["scores"]))
    plots = {}
    for old in folder.glob("task-*.png"):
        old.unlink()
    for name, figure in draw(results):
        if figure is None:
            (folder / f"{name}.png").unlink(missing_ok=True)
        else:
            plots[name] = to_png(figure)
            write_whole(folder / f"{name}.png", plots[name])
    _write_tensorboard(results, plots, folder / "tensorboard")
    maps = {path.stem: path.read_bytes() for path in folder.glob("attention-*.png")}
    examples = choose_examples(folder / ANSWERS)
    write_whole(folder / "index.html", render_page(results, plots=plots, maps=maps, examples=examples))


def _writable(value: Any) -> Any:
    """Replace non-finite numbers by None, and escape file names that are not UTF-8."""
    if isinstance(value, dict):
        return {key: _writable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(inner) for inner in value]
    if isinstance(value, str):
        return escaped(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_tensorboard(results: dict[str, Any], plots: dict[str, bytes], folder: Path) -> None:
    """Write a run with scalars for each model, and one with images; tags are `task/part/metric`, steps are lengths."""
    from torch.utils.tensorboard import SummaryWriter  # slow import (about 1 s)

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    names = model_names(results)
    try:
        for name, run in zip(names, folder_names(names), strict=True):
            with SummaryWriter(str(partial / run)) as writer:
                for row in results["scores"]:
                    if row["model"] == name and row["value"] is not None:
                        writer.add_scalar(*_tag(row))
        with SummaryWriter(str(partial / "plots")) as writer:
            for name, png in plots.items():
                writer.add_image(name, imread(io.BytesIO(png))[..., :3], 0, dataformats="HWC")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _tag(row: dict[str, Any]) -> tuple[str, float, int]:
    """Return tag, value and step of a row; the step is its position or distance if it has one, otherwise its length."""
    parts = [row["task"], row["part"], row["metric"]]
    if row["noise_std"] is not None:
        parts.append(f"noise_{row['heads']}_{row['noise_std']:g}")
    elif row["heads"]:
        parts.append(row["heads"])
    if row["depth"] is not None:
        parts.append(f"depth_{row['depth']:g}")
    if row["position"] is not None:
        parts.append(f"by_position_{row['length']}" if row["length"] is not None else "by_position")
    step = row["length"] if row["position"] is None else row["position"]
    return "/".join(filter(None, parts)), row["value"], step or 0


def folder_names(names: list[str]) -> list[str]:
    """Convert names of models, which can be any text, to file names that are unique even if case is ignored."""
    folders: list[str] = []
    taken = {"plots"}
    for name in names:
        base = re.sub(r"[^\w+.-]+", "_", name)[:60].strip("._") or "model"
        candidates = (base if not number else f"{base}_{number}" for number in range(len(names) + 1))
        folders.append(next(candidate for candidate in candidates if candidate.lower() not in taken))
        taken.add(folders[-1].lower())
    return folders
