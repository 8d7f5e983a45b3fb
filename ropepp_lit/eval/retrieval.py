"""Retrieval at an exact number of tokens: RULER's families (arXiv 2404.06654), generated here for any tokenizer.

| family           | the context holds                             | asked for       | RULER's name      |
|------------------|-----------------------------------------------|-----------------|-------------------|
| `single`         | one value among repeated sentences            | it              | `niah_single`     |
| `multikey`       | nothing but values of other keys              | that of one key | `niah_multikey`   |
| `multivalue`     | four values of one key                        | all four        | `niah_multivalue` |
| `multiquery`     | four values of four keys                      | all four        | `niah_multiquery` |
| `tracking`       | a value handed from name to name, and a decoy | its names       | `vt`              |
| `common_words`   | ten words often, others seldom                | the ten         | `cwe`             |
| `frequent_words` | made-up words, numbers by Zipf's law, α = 2   | the first three | `fwe`             |

The score is RULER's: the share of the wanted strings that occur in the answer, whatever their case. The wording is our
own and short, made to be continued by a base model, so scores compare models here and not with RULER's published ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import TOKENS_AT_ONCE, Model
from ropepp_lit.eval.results import Measurement, sample_of
from ropepp_lit.eval.retrieval_families import DEPTHS, Draft, draft
from ropepp_lit.nn.generation import generate
from ropepp_lit.text.tokenizer import TextTokenizer

MAX_LEAST = 2**17
"""Tokens up to which a length is looked for where the one that was given is too short."""

MAX_CHARACTERS = 64
"""Characters for each token of an example at most: tokenizers with fewer tokens cannot fill a length."""

GUESSES = 12
"""Steps in which the number of fillers is guessed from their mean length; then intervals are halved."""


class Example(NamedTuple):
    """A prompt of an exact length, and what must come behind it."""

    input_ids: list[int]
    answers: list[str]
    ideal: str
    depth: float | None


def make_examples(
    family: str, tokenizer: TextTokenizer, *, length: int, numbers: Sequence[int], seed: int
) -> list[Example]:
    """Examples whose prompt and room for the answer have exactly `length` tokens together.

    A context is made a little too long and cut at its start, where only filler lies, as a document read from its
    middle. All prompts have one length, so batches need no padding.

    Args:
        family: One of FAMILIES.
        tokenizer: Of the model.
        length: Tokens of prompt and answer.
        numbers: Of the examples; the same number is the same example.
        seed: Of what they say.

    Raises:
        UsageError: the length is too short for the family, or the tokenizer cannot write its examples.
    """
    _check_answers(family, tokenizer, seed)
    examples = [_fit(family, tokenizer, length, seed, number) for number in numbers]
    found = [example for example in examples if example is not None]
    if len(found) == len(numbers):
        return found
    least = length
    while least <= MAX_LEAST and any(_fit(family, tokenizer, least, seed, number) is None for number in numbers):
        least += 1 + least // 20
    remedy = f"give {least} or more" if least <= MAX_LEAST else "leave the family out"
    raise UsageError(f"lengths: {length} tokens are too few for retrieval:{family} with this tokenizer; {remedy}")


def answer_tokens(family: str, tokenizer: TextTokenizer, *, seed: int) -> int:
    """Tokens that a model may write: twice those of a perfect answer, and eight."""
    ideal = draft(family, units=100, seed=str(seed)).ideal
    return 2 * len(_encode(tokenizer, ideal)) + 8


def write_answers(
    model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, chunk_tokens: int | None = None
) -> list[str]:
    """What a model writes behind prompts of one length, the most likely token each time, up to the document's end.

    Args:
        model: What answers.
        prompts: Token ids, all equally many.
        max_new_tokens: Tokens of an answer at most.
        chunk_tokens: Tokens of a prompt in one forward pass; empty means all.
    """
    stops, written = model.tokenizer.stop_token_ids, []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    input_ids = torch.tensor(prompts, device=model.device)
    ends = torch.tensor(sorted(stops), dtype=torch.int64, device=model.device)
    for tokens in generate(model.decoder, input_ids, max_new_tokens=max_new_tokens, chunk_tokens=chunk_tokens):
        written.append(tokens)
        ended = ended | torch.isin(tokens, ends)
        if ended.all():
            break
    answers = []
    for row in torch.stack(written, dim=1).tolist():
        answers.append(model.tokenizer.decode(list(itertools.takewhile(lambda token: token not in stops, row))))
    return answers


def measure(
    model: Model,
    family: str,
    *,
    length: int,
    limit: int,
    seed: int,
    chunk_tokens: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Measurement]:
    """The score of a family at a length, over all examples and by the depth of the answer.

    Args:
        model: What answers.
        family: One of FAMILIES.
        length: Tokens of prompt and answer.
        limit: Examples.
        seed: Of the examples.
        chunk_tokens: See :func:`write_answers`.
        progress: Called with the number of tokens read.

    Raises:
        UsageError: the length is too short for the family.
    """
    max_new_tokens = answer_tokens(family, model.tokenizer, seed=seed)
    scores: list[float] = []
    depths: list[float | None] = []
    samples: list[str] = []
    size = max(1, TOKENS_AT_ONCE // length)
    for start in range(0, limit, size):  # made batch by batch, so that memory does not grow with the limit
        numbers = range(start, min(start + size, limit))
        batch = make_examples(family, model.tokenizer, length=length, numbers=numbers, seed=seed)
        depths += [example.depth for example in batch]
        prompts = [example.input_ids for example in batch]
        samples.append(sample_of(prompts))
        written = write_answers(model, prompts, max_new_tokens=max_new_tokens, chunk_tokens=chunk_tokens)
        scores += [score(example.answers, text) for example, text in zip(batch, written, strict=True)]
        progress(len(batch) * length)
    measured = partial(
        Measurement, task="retrieval", part=family, metric="score", length=length, sample=sample_of(samples)
    )
    found = [measured(numerators=scores, denominators=[1.0] * limit)]
    for depth in DEPTHS:
        here = [float(place == depth) for place in depths]
        if any(here):
            numerators = [score * inside for score, inside in zip(scores, here, strict=True)]
            found.append(measured(depth=depth, numerators=numerators, denominators=here))
    return found


def average(found: Sequence[Measurement]) -> Measurement:
    """The mean over families of their scores at one length: all examples, each as much as any."""
    scores = [measurement for measurement in found if measurement.depth is None]
    return dataclasses.replace(
        scores[0],
        part="all",
        numerators=[value for measurement in scores for value in measurement.numerators],
        denominators=[value for measurement in scores for value in measurement.denominators],
    )


def score(answers: list[str], written: str) -> float:
    """The share of the answers that occur in what was written, whatever their case (RULER's string match)."""
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)


