"""Tests of tools/check_gpu.py with a tiny model on a CPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end

TOOL = Path(__file__).parents[1] / "tools" / "check_gpu.py"


@pytest.mark.slow
def test_tiny(tmp_path):
    command = [sys.executable, TOOL, "--tiny", "--out", tmp_path / "check.json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1].endswith("0 rows disagree or failed.")
    found = json.loads((tmp_path / "check.json").read_text())
    assert all(row["agrees"] for title in list(found)[1:3] for row in found[title])
    assert {row["scheme"] for row in found["Training"]} == {"RoPE", "EH", "EC"}
    assert not [row for rows in found.values() for row in rows if "note" in row]
    # The printed and the written table are the same.
    (environment,) = found["Environment"]
    assert f"| {environment['device']} |" in finished.stdout


def test_rows_without_time_are_not_measured(tmp_path):
    command = [sys.executable, TOOL, "--tiny", "--minutes", "0", "--out", tmp_path / "check.json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "check.json").read_text())
    rows = [row for title, rows in found.items() if title != "Environment" for row in rows]
    assert {row["note"] for row in rows} == {"not measured: out of time"}
    assert "not measured: out of time" in finished.stdout


def test_a_wrong_kernel_is_detected(monkeypatch):
    spec = importlib.util.spec_from_file_location("check_gpu", TOOL)
    check_gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_gpu)
    machine = check_gpu.Machine(is_tiny=True, minutes=1)
    case = {"implementation": "sdpa", "rows": "packed", "heads": "8/4"}
    assert check_gpu.check_attention(machine, **case)["agrees"]
    attend = check_gpu.attend
    monkeypatch.setattr(check_gpu, "attend", lambda *inputs, **settings: 1.05 * attend(*inputs, **settings))
    assert not check_gpu.check_attention(machine, **case)["agrees"]
