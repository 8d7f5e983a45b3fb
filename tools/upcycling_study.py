"""Compare continued training of a RoPE model at a longer context with three variants of its conversion to EC.

    python tools/upcycling_study.py --model HuggingFaceTB/SmolLM2-135M --out runs/upcycling
    python tools/upcycling_study.py --model runs/quickstart-rope/checkpoints/last.ckpt --out runs/small --steps 60

All variants use the same text, steps and rows, in an order given by a seed. The same command resumes. Writes OUT/page
(index.html), OUT/curves.png (norm of the imaginary columns of o_proj, and training loss) and OUT/times.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import jsonargparse
import numpy as np
from matplotlib.figure import Figure
from subcommands import RECIPES, fit, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.eval.report.panels import COLOURS
from ropepp_lit.files import write_whole
from ropepp_lit.train.recipe import recipe_from, to_yaml


class Variant(NamedTuple):
    """Way to continue training."""

    start: str
    """Initial checkpoint: `rope` or `ec`."""

    options: list[str]
    """Options of `fit`."""

    learning_rate: float
    """Learning rate, relative to that for training all weights."""


LORA = ["--model.lora.rank", "16", "--model.lora.train_fully", "[imaginary]"]
VARIANTS = {
    "RoPE": Variant("rope", [], 1),
    "EC": Variant("ec", [], 1),
    "EC, imaginary columns": Variant("ec", ["--model.lora.targets", "[]", *LORA[2:]], 10),
    "EC, LoRA and imaginary columns": Variant("ec", LORA, 10),
}
"""Variants by their name on the page."""


def study(
    *,
    model: str,
    out: Path,
    text: str = "builtin",
    factor: int = 2,
    steps: int = 150,
    seeds: int = 1,
    learning_rate: float = 1e-4,
    precision: str = "32-true",
    tasks: str = "perplexity,longppl,recall:4",
    limit: int = 20,
) -> None:
    """Run the comparison.

    Args:
        model: Checkpoint with plain RoPE, Hugging Face folder, or name on the Hub.
        out: Output folder.
        text: Comma-separated files or folders for training and evaluation (held out); `builtin` is Python's library.
        factor: Factor of the context length; the base grows with it, so that the slowest pair rotates as far as before.
        steps: Number of optimizer steps of one row each.
        seeds: Number of runs of each variant.
        learning_rate: Learning rate for training all weights; adapters and columns use 10 times this.
        precision: Precision of Lightning's Trainer.
        tasks: Tasks of `ropepp-lit evaluate`, at a fourth, a half and all of the longer context.
        limit: Maximum number of documents and of examples per task.
    """
    out.mkdir(parents=True, exist_ok=True)
    starts = {"rope": out / "rope.ckpt", "ec": out / "ec.ckpt"}
    source = model
    if not model.endswith(".ckpt"):
        if not starts["rope"].exists():
            run(["import", model, str(starts["rope"])])
        source = str(starts["rope"])
    starts["rope"] = Path(source)
    if not starts["ec"].exists():
        run(["upcycle", source, str(starts["ec"]), "--variant", "ec"])
    run(
        ["prepare", *text.split(","), "--out", str(out / "data"), "--tokenizer", source, "--validation_fraction", "0.1"]
    )
    layers = {name: _write_layer(path, out / f"{name}-longer.yaml", factor) for name, path in starts.items()}
    context = layers["rope"]["data"]["context_length"]
    taken: dict[str, float | None] = {}
    for seed in range(seeds):
        for name, variant in VARIANTS.items():
            folder = _folder(out, name, seed)
            options = [*variant.options, "--data.source", str(out / "data"), "--trainer.max_steps", str(steps)]
            options += ["--trainer.precision", precision, "--seed_everything", str(seed), "--data.seed", str(seed)]
            options += ["--model.optimizer.lr", f"{variant.learning_rate * learning_rate:g}"]
            print(f"{name}, seed {seed}: {folder}", flush=True)
            recipes = [out / f"{variant.start}-longer.yaml", RECIPES / "upcycle" / "comparison.yaml"]
            taken[folder.name] = fit(folder, recipes, options)["seconds"]
            write_whole(out / "times.json", json.dumps(taken, indent=1))
    checkpoints = [f"{name}={_checkpoint(out, name, seed)}" for name in VARIANTS for seed in range(seeds)]
    lengths = ",".join(str(context // part) for part in (4, 2, 1))
    measure = ["--tasks", tasks, "--lengths", lengths, "--limit", str(limit), "--min_tokens", str(context // 2)]
    run(
        [
            "evaluate",
            *checkpoints[:seeds],
            f"before={source}",
            *checkpoints[seeds:],
            *measure,
            "--out",
            str(out / "page"),
        ]
    )
    _draw(out, seeds)
    print(f"Read {out / 'page' / 'index.html'}; the curves are in {out / 'curves.png'}")


def _write_layer(start: Path, path: Path, factor: int) -> dict[str, dict]:
    """Write the recipe of a model initialized from a checkpoint, with a longer context and a larger base."""
    recipe = recipe_from(start, read_checkpoint(start, shapes_only=True)[KEY])
    if not recipe["data"]["context_length"]:
        raise UsageError(f"model: {start} does not store the context that it was trained with")
    recipe["data"]["context_length"] *= factor
    decoder, settings = recipe["model"]["decoder"], recipe["model"]["frequencies"]["init_args"]
    settings["rope_theta"] *= factor ** (decoder["head_dim"] / (decoder["head_dim"] - 2))
    del recipe["data"]["tokenizer"], recipe["data"]["train_tokenizer"]  # defined by the prepared data
    write_whole(path, to_yaml(recipe))
    return recipe


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{name.replace(',', '').replace(' ', '-')}-{seed}"


def _checkpoint(out: Path, name: str, seed: int) -> Path:
    return _folder(out, name, seed) / "checkpoints" / "last.ckpt"


def _draw(out: Path, seeds: int) -> None:
    """Plot the norm of the columns of o_proj for imaginary heads and the difference of the loss to that of RoPE."""
    curves = {
        (name, seed): _curves(_folder(out, name, seed), "train/loss", "attention/imaginary/output_norm")
        for name in VARIANTS
        for seed in range(seeds)
    }
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    norms, losses = figure.subplots(1, 2)
    for (name, seed), (loss, norm) in curves.items():
        style = {"color": COLOURS[list(VARIANTS).index(name)], "linewidth": 1.6, "label": name if seed == 0 else None}
        if norm:
            norms.plot(list(norm), list(norm.values()), marker=".", **style)
            first = curves["RoPE", seed][0]
            differences = [loss[step] - first[step] for step in loss if step in first]
            width = max(1, len(differences) // 15)
            means = np.convolve(differences, np.ones(width) / width, mode="valid")
            losses.plot(list(loss)[width - 1 : width - 1 + len(means)], means, **style)
    norms.set(xlabel="optimizer steps", ylabel="norm of the imaginary columns")
    losses.set(xlabel="optimizer steps", ylabel="training loss minus that of RoPE (nats)")
    losses.axhline(0, color="#9ca3af", linewidth=1)
    for axes in (norms, losses):
        axes.spines[["top", "right"]].set_visible(False)
    norms.legend(frameon=False, fontsize=9)
    figure.savefig(out / "curves.png", dpi=160)


def _curves(folder: Path, *tags: str) -> list[dict[int, float]]:
    """Return the values of each tag by step; empty for tags that the run did not log."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    known = events.Tags()["scalars"]
    return [{event.step: event.value for event in events.Scalars(tag)} if tag in known else {} for tag in tags]


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(study, as_positional=False)
    except UsageError as error:
        sys.exit(str(error))