def _encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode_text(text)


def _check_answers(family: str, tokenizer: TextTokenizer, seed: int) -> None:
    """Raise UsageError where even a perfect answer would not score, as with a vocabulary without digits."""
    made = draft(family, units=100, seed=str(seed))
    written = tokenizer.decode(_encode(tokenizer, made.ideal))
    if score(made.answers, written) < 1:
        raise UsageError(
            f"tasks: retrieval:{family}: this tokenizer cannot write its answers: {made.ideal.strip()!r} comes back as "
            f"{written.strip()[:80]!r}; leave the family out"
        )


def _fit(family: str, tokenizer: TextTokenizer, length: int, seed: int, number: int) -> Example | None:
    """The example, cut so that its prompt and room for the answer have `length` tokens; None where it cannot."""
    opening = tokenizer.opening
    room = length - answer_tokens(family, tokenizer, seed=seed) - len(opening)
    if room < 1:
        return None
    probe = list(itertools.islice(draft(family, units=100, seed=str(seed), number=number).fillers, 20))
    per_filler = max(1, len(_encode(tokenizer, " ".join(probe)))) / len(probe)
    units = max(1, int(room / per_filler))
    while True:
        made = draft(family, units=units, seed=str(seed), number=number)
        try:
            ids = _cut(tokenizer, made, room, per_filler)
        except _EndlessError as error:
            raise UsageError(f"lengths: retrieval:{family} at {length:,} tokens: {error}; leave it out") from error
        if ids is not None:
            return Example([*opening, *ids], made.answers, made.ideal, made.depth)
        if units == 1:
            return None
        units = units * 9 // 10  # what is repeated may be longer than what fills: repeat it less often


class _EndlessError(Exception):
    """No number of fillers makes an example long enough."""


def _cut(tokenizer: TextTokenizer, made: Draft, room: int, per_filler: float) -> list[int] | None:
    """The last `room` tokens of a draft with as many fillers as that takes; None where they would not hold all else.

    Each step reads the whole text, so the number of fillers is found in few steps, whatever the length.

    Raises:
        _EndlessError: more fillers do not make more tokens, or there are no more.
    """
    pool: list[str] = []
    ids: list[int] = []
    while len(ids) < room:
        more = list(itertools.islice(made.fillers, math.ceil((room - len(ids)) / per_filler)))
        pool += more
        text, before = made.text(pool), len(ids)
        ids = _encode(tokenizer, text)
        if len(ids) < room and (not more or len(ids) <= before or len(text) > MAX_CHARACTERS * room):
            raise _EndlessError(
                f"its text of {len(text):,} characters has {len(ids):,} tokens with this tokenizer, and more of it "
                "would not fill that length"
            )
        per_filler = max(1, len(ids) - before) / max(1, len(more))
    low, high, longest_below = 0, len(pool), 0
    for step in itertools.count():
        if high - low <= 1:
            break
        if step >= GUESSES:
            middle = (low + high) // 2
        elif low == 0 or len(ids) - room <= room - longest_below:
            middle = high - int((len(ids) - room) / per_filler)
        else:
            middle = low + math.ceil((room - longest_below) / per_filler)
        middle = min(max(middle, low + 1), high - 1)
        tried = _encode(tokenizer, made.text(pool[:middle]))
        if len(tried) >= room:
            high, ids = middle, tried
        else:
            low, longest_below = middle, len(tried)
    if len(ids) - room > len(_encode(tokenizer, pool[high - 1])):
        return None  # more would be cut than the first filler
    return ids[len(ids) - room :]
