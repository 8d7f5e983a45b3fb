"""Processes that share an evaluation's folder: they end as one does, also where one is killed."""

import json
import time

import psutil
import pytest

from ropepp_lit.eval import pieces

pytestmark = pytest.mark.end_to_end

TASK = """
import os, time
from pathlib import Path
from ropepp_lit.eval.tasks import Task

class Slow(Task):
    has_length = False

    def measure(self, model, request):
        with open("started", "a") as file:
            print(os.getpid(), file=file)
        while not Path("go").exists():
            time.sleep(0.02)
        return [self.measured(request, metric="number", numerators=[1.0, 2.0], denominators=[1.0, 1.0])]
"""


def wait_for(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in two minutes"
        time.sleep(0.05)


def test_processes_end_as_one_and_take_up_what_a_killed_one_held(run, command_path, small_checkpoints, tmp_path):
    (tmp_path / "my_tasks.py").write_text(TASK)
    models = [f"A={small_checkpoints['rope']}", f"B={small_checkpoints['ec']}"]
    command = ["evaluate", *models, "--tasks", "my_tasks.Slow,retrieval:single", "--lengths", "256", "--limit", "2"]
    started, processes = tmp_path / "started", []

    def start():
        number = len(processes)
        with (tmp_path / f"output{number}").open("w") as output:
            processes.append(
                psutil.Popen([command_path, *command, "--out", "several"], cwd=tmp_path, stdout=output, stderr=output)
            )

    def output(number):
        return (tmp_path / f"output{number}").read_text()

    try:
        start()
        wait_for(started.exists, "piece")
        start()
        start()
        waiting = "Waiting for 2 pieces of work that other processes measure"
        wait_for(lambda: waiting in output(1) + output(2), "waiting process")
        assert len(started.read_text().split()) == 2  # each model's piece is measured once
        processes[0].kill()
        (tmp_path / "go").touch()
        assert [process.wait(timeout=120) for process in processes[1:]] == [0, 0], output(1) + output(2)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    assert len(started.read_text().split()) == 3
    assert all("Everything is in several" in output(number) for number in (1, 2))
    assert not list((tmp_path / "several" / "parts").glob("*.lock"))
    run(*command, "--out", "one", cwd=tmp_path)
    one, several = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "several"))
    for results in (one, several):
        for key in ("date", "command"):
            del results[key]
        for model in results["models"]:
            del model["seconds"]
    assert one == several
    assert [(row["part"], row["examples"]) for row in one["scores"] if row["depth"] is None] == [
        (part, 2) for part in ("Slow", "single") for _ in range(2)
    ]
    for name in ("scores.csv", "answers.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes()


def test_without_locks_one_process_goes_on_alone(small_checkpoints, tmp_path, monkeypatch, capsys):
    from ropepp_lit.commands.evaluate import evaluate

    monkeypatch.setattr(pieces, "has_locks", lambda path: False)
    options = {"tasks": "retrieval:single", "lengths": "256", "limit": 2, "out": str(tmp_path / "out")}
    evaluate(str(small_checkpoints["rope"]), **options)
    assert "has no locks, so one process alone can measure into it" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").exists()
