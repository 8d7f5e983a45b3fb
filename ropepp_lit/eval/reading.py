"""Texts in which a part of what was read must be given again: associative recall and induction.

| kind        | the text                                                        | predicted                          |
|-------------|-----------------------------------------------------------------|------------------------------------|
| `recall`    | pairs `key: value.` among sentences, and each pair once more     | the value, where the pair returns  |
| `induction` | random words, and at a distance some runs of them once more      | the run's words behind the first   |

`recall` is multi-query associative recall (MQAR, "Zoology", arXiv 2312.04927) in words, `induction` the repeated random
sequence of Olsson et al. (arXiv 2209.11895). What is predicted follows from the text before it alone: words and their
order are drawn anew in each text, from one stock for tests and training. Logarithms of the distances are uniform, from
a few units to the whole text, so each doubling of the distance has about as many predictions.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ropepp_lit.eval.retrieval_families import noise, place

WORDS = (
    "acid age air ant apple april arch arm army art ash aunt axe baby back bag ball band bank bar base bath bay beam "
    "bean bear bed bee beer bell belt bill bird bit blade blood board boat body bolt bone book boot border bowl box "
    "boy brain branch bread brick bridge brother brush bus bush butter button cab cake call camel camp can candle cap "
    "car card cart case cat cave cell chain chair chalk charm chest chief child chin church city clay cliff clock "
    "cloth cloud club coal coat coin comb cook cord corn cost cotton cover cow crew crime crop crowd crown cup curve "
    "dance dawn day deal deer desk dirt dish dock dog doll door dot dream dress drink drop drum duck dust ear earth "
    "east edge egg engine eye face fact fair farm father feast fence field fig finger fire fish flag flame flock "
    "floor flower fly fog food foot fork fox frame friend frog front fruit game garden gate ghost gift girl glass "
    "glove goat gold goose grain grape grass group guard guest guide gun hair hall hammer hand harbor hat hawk head "
    "heart heat hen herb hill hole home honey hook horn horse hotel hour house ice inch ink iron island jar jewel job "
    "judge juice key king kitchen knee knife knot lady lake lamb lamp land law lead leaf leg lemon letter library "
    "line lion lip lock log lord lunch map mark market mask meal meat metal milk mill mind mine mirror monkey month "
    "moon mother motor mouse mouth music nail name neck needle nest net night noise north nose note nurse nut oak oil "
    "onion orange oven owl page paint pan paper park path pen pencil piano pig pin pipe plane plant plate pocket poem "
    "pond pool pot potato powder price prince queen rabbit rail rain rat rice ring river road rock roof room root "
    "rope rose rule sail salt sand school sea seat seed sheep shelf ship shirt shoe shop silk silver sister skin sky "
    "smoke snail snake snow soap song soup spade spoon spring square stage stamp star station steam steel stem step "
    "stick stone store storm stove street sugar summer sun table tail tea team tent thread throat thumb ticket tiger "
    "toe tongue tooth tower town toy train tray tree truck uncle valley voice wagon wall watch water wave wax west "
    "wheel wind window wine wing winter wolf wood wool world worm yard year"
).split()
"""Of keys, values and sequences: short and common, so that most tokenizers need few tokens for each."""

MAX_PAIRS = len(WORDS) // 2
RUN = 8
"""Words of a run of `induction`; all but the first are predicted."""

WORDS_PER_RUN = 4 * RUN
"""Of the text of `induction`: half of it is runs and their copies, at most."""

MAX_RUNS = 16
WORDS_PER_SENTENCE = 7
"""About, of the sentences between the pairs of `recall`."""


class Repeated(NamedTuple):
    """What stands twice in a text."""

    first: float
    """How deep it stands for the first time: 0 is the start of the text, 1 its end."""

    again: float
    """How deep it stands for the second time."""

    text: str

    known: int
    """Characters of the second time that cannot be predicted: the key, the first word of a run."""

    size: int
    """Characters behind those that can be."""


class Span(NamedTuple):
    """Characters start:end of a text, to be predicted; they stand for the first time at `source`."""

    source: int
    start: int
    end: int


class Draft(NamedTuple):
    """A text whose length is still open."""

    fillers: Iterator[str]
    """What lengthens it, from the end to the start."""

    repeated: list[Repeated]

    def text(self, fillers: Sequence[str]) -> tuple[str, list[Span]]:
        """The text with these fillers, the first of them the last of the text, and what is predicted in it."""
        units: list[list[tuple[str, int]]] = [[(filler, -1)] for filler in reversed(fillers)]
        depths = sorted(
            (depth, number) for number, item in enumerate(self.repeated) for depth in (item.first, item.again)
        )
        for depth, number in depths:
            units[place(depth, len(units))].append((self.repeated[number].text, number))
        words, spans, seen, end = [], [], {}, 0
        for word, number in itertools.chain.from_iterable(units):
            if number in seen:
                known, size = self.repeated[number].known, self.repeated[number].size
                spans.append(Span(seen[number] + known, end + known, end + known + size))
            elif number >= 0:
                seen[number] = end
            words.append(word)
            end += len(word) + 1
        return " ".join(words), spans


def draft(kind: str, rng: random.Random, *, units: int, pairs: int = 0) -> Draft:
    """A text without its length.

    Args:
        kind: `recall` or `induction`.
        rng: What decides the text.
        units: About how many sentences (`recall`) or words (`induction`) fill it.
        pairs: Of `recall`, at most MAX_PAIRS.
    """
    if kind == "recall":
        words = rng.sample(WORDS, 2 * pairs)
        keys, values = words[:pairs], words[pairs:]
        repeated = [
            Repeated(*_distant(rng, units + 2 * pairs), f"{key}: {value}.", len(key) + 2, len(value))
            for key, value in zip(keys, values, strict=True)
        ]
        return Draft(noise(rng), repeated)
    assert kind == "induction"
    words = rng.sample(WORDS, len(WORDS))
    runs = max(1, min(MAX_RUNS, units // WORDS_PER_RUN))
    copied, others = words[: runs * RUN], words[runs * RUN :]
    repeated = []
    for start in range(0, len(copied), RUN):
        text, known = " ".join(copied[start : start + RUN]), len(copied[start]) + 1
        repeated.append(Repeated(*_distant(rng, units // RUN + 2 * runs), text, known, len(text) - known))
    # Words of runs occur in runs alone, so each word of a copy says which one follows.
    return Draft((rng.choice(others) for _ in itertools.count()), repeated)


def reading_documents(kinds: Sequence[str], *, words: tuple[int, int], seed: int) -> Iterator[str]:
    """An endless stream of documents to train on, kinds in turn, of other random numbers than any test.

    Args:
        kinds: Of `recall` and `induction`; a kind may be named several times to be met more often.
        words: Fewest and most words that fill a document, pairs and copies not counted. Their logarithm is uniform.
        seed: Of the stream.
    """
    rng = random.Random(f"training/{seed}")  # noqa: S311
    low, high = (math.log(end) for end in words)
    for number in itertools.count():
        kind = kinds[number % len(kinds)]
        count = round(math.exp(rng.uniform(low, high)))
        units = max(1, count // WORDS_PER_SENTENCE) if kind == "recall" else count
        pairs = rng.randint(1, max(1, min(MAX_PAIRS, count // 4)))
        made = draft(kind, rng, units=units, pairs=pairs)
        text, _ = made.text(list(itertools.islice(made.fillers, units)))
        yield text


def _distant(rng: random.Random, units: int) -> tuple[float, float]:
    """Two depths whose distance is 1 to `units` of as many units, its logarithm uniform."""
    distance = math.exp(rng.uniform(-math.log(max(2, units)), 0))
    first = rng.uniform(0, 1 - distance)
    return first, first + distance
