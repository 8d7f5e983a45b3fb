"""RULER's tasks with RULER's prompts (arXiv 2404.06654), for comparison with published scores.

| task                       | haystack                        | keys and values                             |
|----------------------------|---------------------------------|---------------------------------------------|
| `niah_single_1`            | a repeated line                 | a word's number                             |
| `niah_single_2`, `_3`      | essays                          | a word's number, a word's UUID              |
| `niah_multikey_1`          | essays                          | the number of one of four words             |
| `niah_multikey_2`, `_3`    | only values of other keys       | a word's number, a UUID's UUID              |
| `niah_multivalue`          | essays                          | four numbers of a word                      |
| `niah_multiquery`          | essays                          | the numbers of four words                   |
| `vt`                       | a repeated line                 | five variables with the same value          |
| `cwe`, `fwe`               | words                           | the ten, the three most frequent words      |

Templates, repetitions and maximum numbers of generated tokens are those of github.com/NVIDIA/RULER (Apache License 2.0;
scripts/data/synthetic/constants.py and scripts/synthetic.yaml), with the template for base models, whose prompt ends
with the start of the answer. The score is RULER's string match. The question answering tasks (`qa_1`, `qa_2`) require
SQuAD and HotpotQA and are not included. Differences: words are generated pairs such as `bright-otter`, essays are the
user's text, the first line of a context is truncated to reach the exact length, and the prompt of `vt` ends without the
space after its colon.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
import random
import re
import string
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement
from ropepp_lit.eval.tasks import stock
from ropepp_lit.eval.tasks.base import Draft, Family, Request
from ropepp_lit.text.tokenizer import TextTokenizer

Haystack = Literal["noise", "needle", "essay"]

NIAH = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} "
    "mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
)
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
VARIABLE_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assgined the "
    "value {query}, they are: ",
)
COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FREQUENT_WORDS = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""Templates with the start of the answer ("assgined" is RULER's spelling), and the repeated line."""

HOPS = 4
EXAMPLE_NOISE = 10
"""Repetitions of the line in the solved example of `vt`."""

COMMON = 10
LONG_CONTEXT = 4096
"""Context length in tokens from which the words of `cwe` are repeated more often."""

ALPHA, ZETA = 2.0, math.pi**2 / 6
TOKENS_PER_CODED_WORD = 50
"""Tokens of the context per distinct word of `fwe`."""


@dataclass(frozen=True)
class _Draft(Draft):
    """A draft whose question is on a separate line."""

    numbered: bool = False

    def units(self, fillers: list[str]) -> list[str]:
        """See :meth:`Draft.units`."""
        units = super().units(fillers)
        return _numbered(units) if self.numbered else units

    def text(self, fillers: list[str]) -> str:
        """See :meth:`Draft.text`."""
        return f"{self.separator.join(self.units(fillers))}\n{self.question}"


class RulerTask(Family):
    """A task of RULER."""

    task = "ruler"
    tokens_to_generate: int
    length = LONG_CONTEXT
    """Context length in tokens."""

    essays: Sequence[str] = ()
    """Sentences of the haystack."""

    def max_new_tokens(self, tokenizer: TextTokenizer, *, seed: int) -> int:
        """Return RULER's number of tokens, or more if a perfect answer is longer with this tokenizer."""
        ideal = self.numbered_draft(units=100, seed=str(seed)).ideal
        return max(self.tokens_to_generate, len(tokenizer.encode_text(ideal)) + 2)

    def check(self, model: Model, request: Request) -> None:
        """See :meth:`Family.check`."""
        if request.texts or not self.needs_text:
            Family.check(self._at(request), model, request)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """See :meth:`Family.measure`."""
        return Family.measure(self._at(request), model, request)

    def _at(self, request: Request) -> RulerTask:
        """Return a copy of the task for the request's length, with its texts as essays."""
        task = copy.copy(self)
        task.length = request.length or self.length
        if self.needs_text:
            task.essays = re.split(r"(?<=[.!?]) ", re.sub(r"\s+", " ", " ".join(request.texts)).strip())
        return task


