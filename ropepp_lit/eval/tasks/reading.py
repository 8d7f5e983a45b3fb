"""Associative recall and induction: tasks that predict many repeated words of a text in a single forward pass.

| task        | the text                                                     | predicted                             |
|-------------|--------------------------------------------------------------|---------------------------------------|
| `recall`    | pairs `key: value.` among sentences, and a query for each    | the value in `key? value.`            |
| `induction` | random words, with runs of them repeated at a distance       | the words of the run after its first  |

`recall` is multi-query associative recall (MQAR, "Zoology", arXiv 2312.04927) with words, `induction` the repeated
random sequence of Olsson et al. (arXiv 2209.11895). The predictions depend only on the preceding text: words and their
order are sampled for each text, from one vocabulary for evaluation and training. Distances are log-uniform, from a few
words to the full text, so each doubling of the distance has about the same number of predictions.
"""

from __future__ import annotations

import itertools
import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement, sample_of
from ropepp_lit.eval.tasks import stock
from ropepp_lit.eval.tasks.base import DEPTHS, Draft, Request, Task, batches
from ropepp_lit.eval.tasks.examples import MAX_SUGGESTED_LENGTH, fit
from ropepp_lit.nn.loss import rows_per_chunk
from ropepp_lit.text.tokenizer import TextTokenizer

PAIRS = (4, 16)
"""Default numbers of pairs of `recall`."""

KEYS, VALUES = stock.WORDS[::6], stock.WORDS[3::6]
"""Keys and values of `recall`; as in MQAR, they are disjoint."""

MAX_PAIRS = min(len(KEYS), len(VALUES))
RUN = 8
"""Words of a run of `induction`; all except the first are predicted."""

WORDS_PER_RUN = 4 * RUN
"""Words of an `induction` text per run; at most half of the text consists of runs and their copies."""

MAX_RUNS = 16


class Copy(NamedTuple):
    """A string and its repetition in a text."""

    first: str
    again: str
    """Repetition with the same number of characters; in `recall` the query."""

    words: list[tuple[int, int]]
    """Character spans (start:end) of the words that can be predicted in the repetition."""


class Row(NamedTuple):
    """A text of an exact number of tokens."""

    input_ids: list[int]
    words: list[tuple[int, int, int]]
    """Token span (start:end) of each word that can be predicted, and distance in tokens to its first occurrence."""


def recall_draft(rng: random.Random, *, pairs: int, units: int) -> tuple[Draft, list[Copy]]:
    """Create a draft of a `recall` text, with sentences as fillers.

    Args:
        rng: Source of all randomness of the text.
        pairs: Number of pairs, at most MAX_PAIRS.
        units: Approximate number of sentences.
    """
    copies = pairs_of(rng, pairs)
    return _place_copies(rng, copies, stock.sentences(rng), units=units + 2 * pairs), copies


def pairs_of(rng: random.Random, count: int) -> list[Copy]:
    """Create pairs of key and value, with their queries.

    Args:
        rng: Source of randomness.
        count: Number of pairs, at most MAX_PAIRS.
    """
    return [
        Copy(f"{key}: {value}.", f"{key}? {value}.", [(len(key) + 2, len(key) + 2 + len(value))])
        for key, value in zip(rng.sample(KEYS, count), rng.sample(VALUES, count), strict=True)
    ]


