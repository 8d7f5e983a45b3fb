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

from ropepp_lit.eval.tasks.reading import MAX_PAIRS, induction_draft, recall_draft

WORDS_PER_SENTENCE = 7
"""About, of the sentences between the pairs of `recall`."""


def reading_documents(kinds: Sequence[str], *, words: tuple[int, int], seed: int) -> Iterator[str]:
    """An endless stream of documents, kinds in turn.

    Args:
        kinds: Of `recall` and `induction`; a kind may be named several times to be met more often.
        words: Fewest and most words that fill a document, pairs and copies not counted. Their logarithm is uniform.
        seed: Of the stream.
    """
    rng = random.Random(f"training/{seed}")  # noqa: S311
    low, high = (math.log(end) for end in words)
    for number in itertools.count():
        count = round(math.exp(rng.uniform(low, high)))
        if kinds[number % len(kinds)] == "induction":
            made, _ = induction_draft(rng, units=count)
        else:
            pairs = rng.randint(1, max(1, min(MAX_PAIRS, count // 4)))
            count = max(1, count // WORDS_PER_SENTENCE)
            made, _ = recall_draft(rng, pairs=pairs, units=count)
        yield made.text(made.take(count))
