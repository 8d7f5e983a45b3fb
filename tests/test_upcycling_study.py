"""Tests of tools/upcycling_study.py on a model with a few thousand parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "upcycling_study.py"


@pytest.mark.slow
def test_four_variants_are_trained_and_evaluated(run, tiny, texts, tmp_path):
    options = ["--model.positions", "RoPE", "--trainer.max_steps", "3", "--trainer.default_root_dir", "base"]
    run("fit", *tiny, *options, cwd=tmp_path)
    base = tmp_path / "base" / "checkpoints" / "last.ckpt"
    command = [sys.executable, TOOL, "--model", base, "--out", "out", "--text", texts, "--steps", "4", "--factor", "8"]
    command += ["--tasks", "perplexity", "--limit", "2"]
    subprocess.run(command, cwd=tmp_path, check=True)
    results = json.loads((tmp_path / "out" / "page" / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == [
        "RoPE", "before", "EC", "EC, imaginary columns", "EC, LoRA and imaginary columns",
    ]  # fmt: skip
    assert [model["context_length"] for model in results["models"]] == [512, 64, 512, 512, 512]
    assert results["models"][0]["positions"] == f"RoPE, base {10_000 * 8 ** (8 / 6):g}"
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    written = (tmp_path / "out" / "page" / "index.html").stat().st_mtime_ns
    times = (tmp_path / "out" / "times.json").read_text()
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "out" / "times.json").read_text() == times
    assert (tmp_path / "out" / "page" / "index.html").stat().st_mtime_ns > written