def induction_draft(rng: random.Random, *, units: int) -> tuple[Draft, list[Copy]]:
    """Create a draft of an `induction` text, with words as fillers.

    Args:
        rng: Source of all randomness of the text.
        units: Approximate number of filler words.
    """
    words = rng.sample(stock.WORDS, len(stock.WORDS))
    runs = max(1, min(MAX_RUNS, units // WORDS_PER_RUN))
    copied, others = words[: runs * RUN], words[runs * RUN :]
    copies = []
    for start in range(0, len(copied), RUN):
        run = copied[start : start + RUN]
        ends = list(itertools.accumulate(len(word) + 1 for word in run))
        spans = [(end, end + len(word)) for end, word in zip(ends, run[1:], strict=False)]
        copies.append(Copy(" ".join(run), " ".join(run), spans))
    # The words of runs do not occur elsewhere, so each word of a copy determines the next one.
    fillers = (rng.choice(others) for _ in itertools.count())
    return _place_copies(rng, copies, fillers, units=units // RUN + 2 * runs), copies


def _place_copies(rng: random.Random, copies: list[Copy], fillers: Iterator[str], *, units: int) -> Draft:
    """Create a draft with both parts of each copy, at a distance of 1 to `units` units; it ends with a repetition."""
    needles = []
    for number, copy in enumerate(copies):
        distance = 2 ** rng.uniform(-np.log2(max(2, units)), 0)
        first = 1 - distance if number == 0 else rng.uniform(0, 1 - distance)
        needles += [(first, copy.first), (first + distance, copy.again)]
    question = needles.pop(1)[1]
    return Draft(fillers, needles, question, answers=[])


class Reading(Task):
    """Base class of tasks that predict the repeated words of a text in a single forward pass."""

    takes_noise = True

    @abstractmethod
    def draft(self, rng: random.Random, *, units: int) -> tuple[Draft, list[Copy]]:
        """Create a draft of a text.

        Args:
            rng: Source of all randomness of the text.
            units: Approximate number of fillers.
        """

    def rows(self, tokenizer: TextTokenizer, *, length: int, numbers: Sequence[int], seed: int) -> list[Row]:
        """Create texts of `length` input tokens and one more token, which is only predicted.

        Args:
            tokenizer: Tokenizer of the model.
            length: Number of input tokens.
            numbers: Numbers of the texts; the same number is the same text.
            seed: Seed of the texts.

        Raises:
            UsageError: The length is too short, or the tokenizer maps different words to the same tokens.
        """
        words = {tuple(tokenizer.encode_text(f"a {word}.")) for word in stock.WORDS}
        if len(words) < len(stock.WORDS):
            raise UsageError(f"tasks: {self}: this tokenizer maps different words to the same tokens; leave it out")
        fitted = [self._fit(tokenizer, length, seed, number) for number in numbers]
        rows = [row for row in fitted if row is not None]
        if len(rows) == len(fitted):
            return rows
        sufficient = length
        while sufficient <= MAX_SUGGESTED_LENGTH and any(
            self._fit(tokenizer, sufficient, seed, number) is None for number in numbers
        ):
            sufficient += 1 + sufficient // 20
        raise UsageError(
            f"lengths: {length} tokens are too few for {self} with this tokenizer; give {sufficient} or more"
        )

    def _fit(self, tokenizer: TextTokenizer, length: int, seed: int, number: int) -> Row | None:
        copies: list[Copy] = []

        def make_draft(*, units: int) -> Draft:
            nonlocal copies
            rng = random.Random(f"{seed}/{self}/{number}")  # noqa: S311
            draft, copies = self.draft(rng, units=units)
            return draft

        num_tokens = length + 1 - len(tokenizer.opening)
        fitted = fit(make_draft, tokenizer, num_tokens=num_tokens, name=str(self), length=length)
        if fitted is None:
            return None
        starts, ends = np.array(tokenizer.offsets(fitted.text)).T
        shift = length + 1 - len(starts)  # from token indices of the text to those of the row

        def token_span(start: int, end: int) -> tuple[int, int]:
            """Return the span of the tokens that overlap a span of characters."""
            return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left"))

        words = []
        for copy in copies:
            first, again = fitted.text.index(copy.first), fitted.text.rindex(copy.again)
            for start, end in copy.words:
                first_token, _ = token_span(first + start, first + end)
                begin, stop = token_span(again + start, again + end)
                words.append((begin + shift, stop + shift, begin - first_token))
        return Row([*tokenizer.opening, *fitted.input_ids], words)

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError if the texts do not fit into the shortest length; they then fit into longer ones too."""
        shortest = min(request.lengths)
        numbers = range(request.limit if shortest <= 4096 else len(DEPTHS))
        self.rows(model.tokenizer, length=shortest, numbers=numbers, seed=request.seed)

    def num_tokens(self, request: Request) -> int:
        """Return the tokens of all texts."""
        return request.limit * (request.length or 0)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Measure the share of words whose tokens are all top-1 predictions, and the tokens' loss, also by distance."""
        assert request.length is not None
        ranges = request.length.bit_length()
        # Correct words, words, nats and tokens, by example and logarithm of the distance.
        sums = np.zeros((4, request.limit, ranges))
        samples = []
        for numbers in batches(request.limit, request.length):
            rows = self.rows(model.tokenizer, length=request.length, numbers=numbers, seed=request.seed)
            samples.append(sample_of(row.input_ids for row in rows))
            nats, correct = predict(model, rows, chunk_tokens=request.chunk_tokens)
            for number, row, losses, hits in zip(numbers, rows, nats, correct, strict=True):
                for start, end, distance in row.words:
                    values = (hits[start:end].all(), 1, losses[start:end].sum(), end - start)
                    sums[:, number, distance.bit_length() - 1] += values
            request.progress(len(rows) * request.length)
        correct_words, words, total_nats, tokens = sums
        measurement = partial(self.measurement, request, sample=sample_of(samples))
        metrics = (("score", correct_words, words), ("loss", total_nats, tokens))
        return [
            *(
                measurement(
                    metric=metric, numerators=numerators.sum(1).tolist(), denominators=denominators.sum(1).tolist()
                )
                for metric, numerators, denominators in metrics
            ),
            *(
                measurement(
                    metric=metric,
                    position=2**exponent,
                    numerators=numerators[:, exponent].tolist(),
                    denominators=denominators[:, exponent].tolist(),
                )
                for metric, numerators, denominators in metrics
                for exponent in range(ranges)
                if denominators[:, exponent].any()
            ),
        ]


class Recall(Reading):
    """Associative recall: the values of keys, queried at all distances.

    Args:
        pairs: Number of pairs of key and value.
    """

    task = "recall"

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.part = f"{pairs}"

    @property
    def about(self) -> str:
        """See :attr:`Task.about`."""
        return f"{self.pairs} pairs of key and value, each value predicted once"

    def draft(self, rng: random.Random, *, units: int) -> tuple[Draft, list[Copy]]:
        """See :func:`recall_draft`."""
        return recall_draft(rng, pairs=self.pairs, units=units)


class Induction(Reading):
    """Repeated runs of random words."""

    task = "induction"

    def draft(self, rng: random.Random, *, units: int) -> tuple[Draft, list[Copy]]:
        """See :func:`induction_draft`."""
        return induction_draft(rng, units=units)


def recalls(part: str) -> list[Reading]:
    """Return the tasks selected by `recall`, `recall:16` or `recall:4+64`.

    Args:
        part: Numbers of pairs, joined by plus signs; empty for the default ones.

    Raises:
        UsageError: A part is not a number of pairs.
    """
    if not part:
        return [Recall(pairs) for pairs in PAIRS]
    words = part.split("+")
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_PAIRS for word in words):
        raise UsageError(f"tasks: recall:{part}: give numbers of pairs from 1 to {MAX_PAIRS}, such as recall:4+16")
    return [Recall(int(word)) for word in words]


@torch.no_grad()
def predict(model: Model, rows: Sequence[Row], *, chunk_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of the predicted tokens, and whether each is the top-1 prediction.

    Args:
        model: The model.
        rows: Texts of one length.
        chunk_tokens: Maximum number of tokens of a row in one forward pass; None means all.

    Returns:
        Two arrays [rows, tokens]: nats and bool; 0 and False for tokens that are not evaluated.
    """
    ids = torch.tensor([row.input_ids for row in rows], device=model.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        for start, end, _ in row.words:
            mask[number, start:end] = True
    nats = torch.zeros(ids.shape, dtype=torch.float64)
    correct = torch.zeros(ids.shape, dtype=torch.bool)
    lm_head = model.decoder.lm_head
    indices = mask.nonzero()
    hidden = _hidden_states(model, ids[:, :-1], chunk_tokens)[indices[:, 0], indices[:, 1] - 1]
    size = rows_per_chunk(lm_head.weight.shape[0], hidden.device.type)
    labels = ids[mask]
    losses, hits = [], []
    for chunk, expected in zip(hidden.split(size), labels.split(size), strict=True):
        logits = lm_head(chunk).float()
        losses.append(F.cross_entropy(logits, expected, reduction="none"))
        hits.append(logits.argmax(dim=-1) == expected)
    nats[mask.cpu()] = torch.cat(losses).double().cpu()
    correct[mask.cpu()] = torch.cat(hits).cpu()
    return nats.numpy(), correct.numpy()


def _hidden_states(model: Model, input_ids: Tensor, chunk_tokens: int | None) -> Tensor:
    """Return the hidden states [B, T, hidden_size], computed in one forward pass or in chunks with a KV cache."""
    size = chunk_tokens or input_ids.shape[1]
    if size >= input_ids.shape[1]:
        return model.decoder.hidden_states(input_ids)
    cache = model.decoder.allocate_cache(batch_size=input_ids.shape[0], max_tokens=input_ids.shape[1])
    return torch.cat([model.decoder.hidden_states(part, cache=cache) for part in input_ids.split(size, dim=1)], dim=1)
