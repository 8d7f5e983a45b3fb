"""Signals that stop a run: noted when they come, agreed on by all ranks between steps; so all save the same step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What schedulers send before they take a machine away, and Ctrl-C."""


class StopRequest:
    """Whether any rank was asked to stop.

    A handler only notes the signal: saving or talking to other ranks inside of it hangs. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the signal, on every rank once it was agreed on."""
        self._noted = 0
        self._group: Any = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals; again after others have."""
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler != self._note:
                self._previous.setdefault(number, handler)
                signal.signal(number, self._note)
        if self._group is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU, so that no GPU is waited for

    def uninstall(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def agree(self) -> bool:
        """Whether to stop; every rank must ask at the same moments and gets the same answer."""
        noted = self._noted
        if self._group is not None:
            value = torch.tensor([noted])
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
            noted = int(value)
        if noted:
            self.received = noted
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted:
            raise KeyboardInterrupt
        self._noted = number
