"""Event log of a run, `run.jsonl`: one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning
import lightning.pytorch as pl
import torch

from ropepp_lit import __version__
from ropepp_lit.files import sync
from ropepp_lit.json_files import json_line

RUN_LOG = "run.jsonl"
"""File name of the log in a run's folder."""

Event = Literal["start", "resume", "save", "validation", "skip", "signal", "rollback", "warning", "end"]

_SYNCED: tuple[Event, ...] = ("start", "save", "rollback", "end")
"""Events that are synced to disk before :meth:`RunLog.write` returns."""


class RunLog:
    """Appends events to the file `run.jsonl`; does nothing until it is opened, which only rank 0 does.

    Each line has `time` (UTC, ISO 8601), `event` and `step` (optimizer steps taken), then the values of the event.
    A line is written by a single system call. If a killed process leaves an incomplete line, it is terminated when the
    run continues. A full disk does not end training: a notice is printed once, and later events are still attempted.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._descriptor: int | None = None
        self._is_incomplete = self._notice_printed = False
        self._lock = threading.Lock()  # the thread that writes checkpoints logs too

    def open(self, folder: Path) -> None:
        """Open the log of a run's folder for appending. Call it on rank 0 only."""
        self._path = folder / RUN_LOG
        with self._lock:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)  # on Windows
                self._descriptor = os.open(self._path, flags, 0o666)
                if os.lseek(self._descriptor, 0, os.SEEK_END):
                    os.lseek(self._descriptor, -1, os.SEEK_END)
                    self._is_incomplete = os.read(self._descriptor, 1) != b"\n"
            except OSError as error:
                self._notice(error)

    @property
    def is_open(self) -> bool:
        """Whether events are written."""
        return self._descriptor is not None

    def write(self, event: Event, *, step: int, **values: Any) -> None:
        """Append an event.

        Args:
            event: Name of the event.
            step: Optimizer steps taken.
            values: Values of JSON types; numbers that are not finite become null.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json_line(_finite({"time": time, "event": event, "step": step, **values}))
        with self._lock:
            if self._descriptor is None:
                return
            try:
                data = b"\n" + line if self._is_incomplete else line
                self._is_incomplete = True
                self._is_incomplete = os.write(self._descriptor, data) != len(data)
                if event in _SYNCED:
                    sync(self._descriptor)
            except OSError as error:
                self._notice(error)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _notice(self, error: OSError) -> None:
        if not self._notice_printed:
            self._notice_printed = True
            print(
                f"Notice: {self._path}: {error.strerror}; the run continues, and events may be missing in the file.",
                file=sys.stderr,
            )


def read_run_log(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a run's folder in order; incomplete lines are skipped."""
    try:
        lines = (folder / RUN_LOG).read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def describe_start(trainer: pl.Trainer, command: str) -> dict[str, Any]:
    """Return the values of the event `start`: versions, machine, strategy and command."""
    device = trainer.strategy.root_device
    return {
        "versions": {
            "ropepp_lit": __version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "litdata": version("litdata"),
            "python": platform.python_version(),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        },
        "host": platform.node(),
        "pid": os.getpid(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world_size": trainer.world_size,
        "num_nodes": trainer.num_nodes,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "max_steps": trainer.max_steps,
        "command": command,
    }


def _finite(value: Any) -> Any:
    """Return a value in which numbers that are not finite are replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
