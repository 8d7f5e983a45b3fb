"""Runs that a scheduler or a launcher ends and restarts."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import assert_same

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

TOOLS = Path(__file__).parents[2] / "tools"


def test_torchrun_restarts_all_ranks_after_a_kill(tiny, tmp_path, start_training, monkeypatch):
    """With `torchrun --max_restarts`; the last rank is killed three times."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--trainer.max_steps", "60"]
    fit = ["-m", "ropepp_lit", "fit", *tiny, *options, "--ckpt_path", "auto", "--trainer.default_root_dir"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    process = start_training(*launch, "--max_restarts", "5", *fit, "run", cwd=tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    for _ in range(3):
        before = {path.name for path in checkpoints.glob("step=*.ckpt")}
        psutil.Process(process.children()[-1].pid).kill()
        deadline = time.monotonic() + 120
        while {path.name for path in checkpoints.glob("step=*.ckpt")} == before:
            assert process.poll() is None, (tmp_path / "errors").read_text()
            assert time.monotonic() < deadline, "no checkpoint after the restart"
            time.sleep(0.1)
    assert process.wait(timeout=300) == 0, (tmp_path / "errors").read_text()
    assert (tmp_path / "output").read_text().count("Continuing from run/checkpoints/step=") == 3
    subprocess.run([*launch, *fit, "baseline"], cwd=tmp_path, check=True, capture_output=True)
    assert_same(checkpoints / "last.ckpt", tmp_path / "baseline/checkpoints/last.ckpt")


@pytest.mark.skipif(shutil.which("slurmctld") is None, reason="needs slurmctld, slurmd and munge")
def test_a_slurm_job_is_preempted_five_times(tmp_path):
    command = [sys.executable, TOOLS / "slurm_preemption.py", "--out", tmp_path / "slurm"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Preempted 5 times, and every file is that of the undisturbed job" in done.stdout
