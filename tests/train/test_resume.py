"""Stopping and resuming in a new process, bit-identical to an uninterrupted run."""

import re
import signal
import sys

import pytest
import torch

pytestmark = pytest.mark.end_to_end

CALLBACKS = '''
import os, zlib
from lightning.pytorch import Callback


class Recorder(Callback):
    """Appends a checksum of every batch to a file, and kills the process at one of them."""

    def __init__(self, path: str, kill_at: int = -1):
        self.path, self.kill_at = path, kill_at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with open(self.path, "a") as file:
            file.write(f"{batch_idx} {zlib.crc32(batch.input_ids.numpy().tobytes())}\\n")
        if batch_idx == self.kill_at:
            os.kill(os.getpid(), 9)
'''
ACCUMULATE = 3


@pytest.fixture
def fit(run, tiny, tmp_path):
    (tmp_path / "recorder.py").write_text(CALLBACKS)

    def fit(folder, *options, kill_at=-1, returncode=0):
        options = ["--trainer.accumulate_grad_batches", ACCUMULATE, "--trainer.default_root_dir", folder, *options]
        recorder = ["--trainer.callbacks", "recorder.Recorder", f"--trainer.callbacks.path={folder}.txt"]
        recorder.append(f"--trainer.callbacks.kill_at={kill_at}")
        return run("fit", *tiny, *recorder, *options, cwd=tmp_path, returncode=returncode)

    return fit


def assert_same_run(tmp_path, one, other):
    a, b = (torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other))
    assert a["global_step"] == b["global_step"] == 8
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(a[part], b[part], part)
    positions = [run["loops"]["fit_loop"]["state_dict"]["combined_loader"] for run in (a, b)]
    assert positions[0][0]["samples"] == 8 * ACCUMULATE * 2
    assert_equal(*positions, "data")
    assert a["ropepp_lit"]["tokens_seen"] == b["ropepp_lit"]["tokens_seen"] == 8 * ACCUMULATE * 2 * 64


def assert_equal(a, b, where):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}.{index}")
    else:
        assert a == b, where


def batches(tmp_path, run):
    return (tmp_path / f"{run}.txt").read_text().splitlines()


OPTIMIZERS = {
    "AdamW": ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"],
    "Muon": ["--model.optimizer", "Muon", "--model.optimizer.lr", "0.01"],
}


