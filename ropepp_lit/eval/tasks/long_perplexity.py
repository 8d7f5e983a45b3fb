"""LongPPL (arXiv 2410.23771): perplexity over the tokens that need a long context.

A model identifies these key tokens by contrasting two contexts, l the long window and s a short context:

    LSD(x) = log p(x | l) - log p(x | s) > 2   and   log p(x | l) > -2        (the paper's α and β)

Every model is evaluated on the same key tokens, those of the first model or of a model that the task specifies. The
long context is the window of perplexity. The short context has the shortest of the lengths: its windows start every
quarter of that length, so a token has between three quarters of it and all of it as context (the paper's code: 4,096 to
5,119 tokens, with windows every 1,024). Only tokens with more context in the long window are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from tqdm import tqdm

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement, sample_of
from ropepp_lit.eval.tasks.base import Request, Task
from ropepp_lit.eval.tasks.perplexity import RANGES, token_losses, tokens_before, tokens_read

MIN_GAIN, MAX_LOSS = 2.0, 2.0
"""Minimum gain of a key token by the long context, and maximum loss with the long context, in nats."""

SHORT_STRIDE = 4
"""Number of windows of the short context per short context length."""

FEW_KEY_TOKENS = 100
"""Number of key tokens below which a warning is printed."""


class LongPerplexity(Task):
    """Perplexity over key tokens, their share of all tokens, and the gain of all tokens by the long context.

    Args:
        source: Checkpoint of the model that identifies the key tokens.
        part: Checkpoint as given in the task's name; empty for the default.
        load: Function that loads the model; with `weights=False` without its weights.
    """

    task = "longppl"
    needs_text = by_document = True

    def __init__(self, source: str, part: str, *, load: Callable[..., Model]) -> None:
        self.source, self.part, self._load = source, part, load
        self._keys: dict[int, list[np.ndarray]] = {}  # by length
        self._short: tuple[str, list[np.ndarray]] = ("", [])  # fingerprint and short-context losses of the last model

    @cached_property
    def _key_model(self) -> Model:
        """Model that identifies the key tokens, without weights."""
        return self._load(self.source, weights=False)

    def identity(self, request: Request) -> dict[str, Any]:
        """Return the fingerprint of the model that identifies the key tokens, and the short context."""
        return {"key_model": self._key_model.fingerprint, "short": min(request.lengths)}

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError if no token has a longer context, or if the tokenizers of the models differ on the texts."""
        lengths = sorted(set(request.lengths))
        if len(lengths) < 2:
            raise UsageError("lengths: longppl compares longer contexts with the shortest of lengths; give two or more")
        if not request.documents:
            return
        if max(map(len, request.documents)) <= lengths[0] + 1:
            raise UsageError(
                f"text: longppl needs documents of more than {lengths[0]:,} tokens, the shortest of lengths; the "
                f"longest has {max(map(len, request.documents)):,}"
            )
        tokenizer = self._key_model.tokenizer
        if any(
            tokenizer.encode_whole(text) != list(ids)
            for text, ids in zip(request.texts, request.documents, strict=True)
        ):
            raise UsageError(
                f"tasks: longppl: the tokenizers of {model.name} and {self.source}, which finds the key tokens, encode "
                "the texts differently; compare models with the same tokenizer"
            )

    def num_tokens(self, request: Request) -> int:
        """Return the tokens of the long windows."""
        assert request.length is not None
        if request.length == min(request.lengths):
            return 1
        sizes = [len(ids) for ids in request.documents]
        return tokens_read(sizes, length=request.length, stride=request.stride or request.length)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Return measurements with one entry per document; see :data:`~ropepp_lit.eval.report.captions.TASKS`."""
        assert request.length is not None
        length, documents = request.length, request.documents
        measurement = partial(self.measurement, request, sample=sample_of(map(list, documents)))
        if length == min(request.lengths):  # no token has more context
            zeros = [0.0] * len(documents)
            return [measurement(metric="loss", numerators=zeros, denominators=zeros)]
        gains, losses = self._contrast(model, request)
        counts, before = self._counted(request)
        keys = self._key_tokens(model, request, gains, losses)
        nats = _sums(losses, keys)
        num_keys, num_tokens = ([float(mask.sum()) for mask in masks] for masks in (keys, counts))
        gain = partial(measurement, metric="gain", higher_is_better=True)
        measurements = [
            measurement(metric="perplexity", numerators=nats, denominators=num_keys),
            measurement(metric="loss", numerators=nats, denominators=num_keys),
            measurement(metric="key_tokens", numerators=num_keys, denominators=num_tokens),
            gain(numerators=_sums(gains, counts), denominators=num_tokens),
        ]
        ranges = [(positions - 1) * RANGES // length for positions in before]
        for number in range(RANGES):
            masks = [counted & (index == number) for counted, index in zip(counts, ranges, strict=True)]
            if any(map(np.any, masks)):
                denominators = [float(mask.sum()) for mask in masks]
                position = -(-number * length // RANGES)
                measurements.append(gain(position=position, numerators=_sums(gains, masks), denominators=denominators))
        return measurements

    def _contrast(self, model: Model, request: Request) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return each token's gain by the long context and its loss with the long context, in nats, by document."""
        assert request.length is not None
        short, length = min(request.lengths), request.length
        read = partial(token_losses, model, request.documents, chunk_tokens=request.chunk_tokens)
        if self._short[0] != model.fingerprint:  # the same for all lengths
            self._short = model.fingerprint, read(length=short, stride=max(1, short // SHORT_STRIDE))
        losses = read(length=length, stride=request.stride or length, progress=request.progress)
        return [short_loss - loss for short_loss, loss in zip(self._short[1], losses, strict=True)], losses

    def _counted(self, request: Request) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return which tokens have more context than the short one (bool), and their context sizes, by document."""
        assert request.length is not None
        sizes = [len(ids) for ids in request.documents]
        before = tokens_before(sizes, length=request.length, stride=request.stride or request.length)
        return [positions > min(request.lengths) for positions in before], before

    def _key_tokens(
        self, model: Model, request: Request, gains: list[np.ndarray], losses: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Return which tokens of each document are key tokens at the request's length (bool)."""
        assert request.length is not None
        if request.length in self._keys:
            return self._keys[request.length]
        if model.fingerprint == self._key_model.fingerprint:
            self._find_keys(request, gains, losses)
        else:  # for all lengths, so that the model is loaded once
            short, key_model = self._short, self._load(self.source)
            if key_model.fingerprint != self._key_model.fingerprint:
                raise UsageError(f"{key_model.path}: was changed after the evaluation began; run the command again")
            for length in sorted(set(request.lengths) - {min(request.lengths)} - set(self._keys)):
                at_length = _at_length(request, length)
                self._find_keys(at_length, *self._contrast(key_model, at_length))
            self._short = short
        return self._keys[request.length]

    def _find_keys(self, request: Request, gains: list[np.ndarray], losses: list[np.ndarray]) -> None:
        assert request.length is not None
        counts, _ = self._counted(request)
        keys = [
            counted & (gain > MIN_GAIN) & (loss < MAX_LOSS)
            for counted, gain, loss in zip(counts, gains, losses, strict=True)
        ]
        self._keys[request.length] = keys
        if (num_keys := sum(int(key.sum()) for key in keys)) < FEW_KEY_TOKENS:
            tqdm.write(
                f"longppl: {self.source} finds {num_keys or 'no'} key token{'s' * (num_keys != 1)} among "
                f"{sum(int(mask.sum()) for mask in counts):,} at {request.length:,} tokens"
                f"{'' if num_keys else ', so longppl has no value'}"
            )


def _at_length(request: Request, length: int) -> Request:
    """Return the request at another length, without a progress callback."""
    return dataclasses.replace(request, length=length, progress=lambda tokens: None)


def _sums(values: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[float]:
    return [float(array[mask].sum()) for array, mask in zip(values, masks, strict=True)]
