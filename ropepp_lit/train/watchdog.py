"""Ends a run in which a rank hangs, and says which one, instead of waiting for it in silence."""

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
"""Of a rank that gives up, as of `timeout`; launchers such as torchrun take it for a failure, and start again."""

_UNHURRIED = ("preparation", "evaluation")
"""Phases that may take longer than the timeout: only a process that does not respond ends the run."""

_SECONDS_TO_ANSWER = 20.0
"""How long the store, a thread of rank 0 or of torchrun, may take for what others wrote."""


class _Position(NamedTuple):
    """Where the main thread of a rank is."""

    moves: int
    """How often it moved."""
    step: int
    """The step that is being taken, the first is 1."""
    phase: str


class Watchdog(Callback):
    """Ends a run whose ranks make no progress, with a line that names the ranks, their step and what they wait for.

    A thread of each rank tells torch's store where its main thread is. A rank whose main thread stands still for
    `timeout` reads what the others tell: those whose thread is silent too are stopped, dead or cut off.

    Args:
        timeout: Seconds without progress: a micro-batch, a batch of a validation, the write of a checkpoint and the
            compilation of a step must each take less. The 1,500 are less than the 1,800 after which collectives of
            torch give up by themselves. Empty switches it off.
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
    def in_words(self) -> str:
        """For the banner; empty where this is off."""
        return "" if self.timeout is None else f"no progress for {self.timeout:,g} s: end"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the thread, once the processes are connected."""
        if self.timeout is None:
            return
        assert isinstance(pl_module, CausalLM)
        self._note(trainer, "preparation")
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
        """The batch is read."""
        self._note(trainer, "forward pass")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The loss is known."""
        self._note(trainer, "backward pass")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The gradients are known."""
        self._note(trainer, "optimizer step")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The next batch follows."""
        self._note(trainer, "data")

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Each batch is progress."""
        self._note(trainer, "validation")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """The state is collected, and will be written."""
        self._note(trainer, "checkpoint or data")

    def _note(self, trainer: pl.Trainer, phase: str) -> None:
        self._position = _Position(self._position.moves + 1, trainer.global_step + 1, phase)

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, timeout: float, run_log: RunLog) -> None:
        """What the thread does."""
        interval = min(5.0, timeout / 5)
        ranks = _Ranks()
        last, stalled, before = self._position, 0.0, time.monotonic()
        ranks.tell(last, None)  # one that has told nothing counts as still being started
        while not self._stopped.wait(interval):
            now = time.monotonic()
            stalled += min(now - before, 2 * interval)  # all ranks may have been stopped for a while, and go on
            before = now
            if self._position != last:
                last, stalled = self._position, 0.0
            ranks.tell(last, last_collective() if stalled >= timeout / 2 else None)
            if stalled < timeout:
                continue
            found = ranks.who_hangs(last, wait=lambda: self._stopped.wait(interval))
            if found is None or self._stopped.is_set() or self._position != last:
                stalled = 0.0
                continue
            self._give_up(f"no progress for {timeout:g} seconds: {found.text}", found.is_mine, run_log, interval)

    def _give_up(self, problem: str, is_mine: bool, run_log: RunLog, interval: float) -> None:
        """End the process at once: the main thread waits in a call that nothing interrupts."""
        if not is_mine:
            time.sleep(3 * interval)  # the rank that prints goes first, as a launcher ends the others then
        else:
            with contextlib.suppress(OSError):
                print(f"\nropepp-lit: error: {problem}; continue by --ckpt_path auto", file=sys.stderr, flush=True)
            step = self._position.step - 1
            _within(5, lambda: run_log.write("end", step=step, reason="hang", message=problem))  # the disk may hang
        for process in self._launched:
            process.kill()
        os._exit(EXIT_CODE)


@contextmanager
def unhurried(trainer: pl.Trainer) -> Iterator[None]:
    """Let what runs inside take longer than the watchdog's timeout."""
    watchdogs = [callback for callback in trainer.callbacks if isinstance(callback, Watchdog)]  # type: ignore[attr-defined]
    for watchdog in watchdogs:
        watchdog._note(trainer, "evaluation")
    yield
    for watchdog in watchdogs:
        watchdog._note(trainer, "data")


class _Hang(NamedTuple):
    text: str
    is_mine: bool
    """Whether this rank is the one that prints."""


class _Ranks:
    """What the ranks tell each other by torch's store."""

    def __init__(self) -> None:
        is_alone = not dist.is_initialized()
        self._rank, self._size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        self._beats, self._own = 0, ""
        self._store: dist.Store | None = None
        if self._size > 1:
            self._store = dist.distributed_c10d._get_default_store().clone()  # a connection for this thread
            self._store.set_timeout(timedelta(seconds=_SECONDS_TO_ANSWER / 2))

    def tell(self, position: _Position, collective: str | None) -> None:
        """Tell the others that this thread runs, and where the main thread is."""
        self._beats += 1
        where = f"step {position.step:,}, {position.phase}" + (f", {collective}" if collective else "")
        self._own = json.dumps([self._beats, position.moves, position.phase, where])
        if self._store is not None:
            with contextlib.suppress(Exception):  # the others find out
                self._store.set(self._key(self._rank), self._own)

    def who_hangs(self, position: _Position, *, wait: Any) -> _Hang | None:
        """Compare what the others tell with what they tell later; None where they move or may take their time.

        Args:
            position: Of this rank, which stands still.
            wait: Waits for a beat.
        """
        before = self._read()
        for _ in range(3):
            wait()
            self.tell(position, last_collective())
        after = self._read()
        if after is None:
            return _Hang("rank 0, or the launcher that holds the processes' store, does not respond", self._rank == 1)
        silent = [  # one that has told nothing yet is still being started
            rank
            for rank, told in enumerate(after)
            if rank != self._rank and told is not None and before is not None and before[rank] == told
        ]
        others = [rank for rank in range(self._size) if rank not in silent]
        positions: dict[str, list[int]] = {}
        for rank in others:
            told, earlier = after[rank], before[rank] if before is not None else None
            _, moves, phase, where = json.loads(told) if told else (0, 0, _UNHURRIED[0], "the start")
            has_moved = earlier is not None and json.loads(earlier)[1] != moves
            if not silent and (phase in _UNHURRIED or has_moved):
                return None
            positions.setdefault(where, []).append(rank)
        parts = [
            f"{_names([rank])} does not respond, last known at {json.loads(after[rank] or self._own)[3]}"
            for rank in silent
        ]
        parts += [f"{_names(group)} at {where}" for where, group in positions.items()]
        return _Hang("; ".join(parts), self._rank == others[0])

    def _read(self) -> list[str | None] | None:
        """What each rank told last; None where the store does not respond."""
        if self._store is None:
            return [self._own]
        store, keys = self._store, [self._key(rank) for rank in range(self._size)]

        def read() -> list[str | None]:
            return [store.get(key).decode() if store.check([key]) else None for key in keys]

        return _within(_SECONDS_TO_ANSWER, read)

    @staticmethod
    def _key(rank: int) -> str:
        return f"ropepp_lit/watchdog/{rank}"


def last_collective() -> str | None:
    """The oldest collective of this rank that has not ended, else the newest, as torch's flight recorder knows them.

    It records where the environment variable `TORCH_FR_BUFFER_SIZE` was set before the processes connected, which the
    command does.
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
    """Ranks as people write them: ranks 0-6, 9."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"


def _within(seconds: float, function: Any) -> Any:
    """What a function returns, or None where it takes longer or fails."""
    found: list[Any] = []

    def call() -> None:
        with contextlib.suppress(Exception):
            found.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
