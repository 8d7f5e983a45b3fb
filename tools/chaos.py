"""Inject faults into commands at random moments, resume them, and compare the results with an undisturbed run.

    python tools/chaos.py --out runs/chaos --minutes 30                             # every kind, every command
    python tools/chaos.py --out runs/chaos --jobs train,prepare --kinds SIGKILL,EIO
    python tools/chaos.py --out runs/chaos --only train:EIO:17                      # repeat a case; keeps its folder

A case is a command, a kind of fault and a number that seeds the moment. The fault is injected, the same command is run
again unless it succeeded, and every file must equal that of an undisturbed run: weights, optimizer state, position in
the data and curves bit for bit. Failures are

    lost       the same command fails, or a run does not resume from its newest checkpoint
    wrong      the command succeeds, and a file differs
    traceback  an error is not reported by the command in one line
    hung       a process does not end

Files that differ between two undisturbed runs are listed at the start, and only their names are compared. Results are
stored in OUT/cases.jsonl; the same command adds to them. Needs Linux, a C compiler for faults at a specific file
operation, and root for the small disk. Kinds that are not available are listed at the start.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
from chaos_jobs import JOBS, make_inputs, result
from chaos_processes import Processes, attempt, build_faults, is_alive
from tqdm import tqdm

BAD = ("lost", "wrong", "traceback", "hung")


class Kind(NamedTuple):
    """A kind of fault."""

    fault: str = ""
    """Fault of faults.c; signals are sent at a file operation in every other case, and else at a random time."""

    reaches_all: bool = False
    """Whether it affects all ranks instead of one."""

    least_ranks: int = 1
    """Minimum number of processes of a job."""

    ends: bool = True
    """Whether it can end the processes."""


KINDS = {
    "SIGKILL": Kind(f"signal {signal.SIGKILL.value}", reaches_all=True),
    "SIGTERM": Kind(f"signal {signal.SIGTERM.value}"),
    "SIGINT": Kind(f"signal {signal.SIGINT.value}"),
    "SIGUSR1": Kind(f"signal {signal.SIGUSR1.value}"),
    "killed rank": Kind(f"signal {signal.SIGKILL.value}", least_ranks=2),
    "stopped rank": Kind(least_ranks=2, ends=False),
    "closed pipe": Kind(),
    "full disk": Kind(f"always {errno.ENOSPC}", reaches_all=True),
    "small disk": Kind(),
    "read-only": Kind(f"always {errno.EROFS}", reaches_all=True),
    "EIO": Kind(f"once {errno.EIO}"),
    "clock": Kind("clock", ends=False),
}


class Undisturbed(NamedTuple):
    """Result of a job without faults."""

    files: dict[str, str]
    """Result of :func:`chaos_jobs.result`; an empty text for files that differ between two runs."""

    operations: list[int]
    """Number of file operations of each rank."""

    seconds: float
    size: int
    """Total size of its files in bytes."""


class Case(NamedTuple):
    """A job with one injected fault."""

    job: str
    kind: str
    number: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.job}-{self.kind.replace(' ', '-')}-{self.number}"


class Disturbance:
    """Fault injection into the processes of a case.

    Attributes:
        faults: Environment variables of faults.c, by rank.
        came: Whether the fault reached a process that had not ended.
    """

    def __init__(self, case: Case, usual: Undisturbed, folder: Path, *, has_faults: bool) -> None:
        job, self.kind = JOBS[case.job], KINDS[case.kind]
        draw = random.Random(str(case))
        self._case, self._folder, self._usual = case, folder, usual
        self._rank = draw.randrange(job.ranks)
        self._share, self._pause_s = draw.random(), draw.uniform(0.2, 3)
        self._mark = folder / "came"
        self._reached = False
        self.faults: dict[int, dict[str, str]] = {}
        fault = self.kind.fault
        if fault == "clock":
            fault += f" {draw.choice([-1, 1]) * round(10 ** draw.uniform(0, 7))}"
        at_operation = bool(fault) and has_faults and not (fault.startswith("signal") and case.number % 2)
        if at_operation:
            is_signal = fault.startswith("signal")
            writers = [rank for rank in range(job.ranks) if usual.operations[rank]]
            for rank in writers if self.kind.reaches_all and not is_signal else [draw.choice(writers)]:
                at = 1 + int(self._share * usual.operations[rank])
                self.faults[rank] = {"CHAOS_AT": str(at), "CHAOS_FAULT": fault, "CHAOS_CAME": str(self._mark)}
        self._signal = int(fault.split()[1]) if fault.startswith("signal") and not at_operation else None
        self._follows = self.kind.reaches_all and at_operation and fault.startswith("signal") and job.ranks > 1
        self.output = folder / "output-0"
        if case.kind == "closed pipe":
            os.mkfifo(self.output)
            self._reader = os.open(self.output, os.O_RDONLY | os.O_NONBLOCK)
        if case.kind == "small disk":
            size = 4096 * (4 + int(self._share * usual.size / 4096))
            _mount(folder / "work", size)
            self._reached = True

    @property
    def came(self) -> bool:
        """Whether the fault reached a process that had not ended."""
        return self._reached or self._mark.exists()

    def act(self, processes: list[int]) -> None:
        """Inject the faults that faults.c does not; returns when this is done."""
        if self._follows:
            while not self._mark.exists() and any(map(is_alive, processes)):
                time.sleep(0.005)
            self._send(processes, signal.SIGKILL)
            return
        reached = processes if self.kind.reaches_all else [processes[self._rank]]
        moment = time.monotonic() + self._share * self._usual.seconds
        if self._case.kind == "closed pipe":
            while time.monotonic() < moment and any(map(is_alive, processes)):
                with suppress(BlockingIOError):
                    os.read(self._reader, 65536)
                time.sleep(0.005)
            self._reached = is_alive(processes[0])
            os.close(self._reader)
        elif self._case.kind == "stopped rank":
            time.sleep(moment - time.monotonic())
            self._send(reached, signal.SIGSTOP)
            time.sleep(self._pause_s)
            self._send(reached, signal.SIGCONT)
        elif self._signal is not None:
            time.sleep(moment - time.monotonic())
            self._send(reached, self._signal)

    def _send(self, processes: list[int], number: int) -> None:
        self._reached |= any(map(is_alive, processes))
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def make_room(self) -> None:
        """Enlarge the small disk."""
        if self._case.kind == "small disk":
            _mount(self._folder / "work", 2**30, again=True)

    def close(self) -> None:
        """Unmount the small disk."""
        if self._case.kind == "small disk":
            subprocess.run(["umount", "-l", self._folder / "work"], check=True)


class Chaos:
    """Runner of cases.

    Args:
        out: Output folder.
        jobs: Names of commands.
    """

    def __init__(self, out: Path, jobs: list[str]) -> None:
        self.out, self.inputs = out, out / "inputs"
        self._faults = build_faults(out)
        self._local = threading.local()
        self._usual: dict[str, Undisturbed] = {}
        if not self.inputs.exists():
            partial = out / "inputs.partial"
            shutil.rmtree(partial, ignore_errors=True)
            make_inputs(partial, lambda words: self._run(words, partial))
            partial.rename(self.inputs)
        for name in tqdm(jobs, desc="undisturbed", unit=" commands"):
            self._usual[name] = self._undisturbed(name)

    @property
    def _processes(self) -> Processes:
        """Processes of this thread."""
        if not hasattr(self._local, "processes"):
            self._local.processes = Processes(self._faults)
        found: Processes = self._local.processes
        return found

    def _run(self, words: list[str], folder: Path) -> None:
        log = self.out / "inputs.log"
        process = self._processes.start(words, folder, log, log)
        if self._processes.wait(process, 120):
            sys.exit(f"`ropepp-lit {words[0]}` failed; see {log}")

    def reason_against(self, kind: str) -> str | None:
        """Return why a kind of fault is not available; None if it is."""
        if KINDS[kind].fault and not KINDS[kind].fault.startswith("signal") and self._faults is None:
            return "no C compiler (cc)"
        if kind == "small disk" and os.geteuid():
            return "only root can mount a file system"
        return None

    def _undisturbed(self, name: str) -> Undisturbed:
        found = []
        for number in range(2):
            folder = self.out / "undisturbed" / f"{name}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "work").mkdir(parents=True)
            counts = [folder / f"operations-{rank}" for rank in range(JOBS[name].ranks)]
            faults = {rank: {"CHAOS_COUNT": str(path)} for rank, path in enumerate(counts)}
            done = attempt(self._processes, JOBS[name], folder / "work", self.inputs, faults)
            if not done.ended_well:
                sys.exit(f"{name} fails undisturbed: {done.codes}; see {folder}")
            operations = [int(path.read_text()) if path.exists() else 0 for path in counts]
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            found.append(Undisturbed(result(folder / "work"), operations, done.seconds, size))
        one, other = (run.files for run in found)
        if one.keys() != other.keys():
            sys.exit(f"{name}: two undisturbed runs write other files: {sorted(one.keys() ^ other.keys())}")
        changing = [file for file in one if one[file] != other[file]]
        if changing:
            tqdm.write(f"{name}: two undisturbed runs differ in {', '.join(changing)}: only the names are compared")
        return found[1]._replace(files={file: "" if file in changing else other[file] for file in other})

    def try_case(self, case: Case) -> dict[str, Any]:
        """Run a case; its folder is kept after a failure."""
        folder = self.out / "cases" / case.name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "work").mkdir(parents=True)
        disturbance = Disturbance(case, self._usual[case.job], folder, has_faults=self._faults is not None)
        try:
            verdict, detail = self._judge(case, folder, disturbance)
        finally:
            disturbance.close()
        if verdict not in BAD:
            shutil.rmtree(folder)
        return {**case._asdict(), "verdict": verdict, "detail": detail}

    def _judge(self, case: Case, folder: Path, disturbance: Disturbance) -> tuple[str, str]:
        job, work = JOBS[case.job], folder / "work"
        first = attempt(self._processes, job, work, self.inputs, disturbance.faults, disturbance.act)
        if not disturbance.came:
            return "late", ""
        if None in first.codes:
            return "hung", f"process {first.codes.index(None)}"
        for errors in first.errors:
            if "Traceback" in errors:
                return "traceback", errors.strip().splitlines()[-1]
        if not first.ended_well:
            if not disturbance.kind.ends:
                return "lost", f"it ended with {first.codes}: {_last_line(first.errors)}"
            disturbance.make_room()
            newest = max((int(path.stem[5:]) for path in work.glob("run/checkpoints/step=*.ckpt")), default=0)
            (folder / "output-0").unlink()
            second = attempt(self._processes, job, work, self.inputs, {})
            if None in second.codes:
                return "hung", "when resumed"
            if not second.ended_well:
                return "lost", f"the resumed command ended with {second.codes}: {_last_line(second.errors)}"
            if newest and f"step={newest}.ckpt at step {newest}" not in second.output:
                return "lost", f"it did not resume from step {newest}"
        try:
            files, usual = result(work), self._usual[case.job].files
        except (AssertionError, ValueError) as error:
            return "wrong", str(error)
        names = sorted(
            file for file in files.keys() | usual.keys() if usual.get(file) != files.get(file) and usual.get(file) != ""
        )
        return ("wrong", ", ".join(names)) if names else ("right", "" if first.ended_well else "resumed")


def _last_line(errors: list[str]) -> str:
    return next((text.strip().splitlines()[-1] for text in errors if text.strip()), "")


def _mount(folder: Path, size: int, *, again: bool = False) -> None:
    """Mount a file system in memory with the given size in bytes."""
    options = f"{'remount,' if again else ''}size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table of cases and failures by command and kind."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    counts = Counter((row["job"], row["kind"], row["verdict"]) for row in rows if row["verdict"] != "late")

    def cell(job: str, kind: str) -> str:
        found = {verdict: n for (a, b, verdict), n in counts.items() if (a, b) == (job, kind)}
        bad = [f"{found[verdict]} {verdict}" for verdict in BAD if verdict in found]
        return ", ".join([str(sum(found.values())), *bad]) if found else ""

    lines = [f"| tried | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    lines += [f"| {job} | {' | '.join(cell(job, kind) for kind in kinds)} |" for job in JOBS]
    totals = Counter(row["verdict"] for row in rows)
    tried = sum(n for verdict, n in totals.items() if verdict != "late")
    bad = ", ".join(f"{totals[verdict]} {verdict}" for verdict in BAD)
    return "\n".join([*lines, "", f"{tried:,} disturbances: {bad}."])


def chaos(
    *,
    out: Path,
    minutes: float = 10.0,
    cases: int | None = None,
    jobs: str = ",".join(JOBS),
    kinds: str = ",".join(KINDS),
    only: str = "",
    workers: int = os.cpu_count() or 1,
) -> None:
    """Inject faults into commands and print a table.

    Args:
        out: Output folder.
        minutes: Time after which no new cases start.
        cases: Total number of cases per command and kind; empty means no limit.
        jobs: Comma-separated commands.
        kinds: Comma-separated kinds of faults.
        only: A single case to run instead: COMMAND:KIND:NUMBER.
        workers: Number of concurrent cases.
    """
    chosen = (only.split(":")[0] if only else jobs).split(",")
    wanted = (only.split(":")[1] if only else kinds).split(",")
    for name, known in [*((job, JOBS) for job in chosen), *((kind, KINDS) for kind in wanted)]:
        if name not in known:
            sys.exit(f"no command or kind {name!r}; choose one of {', '.join(known)}")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    all_cases = Chaos(out, chosen)
    if only:
        print(json.dumps(all_cases.try_case(Case(chosen[0], wanted[0], int(only.split(":")[2]))), indent=1))
        return
    for kind in list(wanted):
        if reason := all_cases.reason_against(kind):
            print(f"{kind}: skipped: {reason}")
            wanted.remove(kind)
    kept = out / "cases.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    pairs = [(job, kind) for job in chosen for kind in wanted if JOBS[job].ranks >= KINDS[kind].least_ranks]
    begun = Counter((row["job"], row["kind"]) for row in rows)
    deadline = time.monotonic() + 60 * minutes
    with ThreadPoolExecutor(workers) as pool, kept.open("a") as file, tqdm(unit=" cases", smoothing=0) as bar:
        running: set[Future[dict[str, Any]]] = set()
        while True:
            pairs = [pair for pair in pairs if cases is None or begun[pair] < cases]
            while pairs and len(running) < workers and time.monotonic() < deadline:
                pair = min(pairs, key=lambda pair: begun[pair])
                running.add(pool.submit(all_cases.try_case, Case(*pair, begun[pair])))
                begun[pair] += 1
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                row = future.result()
                rows.append(row)
                print(json.dumps(row), file=file, flush=True)
                bar.update()
                if row["verdict"] in BAD:
                    bar.write(f"{row['job']}:{row['kind']}:{row['number']}: {row['verdict']}: {row['detail']}")
    print(table(rows))
    sys.exit(any(row["verdict"] in BAD for row in rows))


if __name__ == "__main__":
    jsonargparse.auto_cli(chaos, as_positional=False)
