"""Multi-round co-reference resolution, modeled on OpenAI's MRCR (openai/mrcr).

The context is a conversation of requests for a few words in some form on some subject, with their answers. One request
occurs two, four or eight times with different answers, among others that share its form or its subject. The last turn
asks for a code followed by the answer to the first, second, … of these requests. The score is OpenAI's: 0 unless the
generated text starts with the code, otherwise `difflib.SequenceMatcher(None, generated, expected).ratio()` of the text
after it.

The task is sized for base models: an answer has eight words, the generated text is read up to the end of the line, and
a short solved conversation precedes the context. Unrelated words after the code score 0.28 on average, because some
letters match. The prompts are worded differently from OpenAI's, so scores are not comparable with published ones.
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
"""Numbers of forms and subjects of a conversation."""

ANSWER_WORDS = 8
CODE_LETTERS = 4


class SameRequests(Family):
    """The answer to one of several identical requests.

    Args:
        requests: Number of identical requests.
    """

    task = "mrcr"

    def __init__(self, requests: int) -> None:
        self.part = f"{requests}"
        self._requests = requests

    @property
    def about(self) -> str:
        """See :attr:`Task.about`."""
        return f"the answer to one of {self._requests} identical requests"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        codes = stock.letters(rng, CODE_LETTERS, string.ascii_uppercase)
        example = _kinds(rng, 1, 2)
        shown = [_words(rng) for _ in range(2)]
        head = [_turn(example[0], shown[0]), _turn(example[1], _words(rng)), _turn(example[0], shown[1])]
        code = next(codes)
        head.append(f"{_question(code, 2, example[0])} {code} {shown[1]}\n\n")

        kinds = _kinds(rng, NUM_FORMS, NUM_SUBJECTS)
        queried = rng.choice(kinds)
        others = [kind for kind in kinds if kind != queried]
        answers = [_words(rng) for _ in range(self._requests)]
        depths = sorted(rng.random() for _ in answers)
        number = rng.randint(1, self._requests)
        code, answer = next(codes), answers[number - 1]
        return Draft(
            (_turn(rng.choice(others), _words(rng)) for _ in itertools.count()),
            [(position, _turn(queried, words)) for position, words in zip(depths, answers, strict=True)],
            _question(code, number, queried),
            [code, answer],
            head="\n".join(head),
            ideal=f" {code} {answer}",
            separator="\n",
        )

    def score(self, answers: list[str], written: str) -> float:
        """Return the ratio of matching characters after the code; 0 if the code is missing."""
        code, expected = answers
        line = written.strip().partition("\n")[0]
        if not line.startswith(code):
            return 0.0
        return difflib.SequenceMatcher(None, line.removeprefix(code).strip(), expected, autojunk=False).ratio()


def _kinds(rng: random.Random, forms: int, subjects: int) -> list[tuple[str, str]]:
    """Return all combinations of randomly selected forms and subjects."""
    return list(itertools.product(rng.sample(FORMS, forms), rng.sample(stock.WORDS, subjects)))


def _words(rng: random.Random) -> str:
    return " ".join(rng.sample(stock.WORDS, ANSWER_WORDS))


def _turn(kind: tuple[str, str], words: str) -> str:
    return f"User: Write {kind[0]} on the {kind[1]}.\nAssistant: {words}"


def _question(code: str, number: int, kind: tuple[str, str]) -> str:
    form = kind[0].partition(" ")[2]
    return f"User: Write {code} and then the {ORDINALS[number - 1]} {form} on the {kind[1]} again.\nAssistant:"


FAMILIES: dict[str, Family] = {family.part: family for family in map(SameRequests, (2, 4, 8))}
