"""Processes of chaos.py: start them, with faults, and wait for their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from chaos_jobs import Job, inputs_of

TOOLS = Path(__file__).resolve().parent
COMMAND = str(Path(sys.executable).parent / "ropepp-lit")


class Processes:
    """Runner of commands in forks of a process that has imported the libraries; for use by one thread."""

    def __init__(self, preload: Path | None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"LD_PRELOAD": str(preload)} if preload else {})}
        self._environment = environment
        self._server = subprocess.Popen(
            [sys.executable, TOOLS / "command_server.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def _ask(self, **job: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(job), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def start(self, words: list[str], folder: Path, output: Path, errors: Path, **variables: str) -> int:
        """Start a command; returns its process id."""
        environment = {**self._environment, "HOME": str(folder), **variables}
        job = {"command": [COMMAND, *words], "cwd": str(folder), "environment": environment, "detached": True}
        return self._ask(**job, output=str(output), errors=str(errors))

    def wait(self, process: int, limit_s: float) -> int | None:
        """Wait for a process; returns its exit code, negative for a signal, or None if it had to be killed."""
        hung = threading.Event()

        def kill() -> None:
            hung.set()
            os.kill(process, signal.SIGKILL)

        timer = threading.Timer(limit_s, kill)
        timer.start()
        code = self._ask(wait=process)
        timer.cancel()
        return None if hung.is_set() else code

    def close(self) -> None:
        """End the forking process."""
        self._server.kill()
        self._server.wait()


class Attempt(NamedTuple):
    """Result of running a job's processes."""

    codes: list[int | None]
    output: str
    errors: list[str]
    seconds: float

    @property
    def ended_well(self) -> bool:
        """Whether all processes ended with exit code 0."""
        return all(code == 0 for code in self.codes)


def attempt(
    processes: Processes,
    job: Job,
    work: Path,
    inputs: Path,
    faults: dict[int, dict[str, str]],
    act: Callable[[list[int]], None] | None = None,
) -> Attempt:
    """Start a job and wait for its end.

    Args:
        processes: Runner.
        job: Job.
        work: Folder that the job writes to.
        inputs: Folder that the job reads.
        faults: Environment variables of faults.c by rank.
        act: Function that injects further faults, called with the process ids in a separate thread.
    """
    port = str(_free_port())
    ids, outputs, errors = [], [], []
    started = time.monotonic()
    for rank in range(job.ranks):
        distributed = {} if job.ranks == 1 else {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(job.ranks), "NODE_RANK": "0",
            "LOCAL_RANK": str(rank), "RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(job.ranks),
            "TORCHELASTIC_RUN_ID": "chaos",
        }  # fmt: skip
        outputs.append(work.parent / f"output-{rank}")
        errors.append(work.parent / f"errors-{rank}")
        words = inputs_of(job, inputs) + (["--trainer.devices", str(job.ranks)] if job.ranks > 1 else [])
        variables = {"CHAOS_FOLDER": str(work), **distributed, **faults.get(rank, {})}
        ids.append(processes.start(words, work, outputs[-1], errors[-1], **variables))
    threads = [threading.Thread(target=act, args=(ids,))] if act else []
    threads += [threading.Thread(target=_launch, args=(ids,))] if job.ranks > 1 else []
    for thread in threads:
        thread.start()
    deadline = started + job.limit_s
    codes = [processes.wait(number, max(deadline - time.monotonic(), 1.0)) for number in ids]
    seconds = time.monotonic() - started
    for thread in threads:
        thread.join()
    printed = "" if outputs[0].is_fifo() else outputs[0].read_text(errors="replace")
    return Attempt(codes, printed, [path.read_text(errors="replace") for path in errors], seconds)


def _launch(processes: list[int]) -> None:
    """Terminate the other processes of a run when one has ended, as launchers do; returns when all have ended."""
    while all(map(is_alive, processes)):
        time.sleep(0.1)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 30
        while any(map(is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in filter(is_alive, processes):
            os.kill(process, number)


def build_faults(folder: Path) -> Path | None:
    """Compile faults.c into a folder; returns the library, or None without a compiler."""
    library = folder / "faults.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(TOOLS / "faults.c"), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        return None
    return library


def is_alive(process: int) -> bool:
    """Return whether a process has not ended; it can be stopped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
