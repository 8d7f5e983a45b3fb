"""A task or group of lm-eval, by :mod:`ropepp_lit.eval.harness`."""

from __future__ import annotations

from typing import Any

from ropepp_lit.eval import harness
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement
from ropepp_lit.eval.tasks.base import Request, Task


class Harness(Task):
    """What lm-eval finds.

    Args:
        name: Of the task.
        options: Of lm-eval.
        limit: Examples; None means all.
    """

    task = "harness"
    has_length = False

    def __init__(self, name: str, *, options: harness.Options, limit: int | None) -> None:
        self.part, self.options, self.limit = name, options, limit

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError where lm-eval knows no such task."""
        harness.check_task(self.part, self.options)

    def identity(self, request: Request) -> dict[str, Any]:
        """The options, lm-eval's version, and the lengths, at which tasks with lengths are measured."""
        return {**self.options.identity(), "lengths": request.lengths, "limit": self.limit}

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """See :func:`~ropepp_lit.eval.harness.measure`."""
        return harness.measure(model, self.part, lengths=request.lengths, limit=self.limit, options=self.options)
