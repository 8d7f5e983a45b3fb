"""What a model writes behind prompts: one as a stream, or many together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ropepp_lit.inference.model import Model, Writing
from ropepp_lit.nn.generation import Batch, Row
from ropepp_lit.nn.sampling import seed_of

FinishReason = Literal["stop", "length"]
"""`stop`: a token or text that ends it; `length`: `max_new_tokens`, or the end of the context."""


@dataclass(frozen=True)
class Completion:
    """What was written behind a prompt."""

    text: str
    finish_reason: FinishReason
    num_tokens: int
    """Tokens that were generated, that which ended the text included."""


class Stream:
    """Text behind one prompt as an iterator of its parts, as they are certain.

    Args:
        model: What writes.
        row: Of the model; what it has read of the prompt already is not read again.
        ids: The prompt.
        writing: Settings.
        stop_token_ids: Tokens that end the text beside those of the tokenizer.
        index: Of the prompt among all with this seed.
    """

    def __init__(
        self,
        model: Model,
        row: Row,
        ids: Sequence[int],
        writing: Writing,
        *,
        stop_token_ids: Sequence[int] = (),
        index: int = 0,
    ) -> None:
        self._stream = model.stream(ids, writing, stop_token_ids=stop_token_ids)
        self._limit = model.limit(ids, writing.max_new_tokens)
        self.ends_at_context = self._limit < writing.max_new_tokens
        """Whether the context ends before `max_new_tokens`."""
        self._tokens = row.generate(
            ids, max_new_tokens=self._limit, sampling=writing.sampling, seed=seed_of(writing.seed, index)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._stream.num_tokens

    @property
    def finish_reason(self) -> FinishReason:
        """Why the text ended; to be read when it has."""
        return "stop" if self._stream.is_stopped else "length"

    def __iter__(self) -> Iterator[str]:
        return filter(None, self.steps())

    def steps(self) -> Iterator[str]:
        """The text that each token makes certain, which can be none, and what is left at the end."""
        for token in self._tokens:
            yield self._stream.push(token)
            if self._stream.is_stopped:
                return
        yield self._stream.finish()


def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    writing: Writing,
    *,
    indices: Sequence[int],
    stop_token_ids: Sequence[int] = (),
    progress: Callable[[], object] = lambda: None,
) -> list[Completion]:
    """Continue prompts together; the text of each is what :class:`Stream` gives, to rounding of the logits.

    Args:
        model: What writes.
        prompts: Token ids, each with room for an answer.
        writing: Settings.
        indices: Of each prompt among all with this seed: its random numbers depend on it and the seed alone.
        stop_token_ids: Tokens that end texts beside those of the tokenizer.
        progress: Called when a text has ended.
    """
    streams = [model.stream(ids, writing, stop_token_ids=stop_token_ids) for ids in prompts]
    limits = [model.limit(ids, writing.max_new_tokens) for ids in prompts]
    parts: list[list[str]] = [[] for _ in prompts]
    batch = Batch(
        model.decoder,
        prompts,
        max_new_tokens=max(limits),
        sampling=writing.sampling,
        seeds=[seed_of(writing.seed, index) for index in indices],
    )
    while batch.numbers:
        ended = []
        for number, token in batch.step().items():
            stream = streams[number]
            parts[number].append(stream.push(token))
            if not stream.is_stopped and stream.num_tokens == limits[number]:
                parts[number].append(stream.finish())
            if stream.is_stopped or stream.num_tokens == limits[number]:
                ended.append(number)
                progress()
        batch.end(ended)
    return [
        Completion("".join(text), "stop" if stream.is_stopped else "length", stream.num_tokens)
        for text, stream in zip(parts, streams, strict=True)
    ]
