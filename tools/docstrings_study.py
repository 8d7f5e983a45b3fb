"""Fine-tune a model to describe functions: all weights, LoRA, LoRA with imaginary columns, DPO; and compare them.

    python tools/docstrings_study.py --out runs/docstrings                    # trains the quickstart's model first
    python tools/docstrings_study.py --out runs/other --base ec.ckpt --learning_rate 1e-4 --steps 40

All variants use the same pairs, steps and batches; a seed sets the order of the pairs and the initial adapter weights.
The same command resumes. Writes OUT/pairs (tools/docstrings.py), OUT/runs, OUT/page/index.html and OUT/tables.md: the
answers to held-out functions before and after, and the cost of each training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
from docstrings import docstrings
from print_tables import answers
from subcommands import RECIPES, fit, run

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.files import write_whole
from ropepp_lit.train.recipe import recipe_from, to_yaml

BEFORE = "before"
"""Name of the model that is fine-tuned."""


class Variant(NamedTuple):
    """Method of fine-tuning."""

    recipes: list[str]
    """Recipes in recipes/finetune that override docstrings.yaml."""

    options: list[str]
    """Options of `fit`."""

    learning_rate: float
    """Learning rate, relative to that for training all weights."""

    compared_with: str = BEFORE
    """Another variant to compare with."""

    init_from: str = BEFORE
    """Another variant, trained earlier, whose weights of the same seed initialize this one."""

    data: str = "train.jsonl"
    """File of tools/docstrings.py."""


VARIANTS = {
    "full": Variant([], [], 1),
    "LoRA": Variant(["docstrings-lora.yaml"], [], 10, compared_with="full"),
    "LoRA + imaginary": Variant(
        ["docstrings-lora.yaml"], ["--model.lora.train_fully", "[imaginary]"], 10, compared_with="LoRA"
    ),
    "DPO": Variant(
        ["docstrings-dpo.yaml"], [], 1 / 40, compared_with="full", init_from="full", data="preferences.jsonl"
    ),
}
"""Variants by name, in the order of training."""


def study(
    *,
    out: Path,
    base: Path | None = None,
    variants: str = ",".join(VARIANTS),
    seeds: int = 1,
    learning_rate: float = 1e-3,
    steps: int = 150,
    recipes: str = "",
    limit: int = 400,
) -> None:
    """Run the example.

    Args:
        out: Output folder.
        base: Checkpoint to fine-tune; empty means that of the quickstart, trained in OUT/quickstart.
        variants: Comma-separated variants.
        seeds: Number of runs of each variant.
        learning_rate: Learning rate for training all weights; adapters use 10 times this, DPO 1/40.
        steps: Number of optimizer steps.
        recipes: Comma-separated further recipes that override those of the variants.
        limit: Maximum number of held-out functions.
    """
    names = variants.split(",")
    for name in names:
        if name not in VARIANTS:
            sys.exit(f"variants: no variant {name!r}; choose one of {', '.join(VARIANTS)}")
        if VARIANTS[name].init_from not in (BEFORE, *names[: names.index(name)]):
            sys.exit(f"variants: {name} is initialized from {VARIANTS[name].init_from}; name that one before it")
    pairs, runs = out / "pairs", out / "runs"
    if not (pairs / "preferences.jsonl").exists():  # written last
        docstrings(out=pairs)
    if base is None:
        fit(out / "quickstart", [RECIPES / "quickstart.yaml"])
        base = out / "quickstart" / "checkpoints" / "last.ckpt"
    architecture = out / "base.yaml"
    write_whole(architecture, to_yaml(recipe_from(base, read_checkpoint(base)[KEY])))
    common = [architecture, RECIPES / "finetune" / "docstrings.yaml"]
    always = ["--data.tokenizer", str(base), "--trainer.max_steps", str(steps)]
    costs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            variant = VARIANTS[name]
            start = base if variant.init_from == BEFORE else _checkpoint(runs, variant.init_from, seed)
            options = [*always, "--model.init_from", str(start), "--data.source", str(pairs / variant.data)]
            options += [*variant.options, "--seed_everything", str(seed), "--data.seed", str(seed)]
            options += ["--model.optimizer.lr", f"{variant.learning_rate * learning_rate:g}"]
            layers = [*common, *(RECIPES / "finetune" / layer for layer in variant.recipes)]
            layers += map(Path, filter(None, recipes.split(",")))
            print(f"{name}, seed {seed}: {_folder(runs, name, seed)}", flush=True)
            costs[name].append(fit(_folder(runs, name, seed), layers, options))
    checkpoints = {name: [str(_checkpoint(runs, name, seed)) for seed in range(seeds)] for name in names}
    checkpoints = {BEFORE: [str(base)], **checkpoints}
    others = {VARIANTS[name].compared_with for name in names}.intersection(names)
    lines: list[str] = []
    for first in [*sorted(others), BEFORE]:  # the page is that of the last one
        compared = [name for name in names if first in (BEFORE, VARIANTS[name].compared_with)]
        results = _evaluate({name: checkpoints[name] for name in (first, *compared)}, out, limit)
        lines.insert(0, f"Differences are to {first}:\n\n{answers(results)}\n")
    lines.append(_costs(costs, runs))
    write_whole(out / "tables.md", "\n".join(lines))
    print("\n" + "\n".join(lines))
    print(f"Read {out / 'page' / 'index.html'}; the tables are in {out / 'tables.md'}")


def _folder(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name.replace(' ', '')}-{seed}"


def _checkpoint(runs: Path, name: str, seed: int) -> Path:
    return _folder(runs, name, seed) / "checkpoints" / "last.ckpt"


def _evaluate(checkpoints: dict[str, list[str]], out: Path, limit: int) -> dict[str, Any]:
    """Evaluate models by name, with differences to the first; reuses earlier measurements."""
    words = [f"{name}={path}" for name, paths in checkpoints.items() for path in paths]
    tasks = ["--tasks", f"answers:{out / 'pairs' / 'held-out.jsonl'}", "--limit", str(limit)]
    run(["evaluate", *words, *tasks, "--out", str(out / "page")])
    found: dict[str, Any] = json.loads((out / "page" / "results.json").read_text())
    return found


def _costs(costs: dict[str, list[dict[str, Any]]], runs: Path) -> str:
    """Return a table of trained parameters, checkpoint size, seconds and memory of the runs of each variant."""
    lines = ["| | trained | checkpoint | seconds | peak memory |", "|---|---|---|---|---|"]
    for name, found in costs.items():
        path = _checkpoint(runs, name, 0)
        states = read_checkpoint(path)["optimizer_states"][0]["state"].values()
        trained = sum(state["exp_avg"].numel() for state in states)
        size = path.resolve().stat().st_size / 2**20
        seconds, peak = (
            ", ".join("stopped in between" if cost[key] is None else f"{cost[key]:.{digits}f}" for cost in found)
            for key, digits in (("seconds", 0), ("peak_gib", 1))
        )
        lines.append(f"| {name} | {trained:,} | {size:,.1f} MiB | {seconds} | {peak} GiB |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(study, as_positional=False)
    except UsageError as error:
        sys.exit(str(error))
