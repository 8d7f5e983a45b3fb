"""Documents from which a small model can learn to retrieve, to be mixed into its training text.

They have the form of :mod:`ropepp_lit.eval.tasks.retrieval`, with the answers, and come from other random numbers than
any test. Words and numbers are of one stock, so each is met in training; which value a key has is drawn anew in every
document, so nothing learned by heart helps in a test.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from ropepp_lit.eval.tasks.base import place
from ropepp_lit.eval.tasks.retrieval import FAMILIES

MAX_QUESTIONS = 12
SHARE_IN_ORDER = 0.5
"""Of `multikey`: questions in the order of the text, from the first one on, which is easier to learn than any order."""


def recall_documents(families: Sequence[str], *, units: tuple[int, int], seed: int) -> Iterator[str]:
    """An endless stream of documents, families in turn.

    Of `multikey` several keys are asked, so that a document has more to learn from than one answer.

    Args:
        families: Of :data:`~ropepp_lit.eval.tasks.retrieval.FAMILIES`.
        units: Fewest and most sentences (or words) that lengthen a document; as many as any are drawn.
        seed: Of the stream.
    """
    rng = random.Random(f"training/{seed}")  # noqa: S311
    for number in itertools.count():
        family = families[number % len(families)]
        count = rng.randint(*units)
        made = FAMILIES[family].draw(units=count, seed=f"training/{seed}", number=number)
        fillers = made.take(count)
        # A test goes through few depths: here answers may lie anywhere, in their order.
        depths = sorted(rng.random() for _ in made.needles)
        needles = [needle for _, needle in sorted(made.needles, key=lambda pair: pair[0])]
        made = dataclasses.replace(made, needles=list(zip(depths, needles, strict=True)))
        text = made.text(fillers) + made.ideal
        if family == "multikey":
            behind = place(depths[0], len(fillers)) + 1
            told = fillers[::-1]
            in_order = rng.random() < SHARE_IN_ORDER
            asked = [*told[behind:], *told[:behind]] if in_order else rng.sample(told, len(told))
            text = " ".join([text, *asked[:MAX_QUESTIONS]])
        yield text
