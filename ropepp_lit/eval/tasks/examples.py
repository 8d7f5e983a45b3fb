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

MAX_SUGGESTED_LENGTH = 2**17
"""Largest length in tokens that an error message suggests instead of one that is too short."""

MAX_CHARACTERS = 64
"""Maximum number of characters per token; examples of tokenizers with longer tokens cannot fill a length."""

GUESSES = 12
"""Steps that estimate the number of fillers from their mean length, before bisection."""


class Example(NamedTuple):
    """A prompt of an exact length, and the expected answers."""

    input_ids: list[int]
    answers: list[str]
    ideal: str
    depth: float | None


def make_examples(
    family: Family, tokenizer: TextTokenizer, *, length: int, numbers: Sequence[int], seed: int
) -> list[Example]:
    """Create examples in which the prompt and the space reserved for the answer have exactly `length` tokens.

    The context is built slightly too long and truncated at its start, inside the first filler. All prompts have the
    same length, so batches need no padding.

    Args:
        family: Family that creates the drafts.
        tokenizer: Tokenizer of the model.
        length: Tokens of prompt and answer.
        numbers: Numbers of the examples; the same number is the same example.
        seed: Seed of the examples.

    Raises:
        UsageError: The length is too short for the family, or the tokenizer cannot represent its answers.
    """
    _check_answers(family, tokenizer, seed)
    examples = [_fit(family, tokenizer, length, seed, number) for number in numbers]
    fitted = [example for example in examples if example is not None]
    if len(fitted) == len(numbers):
        return fitted
    sufficient = length
    while sufficient <= MAX_SUGGESTED_LENGTH and any(
        _fit(family, tokenizer, sufficient, seed, number) is None for number in numbers
    ):
        sufficient += 1 + sufficient // 20
    remedy = f"give {sufficient} or more" if sufficient <= MAX_SUGGESTED_LENGTH else "leave the family out"
    raise UsageError(f"lengths: {length} tokens are too few for {family} with this tokenizer; {remedy}")


def write_answers(
    model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, chunk_tokens: int | None = None
) -> list[str]:
    """Generate answers to prompts of equal length by greedy decoding, until a stop token.

    Args:
        model: The model.
        prompts: Token ids of the prompts, all of the same length.
        max_new_tokens: Maximum number of tokens of an answer.
        chunk_tokens: Maximum number of prompt tokens in one forward pass; None means all.
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
    """Raise UsageError if a perfect answer would not get the full score, as with a vocabulary without digits."""
    draft = family.numbered_draft(units=100, seed=str(seed))
    written = tokenizer.decode(_encode(tokenizer, draft.ideal))
    if family.score(draft.answers, written) < 1 - 1e-9:
        raise UsageError(
            f"tasks: {family}: this tokenizer cannot represent its answers: {draft.ideal.strip()!r} is decoded as "
            f"{written.strip()[:80]!r}; leave the family out"
        )


def _fit(family: Family, tokenizer: TextTokenizer, length: int, seed: int, number: int) -> Example | None:
    """Return the example with `length` tokens of prompt and answer; None if it does not fit."""
    opening = tokenizer.opening
    num_tokens = length - family.max_new_tokens(tokenizer, seed=seed) - len(opening)
    make_draft = partial(family.numbered_draft, seed=str(seed), number=number)
    fitted = fit(make_draft, tokenizer, num_tokens=num_tokens, name=str(family), length=length)
    if fitted is None:
        return None
    draft = fitted.draft
    return Example([*opening, *fitted.input_ids], draft.answers, draft.ideal, draft.depth)


class Fitted(NamedTuple):
    """A draft filled to a number of tokens."""

    draft: Draft
    text: str
    """Text after `draft.head`, before truncation."""

    input_ids: list[int]
    """Token ids of the head and of the truncated text."""


def fit(
    make_draft: Callable[..., Draft], tokenizer: TextTokenizer, *, num_tokens: int, name: str, length: int
) -> Fitted | None:
    """Fill a draft to `num_tokens` tokens; its context is truncated at the start, inside the first filler.

    Args:
        make_draft: Creates the draft; its argument `units` is the approximate number of fillers.
        tokenizer: Tokenizer of the model.
        num_tokens: Number of tokens, without BOS.
        name: Name of the task, for messages.
        length: Length of the task, for messages.

    Returns:
        The filled draft; None if it has more tokens even with a single filler.

    Raises:
        UsageError: No number of fillers makes it long enough.
    """
    if num_tokens < 1:
        return None
    probe = make_draft(units=100).take(20)
    if not probe:
        raise UsageError(f"tasks: {name}: its drafts have no fillers, so its examples cannot fill a length")
    per_filler = max(1, len(_encode(tokenizer, " ".join(probe)))) / len(probe)
    units = max(1, int(num_tokens / per_filler))
    while True:
        draft = make_draft(units=units)
        head = _encode(tokenizer, draft.head) if draft.head else []
        if len(head) < num_tokens:
            try:
                filled = _fill(tokenizer, draft, num_tokens - len(head), per_filler)
            except _CannotFillError as error:
                raise UsageError(f"lengths: {name} at {length:,} tokens: {error}; leave it out") from error
            if filled is not None:
                text, ids = filled
                return Fitted(draft, text, head + ids)
        if units == 1:
            return None
        units = units * 9 // 10  # the contents that scale with `units` may be longer than the fillers


class _CannotFillError(Exception):
    """No number of fillers makes an example long enough."""


def _fill(tokenizer: TextTokenizer, draft: Draft, num_tokens: int, per_filler: float) -> tuple[str, list[int]] | None:
    """Return the text with as many fillers as `num_tokens` tokens require, and its last `num_tokens` token ids.

    Each step tokenizes the complete text, so the search for the number of fillers takes few steps at any length.

    Returns:
        Text and token ids; None if truncation would remove more than the first filler.

    Raises:
        _CannotFillError: More fillers do not add tokens, or there are no more fillers.
    """
    pool: list[str] = []
    ids: list[int] = []
    text = ""
    while len(ids) < num_tokens:
        more = draft.take(math.ceil((num_tokens - len(ids)) / per_filler))
        pool += more
        text, before = draft.text(pool), len(ids)
        ids = _encode(tokenizer, text)
        if len(ids) < num_tokens and (not more or len(ids) <= before or len(text) > MAX_CHARACTERS * num_tokens):
            raise _CannotFillError(
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
        elif low == 0 or len(ids) - num_tokens <= num_tokens - longest_below:
            middle = high - int((len(ids) - num_tokens) / per_filler)
        else:
            middle = low + math.ceil((num_tokens - longest_below) / per_filler)
        middle = min(max(middle, low + 1), high - 1)
        shorter = draft.text(pool[:middle])
        shorter_ids = _encode(tokenizer, shorter)
        if len(shorter_ids) >= num_tokens:
            high, text, ids = middle, shorter, shorter_ids
        else:
            low, longest_below = middle, len(shorter_ids)
    if len(ids) - num_tokens > len(_encode(tokenizer, draft.units(pool[:high])[0])):
        return None  # truncation would remove more than the first filler
    return text, ids[len(ids) - num_tokens :]
