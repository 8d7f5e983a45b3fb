"""`run.jsonl`: what happened in a run, one JSON object a line, for programs and for whoever looks into it later."""

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
"""Its name in a run's folder."""

Event = Literal["start", "resume", "save", "validation", "skip", "signal", "rollback", "warning", "end"]

_KEPT: tuple[Event, ...] = ("start", "save", "rollback", "end")
"""Events that are on the disk when :meth:`RunLog.write` returns."""


class RunLog:
    """Appends events to the file `run.jsonl`. Until it is opened, and on all ranks but rank 0, it does nothing.

    Each line has `time` (UTC, ISO 8601), `event` and `step` (optimizer steps taken), then what belongs to the event.
    A line is written by one call of the operating system, so a killed process leaves it whole or cut; a cut line is
    ended when the run goes on. A full disk ends no training: one notice, and later events are tried again.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._descriptor: int | None = None
        self._is_cut = self._has_noticed = False
        self._lock = threading.Lock()  # checkpoints are written by a thread

    def open(self, folder: Path) -> None:
        """Append to the log of a run's folder; on rank 0."""
        self._path = folder / RUN_LOG
        with self._lock:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)  # on Windows
                self._descriptor = os.open(self._path, flags, 0o666)
                if os.lseek(self._descriptor, 0, os.SEEK_END):
                    os.lseek(self._descriptor, -1, os.SEEK_END)
                    self._is_cut = os.read(self._descriptor, 1) != b"\n"
            except OSError as error:
                self._notice(error)

    @property
    def is_open(self) -> bool:
        """Whether events are written."""
        return self._descriptor is not None

    def write(self, event: Event, *, step: int, **values: Any) -> None:
        """Append an event.

        Args:
            event: Its name.
            step: Optimizer steps taken.
            values: What belongs to it, of types that JSON has; numbers that are not finite become null.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json_line(_finite({"time": time, "event": event, "step": step, **values}))
        with self._lock:
            if self._descriptor is None:
                return
            try:
                whole = b"\n" + line if self._is_cut else line
                self._is_cut = True
                self._is_cut = os.write(self._descriptor, whole) != len(whole)
                if event in _KEPT:
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
        if not self._has_noticed:
            self._has_noticed = True
            print(
                f"Notice: {self._path}: {error.strerror}; the run goes on, and events may be missing there.",
                file=sys.stderr,
            )


def read_run_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run's folder, in their order; lines that a kill or a full disk cut are left out."""
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
    """What the event `start` says: versions, the machine, and how the ranks share the work."""
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
    """A value without numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
