"""Watchdog that ends a run in which a rank hangs, and reports which one."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch._C import _distributed_c10d

from ropepp_lit.errors import UsageError
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.run_log import RunLog

EXIT_CODE = 124
"""Exit code of a rank that times out, as that of `timeout`; launchers such as torchrun restart the run after it."""

_PHASES_WITHOUT_TIMEOUT = ("preparation", "evaluation")
"""Phases that can take longer than the timeout: in them only a process that does not respond ends the run."""

_STORE_TIMEOUT = 20.0
"""Maximum seconds for reading the store, which is a thread of rank 0 or of torchrun."""


class _Position(NamedTuple):
    """Position of a rank's main thread in the run."""

    number: int
    """Number of this position; increases with each one."""
    step: int
    """Current step, starting at 1."""
    phase: str
    """Phase of the step, for the message."""


class Watchdog(Callback):
    """Ends a run whose ranks make no progress, and prints the ranks, their step and the collective they wait in.

    A thread of each rank writes the position of its main thread to torch's store. A rank whose main thread makes no
    progress for `timeout` reads the positions of the others: ranks whose thread has stopped writing too are suspended,
    dead or disconnected.

    Args:
        timeout: Maximum seconds without progress. A micro-batch, a batch of a validation, the write of a checkpoint
            and the compilation of a step must each take less. The default, 1,500, is below torch's default timeout
            of collectives, 1,800. Empty disables the watchdog.
    """

    def __init__(self, *, timeout: float | None = 1500.0) -> None:
        if timeout is not None and not timeout > 0:
            raise UsageError(f"watchdog.timeout: {timeout} must be above 0, or empty for none")
        self.timeout = timeout
        self._position = _Position(0, 0, "preparation")
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._launched: list[Any] = []

    @property
    def description(self) -> str:
        """Description for the banner; empty if disabled."""
        return "" if self.timeout is None else f"no progress for {self.timeout:,g} s: end"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the thread (the processes are connected by now)."""
        if self.timeout is None:
            return
        assert isinstance(pl_module, CausalLM)
        self._set_position(trainer, "preparation")
        self._launched = getattr(trainer.strategy.launcher, "procs", [])
        arguments = (self.timeout, pl_module.run_log)
        self._stopped.clear()
        self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
        self._thread.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop the thread."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the thread."""
        self._stop()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Record progress: the forward pass starts."""
        self._set_position(trainer, "forward pass")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Record progress: the backward pass starts."""
        self._set_position(trainer, "backward pass")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Record progress: the optimizer step starts."""
        self._set_position(trainer, "optimizer step")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Record progress: the next batch is read."""
        self._set_position(trainer, "data")

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Record progress: a batch of a validation starts."""
        self._set_position(trainer, "validation")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Record progress: the state is collected, and will be written."""
        self._set_position(trainer, "checkpoint or data")

    def _set_position(self, trainer: pl.Trainer, phase: str) -> None:
        self._position = _Position(self._position.number + 1, trainer.global_step + 1, phase)

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, timeout: float, run_log: RunLog) -> None:
        """Run the watchdog loop (target of the thread)."""
        interval = min(5.0, timeout / 5)
        ranks = _Ranks()
        last, stalled, before = self._position, 0.0, time.monotonic()
        ranks.write(last, None)  # a rank that has written nothing counts as still starting
        while not self._stopped.wait(interval):
            now = time.monotonic()
            stalled += min(now - before, 2 * interval)  # all ranks may have been suspended and resumed
            before = now
            if self._position != last:
                last, stalled = self._position, 0.0
            ranks.write(last, last_collective() if stalled >= timeout / 2 else None)
            if stalled < timeout:
                continue
            hang = ranks.find_hang(last, wait=lambda: self._stopped.wait(interval))
            if hang is None or self._stopped.is_set() or self._position != last:
                stalled = 0.0
                continue
            self._exit(f"no progress for {timeout:g} seconds: {hang.text}", hang.is_reporter, run_log, interval)

    def _exit(self, problem: str, is_reporter: bool, run_log: RunLog, interval: float) -> None:
        """End the process immediately: the main thread is in a call that cannot be interrupted."""
        if not is_reporter:
            time.sleep(3 * interval)  # the reporting rank exits first, since a launcher then ends the others
        else:
            with contextlib.suppress(OSError):
                print(f"\nropepp-lit: error: {problem}; continue by --ckpt_path auto", file=sys.stderr, flush=True)
            step = self._position.step - 1
            _call(lambda: run_log.write("end", step=step, reason="hang", message=problem), timeout=5)  # disks can hang
        for process in self._launched:
            process.kill()
        os._exit(EXIT_CODE)


@contextmanager
def without_timeout(trainer: pl.Trainer) -> Iterator[None]:
    """Suspend the watchdog's timeout in a context."""
    watchdogs = [callback for callback in trainer.callbacks if isinstance(callback, Watchdog)]  # type: ignore[attr-defined]
    for watchdog in watchdogs:
        watchdog._set_position(trainer, "evaluation")
    yield
    for watchdog in watchdogs:
        watchdog._set_position(trainer, "data")


