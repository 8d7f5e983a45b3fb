"""The families of retrieval: what an example says, before it has a length."""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the answer lies in examples that have one place for it, in turn."""

_SENTENCES = (
    "Rain fell on the roof until noon.",
    "A cart went slowly up the hill.",
    "The baker swept the step of his shop.",
    "Two boats lay still beside the bridge.",
    "Smoke rose from the houses by the wood.",
    "The clock in the hall had stopped again.",
    "Someone had left a lamp in the window.",
    "Children ran along the wall to school.",
)
_FIRST = (
    "amber bitter brave bright broad calm clear cold copper crisp dark deep dry early empty faint fair fast firm flat "
    "fresh gentle golden grand green grey hollow humble iron kind late light lively long mild narrow noble old pale "
    "plain proud quick quiet rare rough round scarlet silver slow small soft steady still stony sweet tall tame thin "
    "warm white wide wild wise young"
).split()
_SECOND = (
    "anchor apple arrow barn basket beacon bell bird boat bridge brook candle canyon castle cloud coast crane creek "
    "desert door eagle falcon fern field forest fountain garden gate glacier harbor hill horse island kettle ladder "
    "lake lantern maple marsh meadow mill mirror moon mountain needle oak ocean orchard otter path pebble pine pond "
    "raven ridge river rose sail shore spring stone tower valley wheel willow window"
).split()
_HOPS = 4
_COMMON, _FREQUENT = 10, 3
_ZIPF = 2.0


class Draft(NamedTuple):
    """An example whose length is still open."""

    fillers: Iterator[str]
    """What lengthens it, from the end of the context to its start."""

    needles: list[tuple[float, str]]
    """What is put among the fillers, and how deep: 0 is the start, 1 the end."""

    question: str
    answers: list[str]

    depth: float | None
    """Of the answer, where it lies in one place."""

    @property
    def ideal(self) -> str:
        """What a perfect model writes behind the question."""
        return f" {', '.join(self.answers)}."

    def text(self, fillers: list[str]) -> str:
        """The example with these fillers, first the last of the context; the first unit of the text is a filler."""
        units: list[list[str]] = [[filler] for filler in reversed(fillers)]
        for depth, needle in sorted(self.needles, key=lambda pair: pair[0]):
            units[place(depth, len(units))].append(needle)
        return " ".join([*itertools.chain.from_iterable(units), self.question])


def place(depth: float, units: int) -> int:
    """Index of the unit behind which a needle of this depth (0 to 1) stands."""
    return round(depth * (units - 1))


def draft(family: str, *, units: int, seed: str, number: int = 0) -> Draft:
    """An example of a family, without its length.

    Args:
        family: One of FAMILIES.
        units: About how many sentences or words the context will have; numbers of repetitions depend on it.
        seed: With `number` and the family it decides the example.
        number: Of the example; it also sets the depth, which goes through DEPTHS.
    """
    return FAMILIES[family](random.Random(f"{seed}/{family}/{number}"), DEPTHS[number % len(DEPTHS)], units)  # noqa: S311


def _single(rng: random.Random, depth: float, units: int) -> Draft:
    key, value = next(_keys(rng)), next(_values(rng))
    return Draft(noise(rng), [(depth, _entry(key, value))], f"{key}:", [value], depth)


def _multikey(rng: random.Random, depth: float, units: int) -> Draft:
    keys, values = _keys(rng), _values(rng)
    key, value = next(keys), next(values)
    fillers = (_entry(key, value) for key, value in zip(keys, values, strict=False))
    return Draft(fillers, [(depth, _entry(key, value))], f"{key}:", [value], depth)


def _multivalue(rng: random.Random, depth: float, units: int) -> Draft:
    key, values = next(_keys(rng)), list(itertools.islice(_values(rng), 4))
    needles = [(rng.random(), _entry(key, value)) for value in values]
    return Draft(noise(rng), needles, f"The {len(values)} values of {key}:", values, None)


def _multiquery(rng: random.Random, depth: float, units: int) -> Draft:
    keys, values = (list(itertools.islice(source(rng), 4)) for source in (_keys, _values))
    needles = [(rng.random(), _entry(key, value)) for key, value in zip(keys, values, strict=True)]
    return Draft(noise(rng), needles, f"{', '.join(keys)}:", values, None)


def _tracking(rng: random.Random, depth: float, units: int) -> Draft:
    value, decoy = itertools.islice(_values(rng), 2)
    names = [f"{a}{b}" for a, b in zip(_letters(rng, 2, string.ascii_uppercase), range(10, 99), strict=False)]
    rng.shuffle(names)
    chains = [names[: _HOPS + 1], names[_HOPS + 1 : 2 * _HOPS + 2]]
    needles = []
    for start, chain in zip((value, decoy), chains, strict=True):
        depths = sorted(rng.random() for _ in chain)
        needles += [
            (depth, f"Let {name} = {held}.") for depth, name, held in zip(depths, chain, [start, *chain], strict=False)
        ]
    return Draft(noise(rng), needles, f"The {_HOPS + 1} names that equal {value} are", chains[0], None)


def _common_words(rng: random.Random, depth: float, units: int) -> Draft:
    often, seldom = next(
        (pair for least, pair in ((600, (30, 3)), (200, (10, 2)), (70, (5, 1))) if units >= least), (3, 1)
    )
    keys = _keys(rng)
    common = list(itertools.islice(keys, _COMMON))
    needles = [(rng.random(), f"{word},") for word in common for _ in range(often)]

    def fillers() -> Iterator[str]:
        while True:
            words = list(itertools.islice(keys, 100)) * seldom
            rng.shuffle(words)
            yield from (f"{word}," for word in words)

    return Draft(fillers(), needles, f"The {_COMMON} most common words above are", common, None)


def _frequent_words(rng: random.Random, depth: float, units: int) -> Draft:
    words = _letters(rng, 6, string.ascii_lowercase)
    total = math.pi**2 / 6  # ζ(2)
    # At least 4, 3, 2 in short contexts, so that there are three that stand out.
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


FAMILIES: dict[str, Callable[[random.Random, float, int], Draft]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "tracking": _tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}


def _entry(key: str, value: str) -> str:
    return f"{key}: {value}."


def noise(rng: random.Random) -> Iterator[str]:
    """Sentences that say nothing of what is asked, without end."""
    while True:
        yield rng.choice(_SENTENCES)


def _keys(rng: random.Random) -> Iterator[str]:
    """Pairs of words, none twice; with a number behind them when all are used up."""
    pairs = len(_FIRST) * len(_SECOND)
    for turn in itertools.count(1):
        for pair in _unseen(lambda: rng.randrange(pairs), pairs):
            key = f"{_FIRST[pair % len(_FIRST)]}-{_SECOND[pair // len(_FIRST)]}"
            yield key if turn == 1 else f"{key}-{turn}"


def _values(rng: random.Random) -> Iterator[str]:
    """Numbers of five digits, none twice."""
    return (str(value) for value in _unseen(lambda: rng.randrange(10_000, 100_000), 90_000))


def _letters(rng: random.Random, count: int, alphabet: str) -> Iterator[str]:
    """Words of random letters, none twice."""
    return _unseen(lambda: "".join(rng.choice(alphabet) for _ in range(count)), len(alphabet) ** count)


def _unseen(draw: Callable[[], Any], count: int) -> Iterator[Any]:
    """What a function draws, each of its `count` results once."""
    seen: set[Any] = set()
    while len(seen) < count:
        drawn = draw()
        if drawn not in seen:
            seen.add(drawn)
            yield drawn
