"""Synthetic training documents for retrieval, to be mixed into a small model's training text.

They have the format of :mod:`ropepp_lit.eval.tasks.retrieval`, with the answers, and different random seeds from the
evaluation. The vocabulary is the same, so every word occurs in training. The value of each key is sampled for each
document, so memorized documents do not help in the evaluation.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from ropepp_lit.eval.tasks.base import needle_index
from ropepp_lit.eval.tasks.retrieval import FAMILIES

MAX_QUESTIONS = 12
SHARE_IN_ORDER = 0.5
"""Share of `multikey` documents with questions in text order, which is easier to learn than a random order."""


def recall_documents(families: Sequence[str], *, units: tuple[int, int], seed: int) -> Iterator[str]:
    """Yield documents without end, cycling through the families.

    Documents of `multikey` have questions for multiple keys, so that they have more than one answer to learn from.

    Args:
        families: Names from :data:`~ropepp_lit.eval.tasks.retrieval.FAMILIES`.
        units: Minimum and maximum number of fillers (sentences or words) of a document; the number is uniform.
        seed: Seed of the stream.
    """
    rng = random.Random(f"training/{seed}")  # noqa: S311
    for number in itertools.count():
        family = families[number % len(families)]
        count = rng.randint(*units)
        draft = FAMILIES[family].numbered_draft(units=count, seed=f"training/{seed}", number=number)
        fillers = draft.take(count)
        # The evaluation uses few depths; here answers are at random depths, in the same order.
        depths = sorted(rng.random() for _ in draft.needles)
        needles = [needle for _, needle in sorted(draft.needles, key=lambda pair: pair[0])]
        draft = dataclasses.replace(draft, needles=list(zip(depths, needles, strict=True)))
        text = draft.text(fillers) + draft.ideal
        if family == "multikey":
            after = needle_index(depths[0], len(fillers)) + 1
            entries = fillers[::-1]
            in_order = rng.random() < SHARE_IN_ORDER
            questions = [*entries[after:], *entries[:after]] if in_order else rng.sample(entries, len(entries))
            text = " ".join([text, *questions[:MAX_QUESTIONS]])
        yield text
