"""Documents from which a small model can learn associative recall and induction, to be mixed into its training text.

They have the form of :mod:`ropepp_lit.eval.tasks.reading`, and come from other random numbers than any test. Words are
of one stock, so each is met in training; which value a key has, and which word follows which, is drawn anew in every
document, so nothing learned by heart helps in a test.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from ropepp_lit.eval.tasks import stock
from ropepp_lit.eval.tasks.reading import MAX_PAIRS, induction_draft, pairs_of, recall_draft

WORDS_PER_SENTENCE = 7
"""About, of the sentences between the pairs of `recall`."""

SHARE_IN_ORDER = 0.5
"""Of the documents of `pairs`: questions in the order of the pairs, which is easier to learn than any order."""


def reading_documents(kinds: Sequence[str], *, words: tuple[int, int], seed: int) -> Iterator[str]:
    """An endless stream of documents, kinds in turn.

    `pairs` are those of `recall` without what is between them: first all pairs, then all questions. They are learned
    soonest, as a document has nothing else to learn.

    Args:
        kinds: Of `pairs`, `recall` and `induction`; a kind may be named several times to be met more often.
        words: Fewest and most words of a document of `pairs`, or that fill one of the others, where pairs and copies
            are not counted. Their logarithm is uniform.
        seed: Of the stream.
    """
    rng = random.Random(f"training/{seed}")  # noqa: S311
    low, high = (math.log(end) for end in words)
    for number in itertools.count():
        count = round(math.exp(rng.uniform(low, high)))
        kind = kinds[number % len(kinds)]
        if kind == "pairs":
            yield _pairs(rng, max(1, min(MAX_PAIRS, count // 4)))
            continue
        if kind == "induction":
            made, _ = induction_draft(rng, units=count)
        else:
            pairs = rng.randint(1, max(1, min(MAX_PAIRS, count // 4)))
            count = max(1, count // WORDS_PER_SENTENCE)
            made, _ = recall_draft(rng, pairs=pairs, units=count)
        yield made.text(made.take(count))


def _pairs(rng: random.Random, count: int) -> str:
    """A sentence, so many pairs, and a question for each."""
    pairs = pairs_of(rng, count)
    asked = pairs if rng.random() < SHARE_IN_ORDER else rng.sample(pairs, count)
    return " ".join([next(stock.sentences(rng)), *(pair.first for pair in pairs), *(pair.again for pair in asked)])
