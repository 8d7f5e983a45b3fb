"""Task that runs a task or group of lm-eval with :mod:`ropepp_lit.eval.harness`."""

from __future__ import annotations

from typing import Any

from ropepp_lit.eval import harness
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement
from ropepp_lit.eval.tasks.base import Request, Task


class Harness(Task):
    """A task or group of lm-eval.

    Args:
        name: Name of the task or group.
        options: Options of lm-eval.
        limit: Maximum number of examples; None means all.
    """

    task = "harness"
    has_length = False

    def __init__(self, name: str, *, options: harness.Options, limit: int | None) -> None:
        self.part, self.options, self.limit = name, options, limit

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError if lm-eval has no such task."""
        harness.check_task(self.part, self.options)

    def identity(self, request: Request) -> dict[str, Any]:
        """Return the options, lm-eval's version, the limit, and the lengths (for tasks that depend on them)."""
        return {**self.options.identity(), "lengths": request.lengths, "limit": self.limit}

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """See :func:`~ropepp_lit.eval.harness.run_tasks`."""
        return harness.run_tasks(model, self.part, lengths=request.lengths, limit=self.limit, options=self.options)
