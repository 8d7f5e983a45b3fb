"""Generates text: one prompt as a stream, or multiple prompts as a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ropepp_lit.inference.model import GenerationSettings, Model
from ropepp_lit.nn.generation import Batch, Row
from ropepp_lit.nn.sampling import seed_of

FinishReason = Literal["stop", "length"]
"""`stop`: a stop token or stop text; `length`: `max_new_tokens`, or the end of the context."""


@dataclass(frozen=True)
class Completion:
    """Generated text of a prompt."""

    text: str
    finish_reason: FinishReason
    num_tokens: int
    """Number of generated tokens, including the one that ended the text."""


class Stream:
    """Iterator over the parts of the generated text of a prompt; parts are yielded as soon as they are final.

    Args:
        model: The model.
        row: Row with a KV cache; its prefix in common with the prompt is reused.
        ids: Token ids of the prompt.
        generation: Generation settings.
        stop_token_ids: Stop tokens in addition to those of the tokenizer.
        index: Index of the prompt among all prompts with this seed.
    """

    def __init__(
        self,
        model: Model,
        row: Row,
        ids: Sequence[int],
        generation: GenerationSettings,
        *,
        stop_token_ids: Sequence[int] = (),
        index: int = 0,
    ) -> None:
        self._stream = model.stream(ids, generation, stop_token_ids=stop_token_ids)
        self._limit = model.limit(ids, generation.max_new_tokens)
        self.ends_at_context = self._limit < generation.max_new_tokens
        """Whether the context ends before `max_new_tokens`."""
        self._tokens = row.generate(
            ids, max_new_tokens=self._limit, sampling=generation.sampling, seed=seed_of(generation.seed, index)
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens generated so far."""
        return self._stream.num_tokens

    @property
    def finish_reason(self) -> FinishReason:
        """Reason for which the text ended; valid after the end."""
        return "stop" if self._stream.is_stopped else "length"

    def __iter__(self) -> Iterator[str]:
        return filter(None, self.steps())

    def steps(self) -> Iterator[str]:
        """Yield the text that becomes final with each token, which may be empty, and the rest at the end."""
        for token in self._tokens:
            yield self._stream.push(token)
            if self._stream.is_stopped:
                return
        yield self._stream.finish()


def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    generation: GenerationSettings,
    *,
    indices: Sequence[int],
    stop_token_ids: Sequence[int] = (),
    progress: Callable[[], object] = lambda: None,
) -> list[Completion]:
    """Generate texts for a batch of prompts, equal to those of :class:`Stream` up to rounding of the logits.

    Args:
        model: The model.
        prompts: Token ids of the prompts, each shorter than the context.
        generation: Generation settings.
        indices: Index of each prompt among all prompts with this seed; random numbers depend only on seed and index.
        stop_token_ids: Stop tokens in addition to those of the tokenizer.
        progress: Called after the end of each text.
    """
    streams = [model.stream(ids, generation, stop_token_ids=stop_token_ids) for ids in prompts]
    limits = [model.limit(ids, generation.max_new_tokens) for ids in prompts]
    parts: list[list[str]] = [[] for _ in prompts]
    batch = Batch(
        model.decoder,
        prompts,
        max_new_tokens=max(limits),
        sampling=generation.sampling,
        seeds=[seed_of(generation.seed, index) for index in indices],
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
