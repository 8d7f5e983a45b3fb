"""Signals that stop a run: a handler records them, and all ranks agree to stop after the same micro-batch."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
"""What schedulers send before they take a machine away, and Ctrl-C."""

_FAILED = 2**15
"""Above the number of any signal, so that a failure on one rank wins over a signal on another."""


class StopRequest:
    """Whether any rank received a signal, or failed to write a checkpoint.

    A signal handler that saves or communicates can deadlock, so ours only records the signal. A second Ctrl-C raises
    KeyboardInterrupt.

    With several processes the ranks agree over a gloo group of their own, so no GPU is synchronized. Each call of
    :meth:`agree` reads the all-reduce that the call before it started: a rank never waits for another one by more than
    a micro-batch.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the signal; set on every rank at the same call of :meth:`agree`."""
        self.failed = False
        """Whether a rank reported a failure; set on every rank at the same call of :meth:`agree`."""
        self._noted = 0
        self._group: Any = None
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Install the handlers; again after Lightning has installed its own."""
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler != self._note:
                self._previous.setdefault(number, handler)
                signal.signal(number, self._note)
        if self._group is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def uninstall(self) -> None:
        """Restore the previous handlers."""
        if self._pending is not None:
            self._pending[0].wait()  # every rank has started it
            self._pending = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def agree(self, *, failed: bool = False) -> bool:
        """Whether to stop. Every rank must make the same calls, and gets the same answer from each.

        Args:
            failed: Whether something failed on this rank, which must end the run on all of them.
        """
        if self.received is not None or self.failed:
            return True
        noted = _FAILED if failed else self._noted
        if self._group is not None:
            mine, noted = noted, 0
            if self._pending is not None:
                work, value = self._pending
                work.wait()
                noted, self._pending = int(value), None
            if not noted:
                value = torch.tensor([mine])
                work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
                self._pending = (work, value)
        if noted == _FAILED:
            self.failed = True
        elif noted:
            self.received = noted
        return noted != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted:
            raise KeyboardInterrupt
        self._noted = number


def replace_lightnings_broadcast(trainer: pl.Trainer) -> None:
    """Keep Lightning from asking rank 0 for a SIGTERM before every micro-batch, which waits for the device.

    Its epoch loop broadcasts a tensor on the device and reads it on the host. :class:`StopRequest` does that work.
    """

    def nothing() -> None:
        return

    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = nothing  # type: ignore[method-assign]