@pytest.mark.parametrize(
    "optimizer",
    [OPTIMIZERS["AdamW"], pytest.param(OPTIMIZERS["Muon"], marks=pytest.mark.slow)],
    ids=["AdamW", "Muon"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(fit, tmp_path, optimizer):
    fit("baseline", *optimizer)
    length = ["--model.schedule.total_steps", "8"]
    fit("halves", "--trainer.max_steps", "4", *length, *optimizer)
    fit("halves", "--ckpt_path", "halves/checkpoints/last.ckpt", *length, *optimizer)
    assert batches(tmp_path, "halves") == batches(tmp_path, "baseline")
    assert len(batches(tmp_path, "baseline")) == 8 * ACCUMULATE
    assert_same_run(tmp_path, "baseline", "halves")


def test_killed_within_an_accumulation_window(fit, tmp_path):
    fit("baseline", "--trainer.val_check_interval", "4")
    # Batch 16 is the second of the three of step 6; step 4 was the last to be saved.
    fit("killed", "--trainer.val_check_interval", "4", kill_at=16, returncode=-signal.SIGKILL)
    assert (tmp_path / "killed/checkpoints/last.ckpt").resolve().name == "step=4.ckpt"
    fit("killed", "--trainer.val_check_interval", "4", "--ckpt_path", "auto")
    before, after = batches(tmp_path, "killed")[:17], batches(tmp_path, "killed")[17:]
    assert before == batches(tmp_path, "baseline")[:17]
    assert after == batches(tmp_path, "baseline")[12:]
    assert_same_run(tmp_path, "baseline", "killed")


def stop_run(start_training, command_path, tiny, folder, number, *, devices=1, to="first"):
    """Start a run, send it a signal after its first checkpoint, and return exit code, output and errors."""
    options = ["--trainer.max_steps", "100000", "--model.schedule.total_steps", "100000"]
    options += ["--trainer.default_root_dir", "run", "--trainer.devices", devices]
    options += ["--trainer.strategy", "fsdp2"] if devices > 1 else []
    process = start_training(command_path, "fit", *tiny, *options, cwd=folder)
    ranks = [process, *process.children(recursive=True)]
    assert len(ranks) == devices
    for rank in {"first": ranks[:1], "last": ranks[-1:], "all": ranks}[to]:
        rank.send_signal(number)
    process.wait(timeout=60)
    return process.returncode, *((folder / name).read_text() for name in ("output", "errors"))


def stop_and_resume(start_training, command_path, tiny, run, folder, number, **how):
    """Check that a run stopped by a signal saves, reports it, and resumes bit-identically."""
    returncode, output, errors = stop_run(start_training, command_path, tiny, folder, number, **how)
    assert returncode == 128 + number, errors
    assert "Traceback" not in errors
    last = output.strip().splitlines()[-1]
    step = int(re.fullmatch(rf"Stopped by {number.name} at step ([\d,]+), saved as .*", last)[1].replace(",", ""))
    assert f"saved as run/checkpoints/step={step}.ckpt. Continue: ropepp-lit fit --config run/recipe.yaml" in last
    devices = how.get("devices", 1)
    strategy = ["--trainer.devices", devices, *(["--trainer.strategy", "fsdp2"] if devices > 1 else [])]
    options = ["--trainer.max_steps", step + 3, "--model.schedule.total_steps", 100000, *strategy]
    run("fit", *tiny, *options, "--trainer.default_root_dir", "run", "--ckpt_path", "auto", cwd=folder)
    run("fit", *tiny, *options, "--trainer.default_root_dir", "baseline", cwd=folder)
    paths = (folder / name / "checkpoints" / f"step={step + 3}.ckpt" for name in ("run", "baseline"))
    stopped, baseline = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(stopped[name], value) for name, value in baseline.items())


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGUSR1))]
)
def test_stopped_by_a_signal(start_training, command_path, tiny, run, tmp_path, number):
    stop_and_resume(start_training, command_path, tiny, run, tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["first", "last", "all"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("again", range(10))
def test_two_processes_stop_reliably(start_training, command_path, tiny, tmp_path, number, to, again):
    returncode, output, errors = stop_run(start_training, command_path, tiny, tmp_path, number, devices=2, to=to)
    assert returncode == 128 + number, errors
    assert f"Stopped by {number.name} at step" in output.strip().splitlines()[-1]


@pytest.mark.slow
def test_torchrun_stopped_by_a_signal(start_training, tiny, run, tmp_path):
    """torchrun forwards SIGTERM to its ranks, which save before they end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ropepp_lit", "fit", *tiny]
    options = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--model.schedule.total_steps", "100000"]
    length = ["--trainer.max_steps", "100000", "--trainer.default_root_dir", "run"]
    process = start_training(*launch, *options, *length, cwd=tmp_path)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    output, errors = ((tmp_path / name).read_text() for name in ("output", "errors"))
    assert process.returncode != 0
    match = re.search(r"Stopped by SIGTERM at step ([\d,]+), saved as .*--ckpt_path auto", output)
    assert match, output + errors
    step = int(match[1].replace(",", ""))
    run("fit", *tiny, *options, "--ckpt_path", "auto", "--trainer.max_steps", step + 3,
        "--trainer.default_root_dir", "run", cwd=tmp_path)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", range(1, 24))
def test_killed_at_any_batch(fit, tmp_path, kill_at):
    fit("baseline")
    fit("killed", kill_at=kill_at, returncode=-signal.SIGKILL)
    fit("killed", "--ckpt_path", "auto")
    assert_same_run(tmp_path, "baseline", "killed")