class Niah(RulerTask):
    """Needles in a haystack.

    Args:
        part: Name of the task.
        haystack: Kind of the text around the needles.
        key: Kind of the keys: words or uuids.
        value: Kind of the values: numbers or uuids.
        num_keys: Number of keys in the context.
        num_values: Number of values of each key.
        num_queries: Number of queried keys.
    """

    tokens_to_generate = 128

    def __init__(
        self, part: str, haystack: Haystack, *, key: str = "words", value: str = "numbers", num_keys: int = 1,
        num_values: int = 1, num_queries: int = 1,
    ) -> None:  # fmt: skip
        self.part, self._haystack, self._key, self._value = part, haystack, key, value
        self._num_keys, self._num_values, self._num_queries = num_keys, num_values, num_queries
        self.needs_text = haystack == "essay"  # type: ignore[misc]

    @property
    def about(self) -> str:
        """See :attr:`Task.about`."""
        queried, total = self._num_queries * self._num_values, self._num_keys * self._num_values
        hay = {"noise": "a repeated line", "needle": "other needles", "essay": "essays"}[self._haystack]
        return f"{queried} of {total} {self._value} with {self._key} as keys, hidden in {hay}"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        keys, values = _names(rng, self._key), _names(rng, self._value)
        values_of = {next(keys): list(itertools.islice(values, self._num_values)) for _ in range(self._num_keys)}
        queried = rng.sample(list(values_of), self._num_queries)
        is_one = self._num_queries * self._num_values == 1
        needles = [
            (depth if is_one and key in queried else rng.random(), self._needle(key, value))
            for key, key_values in values_of.items()
            for value in key_values
        ]
        fillers: Iterator[str] = itertools.repeat(NOISE)
        if self._haystack == "needle":
            fillers = (self._needle(key, value) for key, value in zip(keys, values, strict=False))
        elif self._haystack == "essay":
            if not self.essays:
                raise UsageError(f"tasks: {self} needs essays; pass files of them by --text")
            end = rng.randrange(len(self.essays))
            fillers = (self.essays[(end - number) % len(self.essays)] for number in itertools.count())
        template, prefix = NIAH
        if is_one:  # RULER's singular forms
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            prefix = prefix.replace("are", "is")
        kind = self._value.removesuffix("s") if is_one else self._value
        query = ", ".join(queried[:-1]) + f", and {queried[-1]}" if len(queried) > 1 else queried[0]
        head, question = _parts(template + prefix, type_needle_v=kind, query=query)
        return _Draft(
            fillers, needles, question, [value for key in queried for value in values_of[key]],
            depth if is_one else None, head=head, separator=" " if self._haystack == "essay" else "\n",
        )  # fmt: skip

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self._value, key=key, value=value)


class VariableTracking(RulerTask):
    """Variables with the same value through a chain of assignments."""

    part = "vt"
    tokens_to_generate = 30

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        example = self._one(rng, 3, "")
        shown = example.text(list(itertools.repeat(f"{NOISE}\n", EXAMPLE_NOISE)))
        return self._one(rng, 5, f"{example.head}{shown}{example.ideal}\n\n\n\n")

    def _one(self, rng: random.Random, letters: int, example: str) -> _Draft:
        names = list(itertools.islice(stock.letters(rng, letters, string.ascii_uppercase), HOPS + 1))
        value = next(stock.numbers(rng))
        lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))]
        depths = sorted(rng.random() for _ in lines)
        head, question = _parts("".join(VARIABLE_TRACKING), query=value, num_v=len(names))
        return _Draft(
            itertools.repeat(f"{NOISE}\n"), list(zip(depths, lines, strict=True)), question.rstrip(), names,
            head=example + head, ideal=f" {' '.join(names)}",
        )  # fmt: skip


