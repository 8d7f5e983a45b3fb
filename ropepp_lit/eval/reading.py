"""Synthetic training documents for associative recall and induction, to be mixed into a small model's training text.

They have the format of :mod:`ropepp_lit.eval.tasks.reading`, with different random seeds from the evaluation. The
vocabulary is the same, so every word occurs in training. Pairs and the order of words are sampled for each document, so
memorized documents do not help in the evaluation.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from ropepp_lit.eval.tasks import stock
from ropepp_lit.eval.tasks.reading import MAX_PAIRS, induction_draft, pairs_of, recall_draft

WORDS_PER_SENTENCE = 7
"""Approximate number of words of a filler sentence of `recall`."""

SHARE_IN_ORDER = 0.5
"""Share of `pairs` documents with queries in the order of the pairs, which is easier to learn than a random order."""


def reading_documents(kinds: Sequence[str], *, words: tuple[int, int], seed: int) -> Iterator[str]:
    """Yield documents without end, cycling through the kinds.

    `pairs` are `recall` documents without fillers: first all pairs, then all queries. Models learn them earliest,
    because they contain nothing else to predict.

    Args:
        kinds: `pairs`, `recall` or `induction`; repeat a kind to increase its share.
        words: Minimum and maximum number of words of a `pairs` document, or of the fillers of the other kinds. The
            number is log-uniform.
        seed: Seed of the stream.
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
            draft, _ = induction_draft(rng, units=count)
        else:
            pairs = rng.randint(1, max(1, min(MAX_PAIRS, count // 4)))
            count = max(1, count // WORDS_PER_SENTENCE)
            draft, _ = recall_draft(rng, pairs=pairs, units=count)
        yield draft.text(draft.take(count))


def _pairs(rng: random.Random, count: int) -> str:
    """Return a document with a sentence, `count` pairs, and a query for each pair."""
    pairs = pairs_of(rng, count)
    queried = pairs if rng.random() < SHARE_IN_ORDER else rng.sample(pairs, count)
    return " ".join([next(stock.sentences(rng)), *(pair.first for pair in pairs), *(pair.again for pair in queried)])
