"""Targets of unfinished outputs of `generate` and of evaluations: valid inputs, and the commands that resume them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fuzzing.judges import same
from fuzzing.models import TEXTS, make_whole
from ropepp_lit.commands.evaluate import _replaced
from ropepp_lit.eval.harness import Options
from ropepp_lit.eval.models import load_model as load_measured
from ropepp_lit.eval.pieces import Work
from ropepp_lit.eval.report.examples import choose_examples
from ropepp_lit.eval.results import summarize
from ropepp_lit.eval.tasks import EvaluationSettings
from ropepp_lit.inference.model import GenerationSettings, load_model
from ropepp_lit.inference.prompts import PromptFile


@cache
def model_file() -> str:
    """Create a checkpoint that is not modified."""
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="ropepp-fuzz-model-")) / "model.ckpt"
    torch.save(make_whole(), path)
    return str(path)


@cache
def writer() -> Any:
    """Return the model of this checkpoint."""
    return load_model(model_file())


WRITING = GenerationSettings(max_new_tokens=2)


def make_prompts(folder: Path) -> None:
    """Create a file of prompts, and the stored answers to half of them."""
    folder.mkdir(parents=True)
    rows = [{"prompt": f"word{number}", "id": number} for number in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = PromptFile(folder / "prompts.jsonl", writer(), None)
    kept = folder / "answers.jsonl.partial"
    unlink, Path.unlink = Path.unlink, lambda path, **options: None  # type: ignore[assignment,method-assign]
    try:
        prompts.answer(folder / "answers.jsonl", WRITING, batch_size=2, show_progress=False)
    finally:
        Path.unlink = unlink  # type: ignore[method-assign]
    (folder / "answers.jsonl").unlink()
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:3]))


def read_prompts(folder: Path, changed: Path) -> Any:
    """Run `generate --prompts`, which resumes from the stored answers."""
    out = folder / "answers.jsonl"
    PromptFile(folder / "prompts.jsonl", writer(), None).answer(out, WRITING, batch_size=2, show_progress=False)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def judge_prompts(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Require stored answers to be in the output; modified prompts have other answers."""
    return same(whole, found, change, path) if path.name.endswith(".partial") else None


def _work(folder: Path) -> Work:
    model = load_measured(model_file(), dtype=torch.float32, device=torch.device("cpu"), weights=False)
    settings = EvaluationSettings(
        tasks=("perplexity", "retrieval:single"), lengths=(64,), limit=2, stride=None, noise_std=(0.0,), seed=0,
        options=Options(), has_essays=True, checkpoint=model_file(), load=None,
    )  # type: ignore[arg-type]  # fmt: skip

    def load(number: int) -> Any:
        return load_measured(model_file(), dtype=torch.float32, device=torch.device("cpu"))

    return Work(
        [model], load=load, settings=settings, sets={"text": TEXTS[:4]}, folder=folder / "evaluated", dtype="float32",
        device=torch.device("cpu"),
    )  # fmt: skip


def make_evaluation(folder: Path) -> None:
    """Create a finished evaluation."""
    folder.mkdir(parents=True)
    work = _work(folder)
    work.measure()
    work.write_answers()
    models = [{"name": "model", "path": "model.ckpt", "fingerprint": "sha256:0"}]
    settings = {"tasks": ["perplexity", "retrieval:single"], "lengths": [64]}
    results = {"format_version": 1, "settings": settings, "models": models, "scores": []}
    (folder / "evaluated" / "results.json").write_text(json.dumps(results))
    for path in (folder / "evaluated" / "parts").glob("*.lock"):
        path.unlink()


def read_evaluation(folder: Path, changed: Path) -> Any:
    """Run `evaluate` again, which reads the stored measurements, rows, answers and the old report."""
    work = _work(folder)
    work.measure()
    measurements, _ = work.results(0)
    rows = summarize([("model", measurements)], seeds=[None])
    work.write_answers()
    settings = {"tasks": ["perplexity"], "lengths": [64]}
    list(_replaced(folder / "evaluated", settings, [{"name": "other", "path": "x", "fingerprint": "sha256:1"}]))
    choose_examples(folder / "evaluated" / "answers.jsonl")
    answers = (folder / "evaluated" / "answers.jsonl").read_text(encoding="utf-8")
    return {"rows": json.loads(json.dumps(rows)), "answers": answers}
