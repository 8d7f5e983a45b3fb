"""Loads tasks of lm-eval with their data, and aborts RULER tasks that would loop forever at short lengths."""

from __future__ import annotations

import contextlib
import io
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ropepp_lit.errors import UsageError

MAX_TRIES = 20_000
"""Maximum number of consecutive texts without a new longest one while lm-eval generates the 500 RULER examples."""


def load_tasks(manager: Any, names: Sequence[str], tokenizer: Any, opening: Sequence[int], length: int) -> Any:
    """Load tasks with their data.

    If no example fits into a length, some of RULER's tasks loop forever and catch every exception. They therefore run
    in a daemon thread, which is blocked forever in a function that they call on each try.

    Raises:
        UsageError: A task or its data cannot be loaded, or no example fits into the length.
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
                f"lengths: lm-eval cannot generate examples of harness:{'+'.join(names)} with {length:,} tokens and "
                "this tokenizer; give more"
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
    if isinstance(loaded, Exception):  # from datasets, the Hub, the network or the code of the tasks
        reason = (str(loaded).strip().splitlines() or [""])[0]
        raise UsageError(
            f"tasks: harness:{', '.join(names)}: lm-eval cannot load the task or its data "
            f"({type(loaded).__name__}: {reason})"
        ) from loaded
    return loaded


class _Tries(io.TextIOBase):
    """Counter of consecutive tries that calls `give_up` after MAX_TRIES; also a stream whose writes count as tries."""

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
    """Tokenizer of a RULER task that counts each text that is not the longest so far as a try."""

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
