"""LongPPL (arXiv 2410.23771): perplexity over the tokens that need a long context.

A model finds these key tokens by the contrast of two contexts: with l the tokens of the window and s a short context,

    LSD(x) = log p(x | l) - log p(x | s) > 2   and   log p(x | l) > -2        (the paper's α and β)

Every model is measured on the same key tokens, those of the first model or of one that the task names. The long context
is the window of perplexity, so many tokens as its length. The short one is the shortest of the lengths: windows of it
start every fourth part of it, so a token has between three fourths and all of it before it (the paper's code: 4,096 to
5,119 tokens, windows starting every 1,024). Tokens count that have more before them in the long window.
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
"""In nats: what the long context must give a key token at least, and what it may cost with it at most."""

SHORT_STRIDE = 4
"""Windows of the short context start every fourth part of it."""

FEW = 100
"""With fewer key tokens a line says so."""


class LongPerplexity(Task):
    """Perplexity over key tokens, their share, and what the long context gives to all tokens, also by position.

    Args:
        source: The checkpoint that finds the key tokens.
        part: As the task names it; empty where it names none.
        load: Loads it, or with `weights=False` all but its weights.
    """

    task = "longppl"
    needs_text = by_document = True

    def __init__(self, source: str, part: str, *, load: Callable[..., Model]) -> None:
        self.source, self.part, self._load = source, part, load
        self._keys: dict[int, list[np.ndarray]] = {}  # by length
        self._short: tuple[str, list[np.ndarray]] = ("", [])  # of the model that was read last

    @cached_property
    def _key_model(self) -> Model:
        """Without weights."""
        return self._load(self.source, weights=False)

    def identity(self, request: Request) -> dict[str, Any]:
        """The model that finds the key tokens, and the short context."""
        return {"key_model": self._key_model.fingerprint, "short": min(request.lengths)}

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError where no token has a longer context, or the models do not read the same tokens."""
        lengths = sorted(set(request.lengths))
        if len(lengths) < 2:
            raise UsageError("lengths: longppl compares longer contexts with the shortest of lengths; give two or more")
        if not request.documents:
            return
        if max(map(len, request.documents)) <= lengths[0] + 1:
            raise UsageError(
                f"text: longppl needs documents of more than {lengths[0]:,} tokens, the shortest of lengths, and the "
                f"longest has {max(map(len, request.documents)):,}"
            )
        tokenizer = self._key_model.tokenizer
        if any(
            tokenizer.encode_whole(text) != list(ids)
            for text, ids in zip(request.texts, request.documents, strict=True)
        ):
            raise UsageError(
                f"tasks: longppl: {model.name} and {self.source}, which finds the key tokens, read the texts as "
                "different tokens; compare models of one tokenizer"
            )

    def num_tokens(self, request: Request) -> int:
        """Of the long windows."""
        assert request.length is not None
        if request.length == min(request.lengths):
            return 1
        sizes = [len(ids) for ids in request.documents]
        return tokens_read(sizes, length=request.length, stride=request.stride or request.length)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Measurements with one entry per document: nats over tokens, and key tokens over all that count."""
        assert request.length is not None
        length, documents = request.length, request.documents
        measured = partial(self.measured, request, sample=sample_of(map(list, documents)))
        if length == min(request.lengths):  # no token has more to read
            nothing = [0.0] * len(documents)
            return [measured(metric="loss", numerators=nothing, denominators=nothing)]
        gains, losses = self._contrast(model, request)
        counts, places = self._places(request)
        keys = self._key_tokens(model, request, gains, losses)
        nats = _sums(losses, keys)
        num_keys, num_tokens = ([float(each.sum()) for each in some] for some in (keys, counts))
        found = [
            measured(metric="perplexity", numerators=nats, denominators=num_keys),
            measured(metric="loss", numerators=nats, denominators=num_keys),
            measured(metric="key_tokens", numerators=num_keys, denominators=num_tokens),
            measured(metric="gain", numerators=_sums(gains, counts), denominators=num_tokens, higher_is_better=True),
        ]
        ranges = [(place - 1) * RANGES // length for place in places]
        for number in range(RANGES):
            here = [inside & (each == number) for inside, each in zip(counts, ranges, strict=True)]
            if any(map(np.any, here)):
                found.append(
                    measured(
                        metric="gain", position=-(-number * length // RANGES), numerators=_sums(gains, here),
                        denominators=[float(each.sum()) for each in here], higher_is_better=True,
                    )
                )  # fmt: skip
        return found

    def _contrast(self, model: Model, request: Request) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each document, what the long context gives to each token in nats, and its loss with it."""
        assert request.length is not None
        short, length = min(request.lengths), request.length
        read = partial(token_losses, model, request.documents, chunk_tokens=request.chunk_tokens)
        if self._short[0] != model.fingerprint:  # the same for all lengths
            self._short = model.fingerprint, read(length=short, stride=max(1, short // SHORT_STRIDE))
        losses = read(length=length, stride=request.stride or length, progress=request.progress)
        return [less - more for less, more in zip(self._short[1], losses, strict=True)], losses

    def _places(self, request: Request) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each document, which tokens have more before them than the short context, and how many they have."""
        assert request.length is not None
        sizes = [len(ids) for ids in request.documents]
        places = tokens_before(sizes, length=request.length, stride=request.stride or request.length)
        return [place > min(request.lengths) for place in places], places

    def _key_tokens(
        self, model: Model, request: Request, gains: list[np.ndarray], losses: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Which tokens of each document are key tokens at the request's length."""
        assert request.length is not None
        if request.length in self._keys:
            return self._keys[request.length]
        if model.fingerprint == self._key_model.fingerprint:
            self._find(request, gains, losses)
        else:  # for all lengths, as the model is loaded
            short, key_model = self._short, self._load(self.source)
            if key_model.fingerprint != self._key_model.fingerprint:
                raise UsageError(f"{key_model.path}: was changed after the evaluation began; run the command again")
            for length in sorted(set(request.lengths) - {min(request.lengths)} - set(self._keys)):
                each = _at(request, length)
                self._find(each, *self._contrast(key_model, each))
            self._short = short
        return self._keys[request.length]

    def _find(self, request: Request, gains: list[np.ndarray], losses: list[np.ndarray]) -> None:
        assert request.length is not None
        counts, _ = self._places(request)
        keys = [
            inside & (gain > MIN_GAIN) & (loss < MAX_LOSS)
            for inside, gain, loss in zip(counts, gains, losses, strict=True)
        ]
        self._keys[request.length] = keys
        if (found := sum(int(key.sum()) for key in keys)) < FEW:
            tqdm.write(
                f"longppl: {self.source} finds {found or 'no'} key token{'s' * (found != 1)} among "
                f"{sum(int(inside.sum()) for inside in counts):,} at {request.length:,} tokens"
                f"{'' if found else ', so there is no longppl'}"
            )


def _at(request: Request, length: int) -> Request:
    """The request at another length, without its progress."""
    return dataclasses.replace(request, length=length, progress=lambda tokens: None)


def _sums(values: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> list[float]:
    return [float(each[inside].sum()) for each, inside in zip(values, counts, strict=True)]
