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
"""Signals that schedulers send before they reclaim a machine, and that of Ctrl-C."""

_FAILED = 2**15
"""Code of a failure; larger than any signal number, so in the maximum over ranks it overrides a signal."""


class StopRequest:
    """Request to stop a run because any rank received a signal or failed to write a checkpoint.

    A signal handler that saves or communicates can deadlock, so ours only records the signal. A second Ctrl-C raises
    KeyboardInterrupt.

    With multiple processes the ranks agree over a separate gloo group, so no GPU is synchronized. Each call of
    :meth:`agree` reads the all-reduce that the previous call started, so it rarely has to wait for other ranks.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the signal; set on every rank at the same call of :meth:`agree`."""
        self.failed = False
        """Whether a rank reported a failure; set on every rank at the same call of :meth:`agree`."""
        self._own_code = 0
        self._group: Any = None
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Install the handlers. Call it again after Lightning has installed its own."""
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler != self._handle:
                self._previous.setdefault(number, handler)
                signal.signal(number, self._handle)
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
        """Return whether to stop. Every rank must make the same calls, and each call returns the same on all ranks.

        Args:
            failed: Whether an operation failed on this rank, which ends the run on all ranks.
        """
        if self.received is not None or self.failed:
            return True
        code = _FAILED if failed else self._own_code
        if self._group is not None:
            own, code = code, 0
            if self._pending is not None:
                work, value = self._pending
                work.wait()
                code, self._pending = int(value), None
            if not code:
                value = torch.tensor([own])
                work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
                self._pending = (work, value)
        if code == _FAILED:
            self.failed = True
        elif code:
            self.received = code
        return code != 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._own_code:
            raise KeyboardInterrupt
        self._own_code = number


def disable_lightnings_broadcast(trainer: pl.Trainer) -> None:
    """Disable Lightning's broadcast of a SIGTERM from rank 0 before every micro-batch, which waits for the device.

    Its epoch loop broadcasts a tensor on the device and reads it on the host. :class:`StopRequest` replaces it.
    """

    def nothing() -> None:
        return

    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = nothing  # type: ignore[method-assign]
