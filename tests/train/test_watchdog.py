"""Ranks that hang: suspended, and waiting for each other."""

import json
import re
import sys
import threading
import time

import pytest
import torch.distributed as dist

from ropepp_lit.train import watchdog
from ropepp_lit.train.run_log import read_run_log
from ropepp_lit.train.watchdog import EXIT_CODE, _names, _Position, _Ranks


@pytest.fixture
def ranks():
    """Four ranks that exchange positions through a store in this process."""
    store, ranks = dist.HashStore(), [_Ranks() for _ in range(4)]
    for number, rank in enumerate(ranks):
        rank._rank, rank._size, rank._store = number, 4, store
    return ranks


FORWARD, BACKWARD = (_Position(9, 1_005, f"{name} pass") for name in ("forward", "backward"))
EVALUATION = _Position(9, 1_004, "evaluation")
HANG = {
    # Position of each rank, the ranks that write while rank 1 waits, and the hang that rank 1 finds.
    "one is suspended": (
        [BACKWARD, BACKWARD, FORWARD, BACKWARD],
        [0, 3],
        "rank 2 does not respond, last known at step 1,005, forward pass; ranks 0-1, 3 at step 1,005, backward pass",
    ),
    "all wait": (
        [BACKWARD, BACKWARD, FORWARD, BACKWARD],
        [0, 2, 3],
        "ranks 0-1, 3 at step 1,005, backward pass; rank 2 at step 1,005, forward pass",
    ),
    "one evaluates": ([EVALUATION, BACKWARD, BACKWARD, BACKWARD], [0, 2, 3], None),
    "one is suspended in its evaluation": (
        [EVALUATION, BACKWARD, BACKWARD, BACKWARD],
        [2, 3],
        "rank 0 does not respond, last known at step 1,004, evaluation; ranks 1-3 at step 1,005, backward pass",
    ),
    "one is still starting": ([None, BACKWARD, BACKWARD, BACKWARD], [2, 3], None),
}


@pytest.mark.parametrize("case", HANG)
def test_find_hang(ranks, case):
    positions, responding, expected = HANG[case]
    for rank, position in zip(ranks, positions, strict=True):
        if position is not None:
            rank.write(position, None)

    def wait():
        for number in responding:
            ranks[number].write(positions[number], None)

    hang = ranks[1].find_hang(positions[1], wait=wait)
    assert (hang and hang.text) == expected
    if hang is not None:
        assert hang.is_reporter == expected.startswith("rank 0 does not respond")


def test_a_rank_with_progress_is_not_a_hang(ranks):
    for rank in ranks:
        rank.write(FORWARD, None)
    numbers = iter(range(10, 99))

    def wait():
        for number in (0, 2, 3):
            ranks[number].write(FORWARD._replace(number=next(numbers)), None)

    assert ranks[1].find_hang(FORWARD, wait=wait) is None


def test_a_store_that_does_not_respond(ranks, monkeypatch):
    """Rank 0, which hosts the store, is suspended."""
    monkeypatch.setattr(watchdog, "_STORE_TIMEOUT", 0.1)
    release = threading.Event()

    class Stopped:
        def set(self, *_):
            pass

        def check(self, keys):
            release.wait(30)

    ranks[1]._store = Stopped()
    hang = ranks[1].find_hang(FORWARD, wait=lambda: None)
    release.set()
    assert hang.text == "rank 0, or the launcher that holds the processes' store, does not respond"
    assert hang.is_reporter


def test_format_of_ranks():
    assert [_names(ranks) for ranks in ([3], [0, 1, 2, 3], [0, 2, 3, 9])] == ["rank 3", "ranks 0-3", "ranks 0, 2-3, 9"]


def test_wrong_options(mistake):
    assert "watchdog.timeout: 0.0 must be above 0, or empty for none" in mistake("--watchdog.timeout", 0)


PROBES = """
import time
from lightning.pytorch import Callback


class Sleep(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            time.sleep(600)
"""


def start(start_training, tiny, folder, *options, launch):
    (folder / "probes.py").write_text(PROBES)
    length = ["--trainer.max_steps", 10**6, "--model.schedule.total_steps", 10**6, "--trainer.limit_val_batches", 0]
    options = [*length, "--trainer.devices", 2, "--trainer.default_root_dir", "run", "--watchdog.timeout", 8, *options]
    return start_training(*launch, "fit", *tiny, *options, cwd=folder)


def wait_for_end(process):
    """Wait for a process that is not a child of this one, so that it is not reaped here."""
    deadline = time.monotonic() + 90
    while process.is_running() and process.status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.end_to_end
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_suspended_rank(start_training, command_path, tiny, tmp_path, strategy):
    process = start(start_training, tiny, tmp_path, "--trainer.strategy", strategy, launch=[command_path])
    (other,) = process.children()
    began = time.monotonic()
    other.suspend()
    assert process.wait(90) == EXIT_CODE
    assert time.monotonic() - began > 8
    wait_for_end(other)
    errors = (tmp_path / "errors").read_text()
    (line,) = [line for line in errors.splitlines() if line.startswith("ropepp-lit: error")]
    match = re.fullmatch(
        r"ropepp-lit: error: no progress for 8 seconds: rank 1 does not respond, last known at step [\d,]+, [a-z ]+; "
        r"rank 0 at step [\d,]+, [a-z ]+(, (in|after) gloo:\w+.* \(number \d+\)); continue by --ckpt_path auto",
        line,
    )
    assert match, line
    *_, end = read_run_log(tmp_path / "run")
    assert (end["event"], end["reason"]) == ("end", "hang")
    assert end["message"] in line


@pytest.mark.slow
def test_a_suspended_first_rank(start_training, command_path, tiny, tmp_path):
    """It hosts the store; the other rank ends by itself."""
    process = start(start_training, tiny, tmp_path, launch=[command_path])
    (other,) = process.children()
    process.suspend()
    wait_for_end(other)
    errors = (tmp_path / "errors").read_text()
    assert "no progress for 8 seconds: rank 0, or the launcher that holds the processes' store, does not" in errors
    process.kill()


@pytest.mark.slow
def test_torchrun_restarts(start_training, tiny, tmp_path):
    """A rank whose main thread sleeps; every start hangs at the fourth step."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--max_restarts", 1]
    process = start(
        start_training, tiny, tmp_path, "--trainer.callbacks", "probes.Sleep", "--ckpt_path", "auto",
        launch=[*launch, "-m", "ropepp_lit"],
    )  # fmt: skip
    assert process.wait(180) != 0
    errors = (tmp_path / "errors").read_text()
    assert re.search(r"rank 0 at step 4, [a-z ]+, in gloo:\w+ of .*; rank 1 at step 4, data", errors), errors
    starts = [json.loads(line)["event"] for line in (tmp_path / "run/run.jsonl").read_text().splitlines()]
    assert starts.count("start") == 2
    assert starts.count("resume") == 1
