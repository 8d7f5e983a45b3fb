"""Which of several same requests is meant: after OpenAI's MRCR (openai/mrcr), multi-round co-reference resolution.

The context is a conversation of requests for a few words in some form on some subject, with their answers. One request
stands in it two, four or eight times, each time with another answer, among others that share its form or its subject.
The last turn asks to write a code and then the answer to the first, second, … of them again. The score is OpenAI's: 0
without the code at the start, else `difflib.SequenceMatcher(None, written, expected).ratio()` of what stands behind it.

Sized for base models: an answer is eight words, what is written counts up to the end of the line, and a short
conversation of the same kind stands before. Other words behind the code score 0.28, as their letters are
alike. The wording is our own, so scores compare models here and not with OpenAI's.
"""

from __future__ import annotations

import difflib
import itertools
import random
import string

from ropepp_lit.eval.tasks import stock
from ropepp_lit.eval.tasks.base import Draft, Family

FORMS = ("a line", "a note", "a riddle", "a rhyme", "a message", "a title", "a toast", "a rumor")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
NUM_FORMS, NUM_SUBJECTS = 4, 6
"""Of a conversation."""

ANSWER_WORDS = 8
CODE_LETTERS = 4


class SameRequests(Family):
    """One of several answers to the same request.

    Args:
        requests: Of that kind.
    """

    task = "mrcr"

    def __init__(self, requests: int) -> None:
        self.part = f"{requests}"
        self._requests = requests

    @property
    def about(self) -> str:
        """See :attr:`Task.about`."""
        return f"one of {self._requests} answers to the same request"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        codes = stock.letters(rng, CODE_LETTERS, string.ascii_uppercase)
        example = _kinds(rng, 1, 2)
        told = [_words(rng) for _ in range(2)]
        head = [_turn(example[0], told[0]), _turn(example[1], _words(rng)), _turn(example[0], told[1])]
        code = next(codes)
        head.append(f"{_question(code, 2, example[0])} {code} {told[1]}\n\n")

        kinds = _kinds(rng, NUM_FORMS, NUM_SUBJECTS)
        asked = rng.choice(kinds)
        others = [kind for kind in kinds if kind != asked]
        answers = [_words(rng) for _ in range(self._requests)]
        depths = sorted(rng.random() for _ in answers)
        number = rng.randint(1, self._requests)
        code, answer = next(codes), answers[number - 1]
        return Draft(
            (_turn(rng.choice(others), _words(rng)) for _ in itertools.count()),
            [(place, _turn(asked, words)) for place, words in zip(depths, answers, strict=True)],
            _question(code, number, asked),
            [code, answer],
            head="\n".join(head),
            ideal=f" {code} {answer}",
            separator="\n",
        )

    def score(self, answers: list[str], written: str) -> float:
        """Ratio of the matching characters behind the code; 0 where it is missing."""
        code, expected = answers
        line = written.strip().partition("\n")[0]
        if not line.startswith(code):
            return 0.0
        return difflib.SequenceMatcher(None, line.removeprefix(code).strip(), expected, autojunk=False).ratio()


def _kinds(rng: random.Random, forms: int, subjects: int) -> list[tuple[str, str]]:
    """Forms and subjects of requests, each form with each subject."""
    return list(itertools.product(rng.sample(FORMS, forms), rng.sample(stock.WORDS, subjects)))


def _words(rng: random.Random) -> str:
    return " ".join(rng.sample(stock.WORDS, ANSWER_WORDS))


def _turn(kind: tuple[str, str], words: str) -> str:
    return f"User: Write {kind[0]} on the {kind[1]}.\nAssistant: {words}"


def _question(code: str, number: int, kind: tuple[str, str]) -> str:
    form = kind[0].partition(" ")[2]
    return f"User: Write {code} and then the {ORDINALS[number - 1]} {form} on the {kind[1]} again.\nAssistant:"


FAMILIES: dict[str, Family] = {family.part: family for family in map(SameRequests, (2, 4, 8))}
