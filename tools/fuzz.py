"""Fuzz everything that ropepp-lit reads: modify a file of a valid input, read the input, and judge the result.

    python tools/fuzz.py --cases 10000 --out fuzzed           # all targets; the same command resumes
    python tools/fuzz.py --targets manifests,recipes --minutes 10
    python tools/fuzz.py --only manifests:1234 --keep case    # a single case; its files are stored in `case`

| verdict     | result                                                                                              |
|-------------|-----------------------------------------------------------------------------------------------------|
| `refused`   | one line and exit code 2                                                                            |
| `right`     | success with the result that the target's judge expects (`fuzzing/targets.py`)                      |
| `wrong`     | success with another result                                                                         |
| `traceback` | any other exception or exit code, another number of lines, or a crash                               |
| `hang`      | more than 20 s                                                                                      |
| `memory`    | more than 2 GiB                                                                                     |
| `escape`    | a file outside the folder of the case was created, modified or removed                              |

Cases run in forked processes, 200 sequentially in each. A case is determined by `--seed` and its number.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before the imports that read them.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",
    "HF_HUB_OFFLINE": "1",
}

import torch
from fuzzing.cases import SECONDS, VERDICTS, Case, captured, write_tree
from fuzzing.targets import TARGETS
from tqdm import tqdm

CHUNK = 200
"""Number of cases per process."""


class Fuzzer:
    """Valid inputs of the targets, and cases that modify them.

    Args:
        seed: Seed of all cases.
        work: Folder for inputs and cases.
    """

    def __init__(self, *, seed: int, work: Path) -> None:
        self.seed, self.work = seed, work
        self._whole: dict[str, dict[str, bytes]] = {}
        self._expected: dict[tuple[str, str], Any] = {}

    def whole(self, name: str) -> dict[str, bytes]:
        """Return the valid input of a target: contents by file name."""
        if name not in self._whole:
            folder = self.work / "whole"
            with self._reported(name):
                TARGETS[name].make(folder)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            self._whole[name] = {str(path.relative_to(folder)): path.read_bytes() for path in files}
            shutil.rmtree(folder)
            self._expected_of(name, next(iter(self._whole[name])))  # warms up what is loaded or compiled once
        return self._whole[name]

    def case(self, name: str, number: int, root: Path) -> Case:
        """Create a case in its own folder."""
        case = Case(name, TARGETS[name], number, seed=self.seed, whole=self.whole(name), root=root)
        case.expected = self._expected_of(name, str(case.path.relative_to(case.folder)))
        return case

    def _expected_of(self, name: str, changed: str) -> Any:
        """Return the result of reading the valid input, for cases that modify the given file."""
        if (name, changed) not in self._expected:
            copy = self.work / f"copy-{os.getpid()}"
            write_tree(self.whole(name), copy)
            with self._reported(name):
                self._expected[name, changed] = TARGETS[name].read(copy, copy / changed)
            shutil.rmtree(copy)
        return self._expected[name, changed]

    @contextlib.contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Capture the output, and show it where the unchanged input is refused."""
        log = self.work / f"log-{os.getpid()}"
        try:
            with captured(log):
                yield
        except SystemExit as error:
            raise RuntimeError(f"{name}: the unchanged input is refused: {log.read_text()}") from error

    def run(self, name: str, numbers: range, root: Path, results: Path) -> None:
        """Run cases and write a line of results for each."""
        os.environ |= {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        tempfile.tempdir = None
        with results.open("a") as file:
            for number in numbers:
                file.write(json.dumps({"begun": number}) + "\n")
                file.flush()
                found = self.case(name, number, root).run()
                if found["verdict"] in ("refused", "right"):
                    found = {"number": number, "verdict": found["verdict"]}
                file.write(json.dumps(found) + "\n")
                file.flush()


class Pool:
    """Forked processes, each with a chunk of cases; if one dies or hangs, that is a finding, and the rest restarts."""

    def __init__(self, fuzzer: Fuzzer, workers: int) -> None:
        self._fuzzer, self._free = fuzzer, list(range(workers))
        self._running: dict[int, tuple[str, range, int, Path]] = {}

    def start(self, name: str, numbers: range) -> None:
        """Start a chunk of cases."""
        place = self._free.pop()
        results = self._fuzzer.work / f"results-{place}"
        results.unlink(missing_ok=True)
        results.touch()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.setpgid(0, 0)
                self._fuzzer.run(name, numbers, self._fuzzer.work / f"w{place}", results)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        self._running[pid] = name, numbers, place, results

    @property
    def is_full(self) -> bool:
        """Whether no process is free."""
        return not self._free

    @property
    def is_busy(self) -> bool:
        """Whether a process is running."""
        return bool(self._running)

    def finished(self) -> Iterator[tuple[str, range, list[dict[str, Any]]]]:
        """Yield the results of chunks that have finished."""
        for pid, (name, numbers, place, results) in list(self._running.items()):
            if time.time() - results.stat().st_mtime > SECONDS + 15:
                os.kill(pid, signal.SIGKILL)
            if not os.waitpid(pid, os.WNOHANG)[0]:
                continue
            status = "killed after the time" if time.time() - results.stat().st_mtime > SECONDS + 10 else "died"
            lines = [json.loads(line) for line in results.read_text().splitlines()]
            found = [line for line in lines if "verdict" in line]
            del self._running[pid]
            self._free.append(place)
            begun = [line["begun"] for line in lines if "begun" in line]
            if len(found) < len(numbers):
                number = begun[-1] if begun else numbers.start
                kind = "hang" if status != "died" else "traceback"
                found.append(
                    {"number": number, "verdict": kind, "change": "", "file": "", "detail": status, "output": ""}
                )
            rest = range(numbers.start + len(found), numbers.stop)
            yield name, range(numbers.start, rest.start), found
            if rest:
                self.start(name, rest)
        time.sleep(0.02)


def fuzz(names: list[str], *, cases: int, seed: int, minutes: float, workers: int, out: Path) -> None:
    """Run the cases that are not done yet; counts and findings are stored in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    counts = _read_counts(out, seed)
    work = make_work()
    fuzzer, deadline = Fuzzer(seed=seed, work=work), time.monotonic() + 60 * minutes
    todo = [(name, start) for start in range(0, cases, CHUNK) for name in names]  # all targets at the same pace
    todo = [(name, start) for name, start in todo if start >= sum(counts[name].values())]
    for name in dict.fromkeys(name for name, _ in todo):
        fuzzer.whole(name)
    pool = Pool(fuzzer, workers)
    try:
        with tqdm(
            total=cases * len(names), initial=sum(sum(counts[name].values()) for name in names), unit=" cases"
        ) as bar:
            while pool.is_busy or (todo and time.monotonic() < deadline):
                while todo and not pool.is_full and time.monotonic() < deadline:
                    name, start = todo.pop(0)
                    pool.start(name, range(start, min(start + CHUNK, cases)))
                for name, numbers, found in pool.finished():
                    verdicts = Counter(line["verdict"] for line in found)
                    counts[name].update(verdicts)
                    with (out / "counts.jsonl").open("a") as file:
                        done = {"seed": seed, "target": name, "start": numbers.start, "stop": numbers.stop}
                        file.write(json.dumps({**done, "verdicts": verdicts}) + "\n")
                    with (out / "findings.jsonl").open("a") as file:
                        for line in found:
                            if line["verdict"] not in ("refused", "right"):
                                file.write(json.dumps({"target": name, **line}) + "\n")
                    bar.update(len(found))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table({name: counts[name] for name in names}))
    print(kinds(out / "findings.jsonl"))
    sys.exit(
        any(counts[name][verdict] for name in names for verdict in VERDICTS if verdict not in ("refused", "right"))
    )


def _read_counts(out: Path, seed: int) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {name: Counter() for name in TARGETS}
    path = out / "counts.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        done = json.loads(line)
        if done["seed"] != seed:
            sys.exit(f"{out}: contains cases of the seed {done['seed']}; name another --out")
        counts[done["target"]].update(done["verdicts"])
    return counts


def table(counts: dict[str, Counter[str]]) -> str:
    """Return a table of the number of cases by target and verdict."""
    lines = [f"{'target':<20}{'cases':>8}" + "".join(f"{verdict:>11}" for verdict in VERDICTS)]
    for name, found in counts.items():
        lines.append(f"{name:<20}{sum(found.values()):>8,}" + "".join(f"{found[verdict]:>11,}" for verdict in VERDICTS))
    return "\n".join(lines)


def kinds(path: Path) -> str:
    """Return the findings by target, verdict and source line, most frequent first, each with a case to repeat."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        place = line["detail"].split(":")
        found.setdefault((line["target"], line["verdict"], ":".join(place[:2])[:80]), []).append(line)
    lines = []
    for (target, verdict, _), cases in sorted(found.items(), key=lambda item: -len(item[1])):
        first = cases[0]
        lines.append(f"{len(cases):>6} × {target} {verdict}: {first['detail'][:160]}")
        lines.append(f"         {target}:{first['number']} {first['file']}: {first['change'][:120]}")
    return "\n".join(lines) or "No findings."


def make_work() -> Path:
    """Create a folder for cases, in memory if possible."""
    memory = Path("/dev/shm")  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="ropepp-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))


def _only(text: str, *, seed: int, keep: Path | None) -> None:
    """Run one case in this process and print its result."""
    name, _, number = text.rpartition(":")
    work = make_work()
    try:
        root = work / "w0"
        case = Fuzzer(seed=seed, work=work).case(name, int(number), root)
        if keep is not None:
            shutil.copytree(case.folder, keep, symlinks=True)
        found = case.run()
        print(f"{found['verdict']}: {found['file']}: {found['change']}\n{found['detail']}\n{found['output']}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated targets; default: all")
    parser.add_argument("--cases", type=int, default=10_000, help="number of cases per target")
    parser.add_argument("--minutes", type=float, default=1e9, help="time after which no new cases start")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzzed"), help="folder for counts and findings")
    parser.add_argument("--only", help="a single case, TARGET:NUMBER")
    parser.add_argument("--keep", type=Path, help="with --only: new folder for the modified files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        _only(options.only, seed=options.seed, keep=options.keep)
        return
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        sys.exit(f"no target {unknown[0]!r}; choose one of {', '.join(TARGETS)}")
    fuzz(
        names, cases=options.cases, seed=options.seed, minutes=options.minutes, workers=options.workers, out=options.out
    )


if __name__ == "__main__":
    main()