class _Hang(NamedTuple):
    text: str
    """Description for the error message."""
    is_reporter: bool
    """Whether this rank prints the message."""


class _Ranks:
    """Positions of all ranks, exchanged through torch's store."""

    def __init__(self) -> None:
        is_alone = not dist.is_initialized()
        self._rank, self._size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        self._num_writes, self._own = 0, ""
        self._store: dist.Store | None = None
        if self._size > 1:
            self._store = dist.distributed_c10d._get_default_store().clone()  # a connection for this thread
            self._store.set_timeout(timedelta(seconds=_STORE_TIMEOUT / 2))

    def write(self, position: _Position, collective: str | None) -> None:
        """Write the position of this rank's main thread, and a count that shows that the watchdog thread runs."""
        self._num_writes += 1
        where = f"step {position.step:,}, {position.phase}" + (f", {collective}" if collective else "")
        self._own = json.dumps([self._num_writes, position.number, position.phase, where])
        if self._store is not None:
            with contextlib.suppress(Exception):  # the other ranks report that this one does not respond
                self._store.set(self._key(self._rank), self._own)

    def find_hang(self, position: _Position, *, wait: Any) -> _Hang | None:
        """Read the positions twice and compare them; None if ranks make progress or are in a phase without timeout.

        Args:
            position: Position of this rank, which makes no progress.
            wait: Function that waits for one interval.
        """
        before = self._read()
        for _ in range(3):
            wait()
            self.write(position, last_collective())
        after = self._read()
        if after is None:
            return _Hang("rank 0, or the launcher that holds the processes' store, does not respond", self._rank == 1)
        silent = [  # a rank that has written nothing yet is still starting
            rank
            for rank, value in enumerate(after)
            if rank != self._rank and value is not None and before is not None and before[rank] == value
        ]
        others = [rank for rank in range(self._size) if rank not in silent]
        positions: dict[str, list[int]] = {}
        for rank in others:
            value, earlier = after[rank], before[rank] if before is not None else None
            _, number, phase, where = json.loads(value) if value else (0, 0, _PHASES_WITHOUT_TIMEOUT[0], "the start")
            has_progress = earlier is not None and json.loads(earlier)[1] != number
            if not silent and (phase in _PHASES_WITHOUT_TIMEOUT or has_progress):
                return None
            positions.setdefault(where, []).append(rank)
        parts = [
            f"{_names([rank])} does not respond, last known at {json.loads(after[rank] or self._own)[3]}"
            for rank in silent
        ]
        parts += [f"{_names(group)} at {where}" for where, group in positions.items()]
        return _Hang("; ".join(parts), self._rank == others[0])

    def _read(self) -> list[str | None] | None:
        """Return what each rank wrote last; None if the store does not respond."""
        if self._store is None:
            return [self._own]
        store, keys = self._store, [self._key(rank) for rank in range(self._size)]

        def read() -> list[str | None]:
            return [store.get(key).decode() if store.check([key]) else None for key in keys]

        return _call(read, timeout=_STORE_TIMEOUT)

    @staticmethod
    def _key(rank: int) -> str:
        return f"ropepp_lit/watchdog/{rank}"


def last_collective() -> str | None:
    """Return the oldest collective of this rank that has not completed, else the newest, from torch's flight recorder.

    It records only if the environment variable `TORCH_FR_BUFFER_SIZE` was set before the processes connected; the
    command sets it.
    """
    if not dist.is_initialized():
        return None
    name = "_dump_nccl_trace_json" if dist.get_backend() == "nccl" else "_dump_fr_trace_json"
    try:
        entries = json.loads(getattr(_distributed_c10d, name)(includeCollectives=True, onlyActive=False))["entries"]
    except (AttributeError, KeyError, ValueError, RuntimeError):  # another version of torch, or nothing is recorded
        return None
    entries = sorted(entries, key=lambda entry: entry["time_created_ns"])
    running = [entry for entry in entries if not entry["retired"]]
    if not entries:
        return None
    entry = running[0] if running else entries[-1]
    sizes = ", ".join("×".join(map(str, size)) for size in entry["input_sizes"])
    of = f" of {sizes} elements" if sizes else ""
    return f"{'in' if running else 'after'} {entry['profiling_name']}{of} (number {entry['collective_seq_id']})"


def _names(ranks: list[int]) -> str:
    """Format ranks, such as `ranks 0-6, 9`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    joined = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {joined}" if len(ranks) == 1 else f"ranks {joined}"


def _call(function: Any, *, timeout: float) -> Any:
    """Return the result of a function, or None if it raises or takes longer than `timeout` seconds."""
    results: list[Any] = []

    def call() -> None:
        with contextlib.suppress(Exception):
            results.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout)
    return results[0] if results else None
