"""A case of the fuzzer: a changed input in a folder of its own, read within limits, and a verdict on what came out."""

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
"""What a case may take, in seconds and bytes."""

Judge = Callable[[Any, Any, str, Path], str | None]
"""From what came out of the whole input and of the changed one, the change in words and the changed file: what is
wrong, or None."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is fuzzed."""

    make: Callable[[Path], None]
    """Makes the whole input in a folder."""
    files: dict[str, str]
    """Globs of the files that are changed, and their format (:data:`fuzzing.mutations.MUTATIONS`)."""
    read: Callable[[Path, Path], Any]
    """Reads the input in a folder, of which a file was changed; returns what came out."""
    judge: Judge
    """Whether a success is right."""


def write_tree(files: dict[str, bytes], folder: Path) -> None:
    """Write files into a new folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class HangError(BaseException):
    """A case takes too long; no `except Exception` stops it."""


class Case:
    """One changed input.

    Args:
        name: Of the target, for the random numbers.
        target: What is fuzzed.
        number: Of the case.
        seed: Of all cases.
        whole: The target's whole input, contents by name.
        root: Folder in which the case has its own; nothing else is in it.
    """

    def __init__(
        self, name: str, target: Target, number: int, *, seed: int, whole: dict[str, bytes], root: Path
    ) -> None:
        self.number, self.target = number, target
        self.expected: Any = None  # what comes out of the whole input
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
                continue  # a change that the file's values do not allow

    def run(self) -> dict[str, Any]:
        """Read the changed input; returns `verdict`, `change`, and what is to be known of a finding."""
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
    """Let all that is printed, by libraries too, go to a file."""
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
    """Raise HangError after the time, and let larger allocations fail."""

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
    """The error with the last line of our own in its traceback, and the traceback's end."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "ropepp_lit" in frame.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    text = "".join(traceback.format_exception(error, limit=-8))
    return f"{where} {type(error).__name__}: {str(error)[:150]}", text
