"""The study's script, on models of a few thousand parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "study.py"


@pytest.mark.slow
def test_the_study_trains_continues_measures_and_goes_on(tiny, texts, tmp_path):
    config, cache = tiny[1], tiny[-1]
    source = f"data: {{source: {texts}, cache_dir: {cache}}}\n"
    (tmp_path / "short.yaml").write_text(f"{source}trainer: {{max_steps: 3}}\n")
    longer = "model: {frequencies: {class_path: Frequencies, init_args: {rope_theta: 50000}}}\n"
    (tmp_path / "long.yaml").write_text(f"{longer}data: {{context_length: 128}}\ntrainer: {{max_steps: 2}}\n")
    options = ["--pretrain", f"{config},short.yaml", "--continued", "long.yaml", "--lengths", "512", "--limit", "2"]
    command = [sys.executable, TOOL, "--out", "out", *options, "--seeds", "2", "--min_tokens", "0", "--schemes"]
    subprocess.run([*command, "RoPE,EC"], cwd=tmp_path, check=True)
    for page, context in (("pre-trained", 64), ("continued", 128)):
        results = json.loads((tmp_path / "out" / page / "results.json").read_text())
        assert [model["name"] for model in results["models"]] == ["RoPE", "RoPE", "EC", "EC"]
        assert {model["context_length"] for model in results["models"]} == {context}
        assert all(row["runs"] == 2 for row in results["scores"])
        assert (tmp_path / "out" / page / "index.html").is_file()
    checkpoint = tmp_path / "out" / "runs" / "RoPE-0" / "pretrain" / "checkpoints" / "last.ckpt"
    before = checkpoint.resolve().stat().st_mtime_ns
    subprocess.run([*command, "RoPE,EC,NoPE"], cwd=tmp_path, check=True)
    assert checkpoint.resolve().stat().st_mtime_ns == before
    assert "NoPE" in (tmp_path / "out" / "continued" / "index.html").read_text()
    failed = subprocess.run([*command, "Sines"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "schemes: no scheme 'Sines'" in failed.stderr
