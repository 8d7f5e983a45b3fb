"""Tasks of lm-eval and their data, loaded within bounds: some of RULER's never end at short lengths."""

from __future__ import annotations

import contextlib
import io
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ropepp_lit.errors import UsageError

MAX_TRIES = 20_000
"""Texts in a row of which none is the longest so far, while lm-eval makes the 500 examples of a RULER task."""


def load_tasks(manager: Any, names: Sequence[str], tokenizer: Any, opening: Sequence[int], length: int) -> Any:
    """Load tasks with their data.

    Where no example fits into a length, the loops in which some of RULER's tasks make examples never end and catch
    every exception, so they run in a thread that can be left: what they call at each try holds it.
    """
    from lm_eval.tasks.ruler import common_utils

    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def load() -> None:
        try:
            outcome.put(manager.load(list(names)))
        except Exception as error:  # raised again below
            outcome.put(error)

    def give_up() -> None:
        outcome.put(
            UsageError(
                f"lengths: lm-eval makes no example of harness:{'+'.join(names)} of {length:,} tokens with this "
                "tokenizer; give more"
            )
        )
        threading.Event().wait()

    tries = _Tries(give_up)
    original = common_utils.get_tokenizer
    common_utils.get_tokenizer = lambda *args, **kwargs: _CountedTokenizer(tokenizer, opening, tries)
    try:
        with contextlib.redirect_stdout(tries):
            threading.Thread(target=load, daemon=True).start()
            loaded = outcome.get()
    finally:
        common_utils.get_tokenizer = original
    if isinstance(loaded, UsageError):
        raise loaded
    if isinstance(loaded, ImportError):
        raise UsageError(f"tasks: {', '.join(names)}: {loaded}; pip install 'ropepp-lit[eval]'") from loaded
    if isinstance(loaded, Exception):  # of datasets, the Hub, the network and the tasks' own code
        reason = (str(loaded).strip().splitlines() or [""])[0]
        raise UsageError(
            f"tasks: harness:{', '.join(names)}: lm-eval cannot load the task or its data "
            f"({type(loaded).__name__}: {reason})"
        ) from loaded
    return loaded


class _Tries(io.TextIOBase):
    """Counts tries in a row, and calls `give_up` behind MAX_TRIES. What is printed is one, and is not shown."""

    def __init__(self, give_up: Callable[[], None]) -> None:
        super().__init__()
        self.give_up, self.number = give_up, 0

    def write(self, text: str) -> int:
        """Count a try."""
        self.number += 1
        if self.number > MAX_TRIES:
            self.give_up()
        return len(text)


class _CountedTokenizer:
    """The tokenizer of one RULER task; a text that is not the longest so far counts as a try."""

    def __init__(self, tokenizer: Any, opening: Sequence[int], tries: _Tries) -> None:
        self.tokenizer, self.opening, self.tries = tokenizer, list(opening), tries
        self.longest = self.texts = 0

    def __call__(self, text: str) -> Any:
        from transformers import BatchEncoding

        ids = [*self.opening, *self.tokenizer.encode(text, add_special_tokens=False)]
        self.texts = 0 if len(ids) > self.longest else self.texts + 1
        self.longest = max(self.longest, len(ids))
        self.tries.number = self.texts
        self.tries.write("")
        return BatchEncoding({"input_ids": ids})
