"""Processes that share the folder of an evaluation have the results of a single one, also if one is killed."""

import json
import os
import signal
import threading
import time
from pathlib import Path

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
        return [self.measurement(request, metric="number", numerators=[1.0, 2.0], denominators=[1.0, 1.0])]
"""


def wait_for(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in two minutes"
        time.sleep(0.05)


@pytest.fixture
def start(command_server, command_path, tmp_path):
    """Function that starts the installed command in the background and returns its process id and output file.

    `start.wait(ID)` returns its exit code.
    """
    running = set()

    def ask(**job):
        print(json.dumps(job), file=command_server.stdin, flush=True)
        return int(command_server.stdout.readline())

    def start(*command):
        output = str(tmp_path / f"output{len(running)}")
        job = {"command": [command_path, *map(str, command)], "cwd": str(tmp_path), "environment": {**os.environ}}
        Path(output).touch()
        process = ask(**job, output=output, errors=output, detached=True)
        running.add(process)
        return process, Path(output)

    def wait(process):
        timer = threading.Timer(120, os.kill, [process, signal.SIGKILL])
        timer.start()
        code = ask(wait=process)
        timer.cancel()
        running.discard(process)
        return code

    start.wait = wait
    yield start
    for process in list(running):
        os.kill(process, signal.SIGKILL)
        wait(process)


def test_processes_share_pieces_and_replace_a_killed_one(run, start, small_checkpoints, tmp_path):
    (tmp_path / "my_tasks.py").write_text(TASK)
    models = [f"A={small_checkpoints['rope']}", f"B={small_checkpoints['ec']}"]
    command = ["evaluate", *models, "--tasks", "my_tasks.Slow,retrieval:single", "--lengths", "256", "--limit", "2"]
    started = tmp_path / "started"
    killed, _ = start(*command, "--out", "several")
    wait_for(started.exists, "piece")
    others = [start(*command, "--out", "several") for _ in range(2)]
    waiting = "Waiting for 2 pieces of work that other processes measure"
    wait_for(lambda: any(waiting in output.read_text() for _, output in others), "waiting process")
    assert len(started.read_text().split()) == 2  # each model's piece is measured once
    os.kill(killed, signal.SIGKILL)
    assert start.wait(killed) == -signal.SIGKILL
    (tmp_path / "go").touch()
    assert [start.wait(process) for process, _ in others] == [0, 0], [output.read_text() for _, output in others]
    assert len(started.read_text().split()) == 3
    assert all("Everything is in several" in output.read_text() for _, output in others)
    assert not list((tmp_path / "several" / "parts").glob("[!.]*.lock"))
    run(*command, "--out", "one", cwd=tmp_path)
    one, concurrent = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "several"))
    for results in (one, concurrent):
        for key in ("date", "command"):
            del results[key]
        for model in results["models"]:
            del model["seconds"]
    assert one == concurrent
    assert [(row["part"], row["examples"]) for row in one["scores"] if row["depth"] is None] == [
        (part, 2) for part in ("Slow", "single") for _ in range(2)
    ]
    for name in ("scores.csv", "answers.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes()


def test_a_single_process_works_without_locks(small_checkpoints, tmp_path, monkeypatch, capsys):
    from ropepp_lit.commands.evaluate import evaluate

    monkeypatch.setattr(pieces, "has_locks", lambda path: False)
    options = {"tasks": "retrieval:single", "lengths": "256", "limit": 2, "out": str(tmp_path / "out")}
    evaluate(str(small_checkpoints["rope"]), **options)
    assert "does not support locks, so only one process can evaluate into it" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").exists()
