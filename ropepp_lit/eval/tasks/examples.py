"""Prompts of an exact number of tokens for any tokenizer, and what a model writes after them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model
from ropepp_lit.nn.generation import generate
from ropepp_lit.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from ropepp_lit.eval.tasks.base import Draft, Family

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
    family: Family, tokenizer: TextTokenizer, *, length: int, numbers: Sequence[int], seed: int
) -> list[Example]:
    """Examples whose prompt and room for the answer have exactly `length` tokens together.

    A context is made a little too long and cut at its start, where only filler lies, as a document read from its
    middle. All prompts have one length, so batches need no padding.

    Args:
        family: Of which.
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
    raise UsageError(f"lengths: {length} tokens are too few for {family} with this tokenizer; {remedy}")


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


def _encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode_text(text)


def _check_answers(family: Family, tokenizer: TextTokenizer, seed: int) -> None:
    """Raise UsageError where even a perfect answer would not score, as with a vocabulary without digits."""
    made = family.draw(units=100, seed=str(seed))
    written = tokenizer.decode(_encode(tokenizer, made.ideal))
    if family.score(made.answers, written) < 1 - 1e-9:
        raise UsageError(
            f"tasks: {family}: this tokenizer cannot write its answers: {made.ideal.strip()!r} comes back as "
            f"{written.strip()[:80]!r}; leave the family out"
        )


def _fit(family: Family, tokenizer: TextTokenizer, length: int, seed: int, number: int) -> Example | None:
    """The example, cut so that its prompt and room for the answer have `length` tokens; None where it cannot."""
    opening = tokenizer.opening
    room = length - family.max_new_tokens(tokenizer, seed=seed) - len(opening)
    draw = partial(family.draw, seed=str(seed), number=number)
    fitted = fit(draw, tokenizer, room=room, name=str(family), length=length)
    if fitted is None:
        return None
    made = fitted.draft
    return Example([*opening, *fitted.input_ids], made.answers, made.ideal, made.depth)


class Fitted(NamedTuple):
    """A draft that has its length."""

    draft: Draft
    text: str
    """Behind `draft.head`, before it was cut."""

    input_ids: list[int]
    """Of the head, and the last tokens of the text."""


def fit(draw: Callable[..., Draft], tokenizer: TextTokenizer, *, room: int, name: str, length: int) -> Fitted | None:
    """A draft with as many fillers as make it `room` tokens long, cut behind its head, in the first filler.

    Args:
        draw: Makes a draft; `units` says of about how many fillers.
        tokenizer: Of the model.
        room: Tokens, without the opening.
        name: Of the task, for messages.
        length: For messages.

    Returns:
        The draft; None where it holds more than these tokens.

    Raises:
        UsageError: no number of fillers makes it long enough.
    """
    if room < 1:
        return None
    probe = draw(units=100).take(20)
    if not probe:
        raise UsageError(f"tasks: {name}: its drafts have no fillers, so its examples cannot fill a length")
    per_filler = max(1, len(_encode(tokenizer, " ".join(probe)))) / len(probe)
    units = max(1, int(room / per_filler))
    while True:
        made = draw(units=units)
        head = _encode(tokenizer, made.head) if made.head else []
        if len(head) < room:
            try:
                found = _cut(tokenizer, made, room - len(head), per_filler)
            except _EndlessError as error:
                raise UsageError(f"lengths: {name} at {length:,} tokens: {error}; leave it out") from error
            if found is not None:
                text, ids = found
                return Fitted(made, text, head + ids)
        if units == 1:
            return None
        units = units * 9 // 10  # what is repeated may be longer than what fills: repeat it less often


class _EndlessError(Exception):
    """No number of fillers makes an example long enough."""


def _cut(tokenizer: TextTokenizer, made: Draft, room: int, per_filler: float) -> tuple[str, list[int]] | None:
    """The text with as many fillers as `room` tokens take, and its last `room`; None where they do not hold all else.

    Each step reads the whole text, so the number of fillers is found in few steps, whatever the length.

    Raises:
        _EndlessError: more fillers do not make more tokens, or there are no more.
    """
    pool: list[str] = []
    ids: list[int] = []
    text = ""
    while len(ids) < room:
        more = made.take(math.ceil((room - len(ids)) / per_filler))
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
        shorter = made.text(pool[:middle])
        tried = _encode(tokenizer, shorter)
        if len(tried) >= room:
            high, text, ids = middle, shorter, tried
        else:
            low, longest_below = middle, len(tried)
    if len(ids) - room > len(_encode(tokenizer, made.units(pool[:high])[0])):
        return None  # more would be cut than the first filler
    return text, ids[len(ids) - room :]
