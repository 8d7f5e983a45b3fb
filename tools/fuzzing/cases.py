"""Cases of the fuzzer: a modified input in its own folder, read within limits, and a verdict on the result."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing.mutations import MUTATIONS
from fuzzing.values import Places
from ropepp_lit.errors import UsageError

VERDICTS = ("refused", "right", "wrong", "traceback", "hang", "memory", "escape")
"""See :mod:`fuzz`."""

SECONDS, MEMORY = 20, 2 * 2**30
"""Limits of a case, in seconds and bytes."""

Judge = Callable[[Any, Any, str, Path], str | None]
"""Function of the results for the valid and the modified input, the description of the modification and the modified
file; returns what is wrong, or None."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Kind of input to fuzz."""

    make: Callable[[Path], None]
    """Function that creates a valid input in a folder."""
    files: dict[str, str]
    """Globs of the files to modify, and their format (:data:`fuzzing.mutations.MUTATIONS`)."""
    read: Callable[[Path, Path], Any]
    """Function that reads the input in a folder, one file of which was modified, and returns the result."""
    judge: Judge
    """Function that decides whether a success is right."""


def write_tree(files: dict[str, bytes], folder: Path) -> None:
    """Write files into a new folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class HangError(BaseException):
    """Timeout of a case; not caught by `except Exception`."""


class Case:
    """A modified input.

    Args:
        name: Name of the target, for the random numbers.
        target: Target.
        number: Number of the case.
        seed: Seed of all cases.
        whole: Valid input of the target, contents by file name.
        root: Folder for the folder of the case and nothing else.
    """

    def __init__(
        self, name: str, target: Target, number: int, *, seed: int, whole: dict[str, bytes], root: Path
    ) -> None:
        self.number, self.target = number, target
        self.expected: Any = None  # result for the valid input
        shutil.rmtree(root, ignore_errors=True)
        self.root, self.folder = root, root / "a" / "b" / "case"
        self.folder.parent.mkdir(parents=True)
        for other in ("home", "tmp"):
            (root / other).mkdir()
        outside = root / "a" / "outside"
        outside.write_bytes(b"as it was")
        write_tree(whole, self.folder)
        rng = random.Random(f"{seed}:{name}:{number}")
        self.path, form = rng.choice(
            [(path, form) for glob, form in self.target.files.items() for path in sorted(self.folder.glob(glob))]
        )
        for _ in range(100):
            try:
                self.change = rng.choice(MUTATIONS[form])(rng, self.path, Places(self.folder, outside))
                break
            except (TypeError, ValueError, OverflowError, KeyError, AttributeError, RuntimeError, RecursionError):
                continue  # a modification that the values of the file do not allow

    def run(self) -> dict[str, Any]:
        """Read the modified input; returns `verdict`, `change`, and details of a finding."""
        before = dict(self._outside())
        verdict, detail, written = self._read()
        after = dict(self._outside())
        if before != after:
            names = sorted(str(path) for path in before.keys() ^ after.keys()) or ["contents"]
            verdict, detail = "escape", f"{names} changed outside"
        return {"number": self.number, "verdict": verdict, "file": str(self.path.relative_to(self.folder)),
                "change": self.change, "detail": detail, "output": written[-3000:]}  # fmt: skip

    def _read(self) -> tuple[str, str, str]:
        output = self.root / "tmp" / "output"
        try:
            with captured(output), _limited():
                found = self.target.read(self.folder, self.path)
        except UsageError as error:
            return ("refused", "", "") if str(error).strip() else ("traceback", "an empty line", "")
        except SystemExit as error:
            return self._exited(error, output.read_text(errors="replace"))
        except OSError as error:  # cli.main prints it in one line
            if error.filename is not None:
                return "refused", "", ""
            return "traceback", *_described(error)
        except HangError as error:
            return "hang", *_described(error)
        except MemoryError as error:
            return "memory", *_described(error)
        except BaseException as error:
            return ("memory" if "allocate memory" in str(error) else "traceback"), *_described(error)
        with contextlib.suppress(FileNotFoundError):
            if "panicked at" in (text := output.read_text(errors="replace")):
                return "traceback", "a panic in the output", text
        try:
            fault = self.target.judge(self.expected, found, self.change, self.path)
        except Exception as error:
            return "wrong", *_described(error)
        return ("right", "", "") if fault is None else ("wrong", fault, "")

    @staticmethod
    def _exited(error: SystemExit, written: str) -> tuple[str, str, str]:
        lines = [line for line in written.splitlines() if line.startswith("ropepp-lit: error: ")]
        if error.code != 2 or len(lines) != 1 or "Traceback" in written or "panicked at" in written:
            return "traceback", f"exit code {error.code} and {len(lines)} lines", written
        return "refused", "", ""

    def _outside(self) -> Iterator[tuple[Path, Any]]:
        for place, folders, files in os.walk(self.root):
            if Path(place) == self.folder.parent and "case" in folders:
                folders.remove("case")
            for name in (*folders, *files):
                path = Path(place, name)
                if name != "output":
                    yield path, path.read_bytes() if path.is_file() else None


@contextlib.contextmanager
def captured(path: Path) -> Iterator[None]:
    """Redirect all output to a file, also that of libraries."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("w", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise HangError after the time limit, and make allocations above the memory limit fail."""

    def stop(*_: Any) -> None:
        raise HangError(f"more than {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _described(error: BaseException) -> tuple[str, str]:
    """Return the error with the last line of ropepp_lit in its traceback, and the end of the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "ropepp_lit" in frame.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    text = "".join(traceback.format_exception(error, limit=-8))
    return f"{where} {type(error).__name__}: {str(error)[:150]}", text
