"""Retrieval: RULER's task families (arXiv 2404.06654), with short prompts for base models and any tokenizer.

| family           | the context contains                          | answer          | RULER's name      |
|------------------|-----------------------------------------------|-----------------|-------------------|
| `single`         | one value among repeated sentences            | the value       | `niah_single`     |
| `multikey`       | only values of other keys                     | value of a key  | `niah_multikey`   |
| `multivalue`     | four values of one key                        | all four        | `niah_multivalue` |
| `multiquery`     | four values of four keys                      | all four        | `niah_multiquery` |
| `tracking`       | chained assignments of a value, and a decoy   | its names       | `vt`              |
| `common_words`   | ten frequent words among rare ones            | the ten         | `cwe`             |
| `frequent_words` | random words, counts by Zipf's law, α = 2     | the top three   | `fwe`             |

The score is RULER's: the share of the expected strings that occur in the answer, ignoring case. The prompts are worded
differently and end with the start of the answer, so scores are not comparable with RULER's published ones.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Iterator

from ropepp_lit.eval.tasks import stock
from ropepp_lit.eval.tasks.base import Draft, Family

_HOPS = 4
_COMMON, _FREQUENT = 10, 3
_ZIPF = 2.0


class _Retrieval(Family):
    task = "retrieval"


class _Single(_Retrieval):
    """One value among repeated sentences."""

    part = "single"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        key, value = next(stock.pairs(rng)), next(stock.numbers(rng))
        return Draft(stock.sentences(rng), [(depth, _entry(key, value))], f"{key}:", [value], depth)


class _Multikey(_Retrieval):
    """One value among those of other keys."""

    part = "multikey"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        keys, values = stock.pairs(rng), stock.numbers(rng)
        key, value = next(keys), next(values)
        fillers = (_entry(key, value) for key, value in zip(keys, values, strict=False))
        return Draft(fillers, [(depth, _entry(key, value))], f"{key}:", [value], depth)


class _Multivalue(_Retrieval):
    """Four values of one key."""

    part = "multivalue"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        key, values = next(stock.pairs(rng)), list(itertools.islice(stock.numbers(rng), 4))
        needles = [(rng.random(), _entry(key, value)) for value in values]
        return Draft(stock.sentences(rng), needles, f"The {len(values)} values of {key}:", values, None)


class _Multiquery(_Retrieval):
    """Four values of four keys."""

    part = "multiquery"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        keys, values = (list(itertools.islice(source(rng), 4)) for source in (stock.pairs, stock.numbers))
        needles = [(rng.random(), _entry(key, value)) for key, value in zip(keys, values, strict=True)]
        return Draft(stock.sentences(rng), needles, f"{', '.join(keys)}:", values, None)


class _Tracking(_Retrieval):
    """The names in a chain of assignments of a value, with a second chain as a decoy."""

    part = "tracking"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        value, decoy = itertools.islice(stock.numbers(rng), 2)
        names = [f"{a}{b}" for a, b in zip(stock.letters(rng, 2, string.ascii_uppercase), range(10, 99), strict=False)]
        rng.shuffle(names)
        chains = [names[: _HOPS + 1], names[_HOPS + 1 : 2 * _HOPS + 2]]
        needles = []
        for start, chain in zip((value, decoy), chains, strict=True):
            depths = sorted(rng.random() for _ in chain)
            needles += [
                (depth, f"Let {name} = {assigned}.")
                for depth, name, assigned in zip(depths, chain, [start, *chain], strict=False)
            ]
        return Draft(stock.sentences(rng), needles, f"The {_HOPS + 1} names that equal {value} are", chains[0], None)


class _CommonWords(_Retrieval):
    """Ten frequent words among rare ones."""

    part = "common_words"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        common_count, rare_count = next(
            (pair for min_units, pair in ((600, (30, 3)), (200, (10, 2)), (70, (5, 1))) if units >= min_units), (3, 1)
        )
        keys = stock.pairs(rng)
        common = list(itertools.islice(keys, _COMMON))
        needles = [(rng.random(), f"{word},") for word in common for _ in range(common_count)]

        def fillers() -> Iterator[str]:
            while True:
                words = list(itertools.islice(keys, 100)) * rare_count
                rng.shuffle(words)
                yield from (f"{word}," for word in words)

        return Draft(fillers(), needles, f"The {_COMMON} most common words above are", common, None)


class _FrequentWords(_Retrieval):
    """The three most frequent of random words, with counts by Zipf's law."""

    part = "frequent_words"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        words = stock.letters(rng, 6, string.ascii_lowercase)
        total = math.pi**2 / 6  # ζ(2)
        # At least 4, 3 and 2 in short contexts, so that three words are clearly the most frequent.
        counts = [max(4 - k, round(units * k**-_ZIPF / total)) for k in range(1, _FREQUENT + 1)]
        frequent = list(itertools.islice(words, _FREQUENT))
        needles = [(rng.random(), f"{w},") for w, count in zip(frequent, counts, strict=True) for _ in range(count)]

        def fillers() -> Iterator[str]:
            rest = []
            for k in range(_FREQUENT + 1, 40):
                count = round(units * k**-_ZIPF / total)
                rest += [f"{next(words)},"] * max(1, min(count, counts[-1] - 1))
            rng.shuffle(rest)
            yield from rest
            yield from (f"{word}," for word in words)

        return Draft(fillers(), needles, f"The {_FREQUENT} most frequent words above are", frequent, None)


FAMILIES: dict[str, Family] = {
    family.part: family
    for family in (_Single(), _Multikey(), _Multivalue(), _Multiquery(), _Tracking(), _CommonWords(), _FrequentWords())
}


def _entry(key: str, value: str) -> str:
    return f"{key}: {value}."
