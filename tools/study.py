"""Train RoPE, RoPE++ EH and EC alike, continue them at 8 times the context, measure all and write pages of it.

    python tools/study.py --out runs/study                      # three seeds of each
    python tools/study.py --out runs/study --seeds 2 --schemes RoPE,EH,EC,ALiBi,FoPE,PartialRoPE,NoPE,PoPE

Equal data, steps and settings for all; a seed decides the weights. Stopped, the same command goes on. Writes
OUT/pre-trained and OUT/continued, a page in each (index.html), and OUT/times.json.

At the paper's size on GPUs, with data of your own prepared before (a run then takes all devices, one after the other):

    python tools/study.py --out runs/376m --jobs 1 --pretrain recipes/paper/pretrain.yaml \
        --continued recipes/paper/long.yaml,recipes/frequencies/ntk.yaml --lengths 4k,8k,16k,32k,64k
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jsonargparse
from subcommands import RECIPES, fit, run
from tqdm import tqdm

from ropepp_lit.eval.recall import recall_documents
from ropepp_lit.files import write_whole
from ropepp_lit.text.tokenizer import BOS

FAMILIES = ["multikey"] * 7 + ["single"]
"""Of the documents to learn from; `multikey` asks for many answers, so it teaches most."""

RECALL = {"few": ((1, 4), 140_000, 0), "some": ((1, 10), 15_000, 1), "many": ((10, 100), 2_000, 2)}
"""Fewest and most values in a document, documents, and seed. With few to choose from, choosing is learned soonest."""

SCHEMES = {
    "RoPE": ["--model.positions", "RoPE"],
    "EH": ["--model.positions", "RoPEPP", "--model.positions.variant", "eh"],
    "EC": ["--model.positions", "RoPEPP", "--model.positions.variant", "ec"],
    "ALiBi": ["--model.positions", "ALiBi"],
    "PartialRoPE": ["--model.positions", "PartialRoPE"],
    "FoPE": ["--model.positions", "FoPE", "--model.positions.context_length", "256"],
    "NoPE": ["--model.positions", "NoPE"],
    "PoPE": ["--model.positions", "PoPE"],
}


def study(
    *,
    out: Path,
    seeds: int = 3,
    schemes: str = "RoPE,EH,EC",
    pretrain: str = "",
    continued: str = "",
    lengths: str = "256,512,1k,2k",
    limit: int = 40,
    min_tokens: int = 2048,
    jobs: int = os.cpu_count() or 1,
) -> None:
    """Run the study.

    Args:
        out: The folder that is written.
        seeds: Runs of each scheme.
        schemes: With commas; differences are to the first.
        pretrain: Recipes of the first stage, layered, with commas; empty means recipes/study and its data.
        continued: Recipes layered over those for the second stage.
        lengths: At which all are measured.
        limit: Documents, and examples of each family.
        min_tokens: Of a document that is read for perplexity.
        jobs: Runs at once, each with its share of the cores.
    """
    names = schemes.split(",")
    for name in names:
        if name not in SCHEMES:
            sys.exit(f"schemes: no scheme {name!r}; choose of {', '.join(SCHEMES)}")
    stages = {"pretrain": pretrain.split(","), "continue": [*pretrain.split(","), *continued.split(",")]}
    sources: dict[str, list[str]] = {}
    if not pretrain:
        _prepare(out / "data")
        files = [str(RECIPES / "study" / f"{name}.yaml") for name in ("recall", "pretrain", "continue")]
        stages = {name: files[: number + 1] for number, name in enumerate(("recall", "pretrain", "continue"))}
        text, few, some, many = (str(out / "data" / name) for name in ("text", *RECALL))
        mixtures = {"recall": {few: 1}, "pretrain": {text: 0.5, some: 0.5}}
        mixtures["continue"] = {text: 0.5, some: 0.25, many: 0.25}
        sources = {stage: ["--data.source", json.dumps(mixture)] for stage, mixture in mixtures.items()}
    runs = list(itertools.product(range(seeds), names))

    def train(seed: int, name: str) -> dict[str, float | None]:
        """All stages of a run, each from the weights of the one before; seconds of each."""
        taken: dict[str, float | None] = {}
        before: Path | None = None
        for stage, recipes in stages.items():
            folder = out / "runs" / f"{name}-{seed}" / stage
            options = [*SCHEMES[name], "--seed_everything", str(seed), *sources.get(stage, [])]
            if before is not None:
                options += ["--model.init_from", str(before / "checkpoints" / "last.ckpt")]
            cost = fit(folder, recipes, options, threads=max(1, (os.cpu_count() or 1) // jobs))
            taken[f"{name}-{seed}-{stage}"] = cost["seconds"]
            before = folder
        return taken

    taken: dict[str, float | None] = {}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit=" runs", desc="training") as bar:
        for done in as_completed([pool.submit(train, seed, name) for seed, name in runs]):
            taken |= done.result()
            bar.update()
    write_whole(out / "times.json", json.dumps(taken, indent=1))
    options = ["--lengths", lengths, "--limit", str(limit), "--min_tokens", str(min_tokens)]
    options += ["--tasks", "perplexity,retrieval:single+multikey"]
    for stage, page in (("pretrain", "pre-trained"), ("continue", "continued")):
        checkpoints = [f"{n}={out}/runs/{n}-{s}/{stage}/checkpoints/last.ckpt" for n in names for s in range(seeds)]
        run(["evaluate", *checkpoints, *options, "--out", str(out / page)])
        print(f"Read {out / page / 'index.html'}")


def _prepare(folder: Path) -> None:
    """Text of Python's standard library, and documents to learn retrieval from, with one tokenizer for all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (units, count, seed) in RECALL.items():
        documents = itertools.islice(recall_documents(FAMILIES, units=units, seed=seed), count)
        if not (folder / f"{name}.jsonl").exists():
            write_whole(folder / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in documents))
    sample = folder / "sample.jsonl"
    if not sample.exists():
        with (folder / "few.jsonl").open() as file:
            write_whole(sample, "".join(itertools.islice(file, 10_000)))
    run(["prepare", "builtin", str(sample), "--out", str(folder / "tokenizer"), "--train_tokenizer", "2048"])
    tokenizer = ["--tokenizer", str(folder / "tokenizer" / "tokenizer.json"), "--bos_token", BOS]
    text = ["--out", str(folder / "text"), "--validation_fraction", "0.1"]
    run(["prepare", "builtin", *text, *tokenizer])
    for name in RECALL:
        held_out = ["--validation_fraction", "0.01"]
        run(["prepare", str(folder / f"{name}.jsonl"), "--out", str(folder / name), *held_out, *tokenizer])


if __name__ == "__main__":
    jsonargparse.auto_cli(study, as_positional=False)