class CommonWords(RulerTask):
    """The ten most frequent words of a numbered list."""

    part = "cwe"
    tokens_to_generate = 120

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        words = stock.pairs(rng)
        is_long = self.length >= LONG_CONTEXT
        head, question = _parts("".join(COMMON_WORDS))
        common, others = (list(itertools.islice(words, count)) for count in (COMMON, 30 if is_long else 10))
        shown = common * (10 if is_long else 3) + others * (3 if is_long else 1)
        rng.shuffle(shown)
        example = f"{head}{' '.join(_numbered(shown))}\n{question}{' '.join(_numbered(common))}\n"
        common = list(itertools.islice(words, COMMON))
        needles = [(rng.random(), word) for word in common for _ in range(30 if is_long else 6)]
        return _Draft(
            _shuffled(rng, words, 3 if is_long else 1), needles, question, common, head=example + head,
            ideal=f" {' '.join(_numbered(common))}", numbered=True,
        )  # fmt: skip


class FrequentWords(RulerTask):
    """The three most frequent coded words after ignored dots, with counts by Zipf's law."""

    part = "fwe"
    tokens_to_generate = 50

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        words = ["...", *itertools.islice(stock.letters(rng, 6, string.ascii_lowercase), self._num_words - 1)]
        answers = words[1:4]
        # A few additional occurrences, so that the shortest contexts contain them too.
        needles = [(rng.random(), word) for rank, word in enumerate(answers) for _ in range(3 - rank)]
        head, question = _parts("".join(FREQUENT_WORDS))
        return _Draft(_by_zipf(rng, words), needles, question, answers, head=head)

    @property
    def _num_words(self) -> int:
        return max(8, self.length // TOKENS_PER_CODED_WORD)


def _by_zipf(rng: random.Random, words: Sequence[str]) -> Iterator[str]:
    """Yield words in random order with frequencies proportional to rank**-2, also in every prefix of the sequence."""
    shares = [rank**-ALPHA / ZETA for rank in range(1, len(words) + 1)]
    times = [(rng.random() / share, index) for index, share in enumerate(shares)]
    heapq.heapify(times)
    counts = [0] * len(words)
    while True:
        _, index = times[0]
        counts[index] += 1
        heapq.heapreplace(times, ((counts[index] + rng.random()) / shares[index], index))
        yield words[index]


def _parts(template: str, **values: object) -> tuple[str, str]:
    """Split a template into the text before the context and the text after it."""
    head, _, question = template.partition("{context}")
    return head.format(**values), question.removeprefix("\n").format(**values)


def _names(rng: random.Random, kind: str) -> Iterator[str]:
    """Yield unique words, numbers of seven digits or UUIDs."""
    if kind == "words":
        return stock.pairs(rng)
    if kind == "numbers":
        return (str(number) for number in stock.unique(lambda: rng.randrange(10**6, 10**7), 9 * 10**6))
    return (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in itertools.count())


def _numbered(words: Sequence[str]) -> list[str]:
    return [f"{number}. {word}" for number, word in enumerate(words, 1)]


def _shuffled(rng: random.Random, words: Iterator[str], times: int) -> Iterator[str]:
    """Yield words in random order, each repeated `times` times."""
    while True:
        part = list(itertools.islice(words, 100)) * times
        rng.shuffle(part)
        yield from part


FAMILIES: Mapping[str, RulerTask] = {
    task.part: task
    for task in (
        Niah("niah_single_1", "noise"),
        Niah("niah_single_2", "essay"),
        Niah("niah_single_3", "essay", value="uuids"),
        Niah("niah_multikey_1", "essay", num_keys=4),
        Niah("niah_multikey_2", "needle"),
        Niah("niah_multikey_3", "needle", key="uuids", value="uuids"),
        Niah("niah_multivalue", "essay", num_values=4),
        Niah("niah_multiquery", "essay", num_keys=4, num_queries=4),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
    )
}
