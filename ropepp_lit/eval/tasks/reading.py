"""Texts that are read once and predict a part of themselves many times: associative recall and induction.

| task        | the text                                                    | predicted                             |
|-------------|-------------------------------------------------------------|---------------------------------------|
| `recall`    | pairs `key: value.` among sentences, each pair twice        | the value, where the pair returns     |
| `induction` | random words, and at a distance some runs of them once more | the words of the run behind the first |

`recall` is multi-query associative recall (MQAR, "Zoology", arXiv 2312.04927) in words, `induction` the repeated random
sequence of Olsson et al. (arXiv 2209.11895). What is predicted follows from the text before it alone: words and their
order are drawn anew in each text, from one stock for tests and training. Logarithms of the distances are uniform, from
a few words to the whole text, so each doubling of the distance has about as many predictions.
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
from ropepp_lit.eval.tasks.examples import MAX_LEAST, fit
from ropepp_lit.nn.loss import rows_per_chunk
from ropepp_lit.text.tokenizer import TextTokenizer

PAIRS = (4, 16)
"""Of `recall`, where no number is named."""

MAX_PAIRS = len(stock.WORDS) // 2
RUN = 8
"""Words of a run of `induction`; all but the first are predicted."""

WORDS_PER_RUN = 4 * RUN
"""Of the text of `induction`: half of it is runs and their copies, at most."""

MAX_RUNS = 16


class Copy(NamedTuple):
    """What stands twice in a text."""

    text: str
    words: list[tuple[int, int]]
    """Characters of the words in it that can be predicted when it comes again."""


class Row(NamedTuple):
    """A text of an exact number of tokens."""

    input_ids: list[int]
    words: list[tuple[int, int, int]]
    """Of each word that can be predicted: first and last token (start:end), and distance in tokens to where it stood
    before.
    """


def recall_draft(rng: random.Random, *, pairs: int, units: int) -> tuple[Draft, list[Copy]]:
    """A text of `recall` without its length, filled by sentences.

    Args:
        rng: Decides the text.
        pairs: At most MAX_PAIRS.
        units: About how many sentences fill it.
    """
    words = rng.sample(stock.WORDS, 2 * pairs)
    copies = [
        Copy(f"{key}: {value}.", [(len(key) + 2, len(key) + 2 + len(value))])
        for key, value in zip(words[:pairs], words[pairs:], strict=True)
    ]
    return _place(rng, copies, stock.sentences(rng), units=units + 2 * pairs), copies


def induction_draft(rng: random.Random, *, units: int) -> tuple[Draft, list[Copy]]:
    """A text of `induction` without its length, filled by words.

    Args:
        rng: Decides the text.
        units: About how many words fill it.
    """
    words = rng.sample(stock.WORDS, len(stock.WORDS))
    runs = max(1, min(MAX_RUNS, units // WORDS_PER_RUN))
    copied, others = words[: runs * RUN], words[runs * RUN :]
    copies = []
    for start in range(0, len(copied), RUN):
        run = copied[start : start + RUN]
        ends = list(itertools.accumulate(len(word) + 1 for word in run))
        places = [(end, end + len(word)) for end, word in zip(ends, run[1:], strict=False)]
        copies.append(Copy(" ".join(run), places))
    # Words of runs occur in runs alone, so each word of a copy says which one follows.
    fillers = (rng.choice(others) for _ in itertools.count())
    return _place(rng, copies, fillers, units=units // RUN + 2 * runs), copies


def _place(rng: random.Random, copies: list[Copy], fillers: Iterator[str], *, units: int) -> Draft:
    """A draft with each copy twice, at a distance of 1 to `units` of as many units; it ends with one of them."""
    needles = []
    for number, copy in enumerate(copies):
        distance = 2 ** rng.uniform(-np.log2(max(2, units)), 0)
        first = 1 - distance if number == 0 else rng.uniform(0, 1 - distance)
        needles += [(first, copy.text), (first + distance, copy.text)]
    question = needles.pop(1)[1]
    return Draft(fillers, needles, question, answers=[])


class Reading(Task):
    """Texts whose words are predicted, all at once, where they come again."""

    takes_noise = True

    @abstractmethod
    def draft(self, rng: random.Random, *, units: int) -> tuple[Draft, list[Copy]]:
        """A text without its length.

        Args:
            rng: Decides the text.
            units: About how many fillers it will have.
        """

    def rows(self, tokenizer: TextTokenizer, *, length: int, numbers: Sequence[int], seed: int) -> list[Row]:
        """Texts of `length` tokens and one more, which is only predicted.

        Args:
            tokenizer: Of the model.
            length: Tokens that are read.
            numbers: Of the texts; the same number is the same text.
            seed: Of what they say.

        Raises:
            UsageError: the length is too short, or the tokenizer does not tell the words apart.
        """
        words = {tuple(tokenizer.encode_text(f"a {word}.")) for word in stock.WORDS}
        if len(words) < len(stock.WORDS):
            raise UsageError(f"tasks: {self}: this tokenizer does not tell the words apart; leave it out")
        found = [self._fit(tokenizer, length, seed, number) for number in numbers]
        rows = [row for row in found if row is not None]
        if len(rows) == len(found):
            return rows
        least = length
        while least <= MAX_LEAST and any(self._fit(tokenizer, least, seed, number) is None for number in numbers):
            least += 1 + least // 20
        raise UsageError(f"lengths: {length} tokens are too few for {self} with this tokenizer; give {least} or more")

    def _fit(self, tokenizer: TextTokenizer, length: int, seed: int, number: int) -> Row | None:
        copies: list[Copy] = []

        def draw(*, units: int) -> Draft:
            nonlocal copies
            rng = random.Random(f"{seed}/{self}/{number}")  # noqa: S311
            draft, copies = self.draft(rng, units=units)
            return draft

        room = length + 1 - len(tokenizer.opening)
        fitted = fit(draw, tokenizer, room=room, name=str(self), length=length)
        if fitted is None:
            return None
        starts, ends = np.array(tokenizer.offsets(fitted.text)).T
        shift = length + 1 - len(starts)  # from tokens of the text to those of the row

        def tokens(start: int, end: int) -> tuple[int, int]:
            """Tokens that hold a part of these characters."""
            return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left"))

        words = []
        for copy in copies:
            first, again = fitted.text.index(copy.text), fitted.text.rindex(copy.text)
            for start, end in copy.words:
                told, (begin, stop) = tokens(first + start, first + end), tokens(again + start, again + end)
                words.append((begin + shift, stop + shift, begin - told[0]))
        return Row([*tokenizer.opening, *fitted.input_ids], words)

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError where the texts do not fit into the least length: longer ones hold what it holds."""
        shortest = min(request.lengths)
        numbers = range(request.limit if shortest <= 4096 else len(DEPTHS))
        self.rows(model.tokenizer, length=shortest, numbers=numbers, seed=request.seed)

    def num_tokens(self, request: Request) -> int:
        """Of all texts."""
        return request.limit * (request.length or 0)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Share of the words whose tokens are all the most likely ones, and nats of their tokens; also by distance."""
        assert request.length is not None
        ranges = request.length.bit_length()
        # Right words, words, nats and tokens, by example and by logarithm of the distance.
        sums = np.zeros((4, request.limit, ranges))
        samples = []
        for numbers in batches(request.limit, request.length):
            rows = self.rows(model.tokenizer, length=request.length, numbers=numbers, seed=request.seed)
            samples.append(sample_of(row.input_ids for row in rows))
            nats, right = predict(model, rows, chunk_tokens=request.chunk_tokens)
            for number, row, losses, hits in zip(numbers, rows, nats, right, strict=True):
                for start, end, distance in row.words:
                    found = (hits[start:end].all(), 1, losses[start:end].sum(), end - start)
                    sums[:, number, distance.bit_length() - 1] += found
            request.progress(len(rows) * request.length)
        right_words, words, nats_of, tokens = sums
        measured = partial(self.measured, request, sample=sample_of(samples))
        kinds = (("score", right_words, words), ("loss", nats_of, tokens))
        return [
            *(
                measured(metric=metric, numerators=above.sum(1).tolist(), denominators=below.sum(1).tolist())
                for metric, above, below in kinds
            ),
            *(
                measured(
                    metric=metric,
                    position=2**place,
                    numerators=above[:, place].tolist(),
                    denominators=below[:, place].tolist(),
                )
                for metric, above, below in kinds
                for place in range(ranges)
                if below[:, place].any()
            ),
        ]


class Recall(Reading):
    """Values of keys, asked for at all distances.

    Args:
        pairs: Of keys and values.
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
    """Runs of random words that come again."""

    task = "induction"

    def draft(self, rng: random.Random, *, units: int) -> tuple[Draft, list[Copy]]:
        """See :func:`induction_draft`."""
        return induction_draft(rng, units=units)


def recalls(part: str) -> list[Reading]:
    """The tasks that `recall`, `recall:16` or `recall:4+64` name.

    Args:
        part: What stands behind the colon.

    Raises:
        UsageError: no number of pairs.
    """
    if not part:
        return [Recall(pairs) for pairs in PAIRS]
    words = part.split("+")
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_PAIRS for word in words):
        raise UsageError(f"tasks: recall:{part}: give numbers of pairs from 1 to {MAX_PAIRS}, such as recall:4+16")
    return [Recall(int(word)) for word in words]


@torch.no_grad()
def predict(model: Model, rows: Sequence[Row], *, chunk_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The loss of the predicted tokens, and whether each is the most likely one.

    Args:
        model: What predicts.
        rows: Texts of one length.
        chunk_tokens: Tokens of a row in one forward pass; None means all.

    Returns:
        Two arrays [rows, tokens]: nats and bool; 0 and False where nothing is predicted.
    """
    ids = torch.tensor([row.input_ids for row in rows], device=model.device)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        for start, end, _ in row.words:
            wanted[number, start:end] = True
    nats = torch.zeros(ids.shape, dtype=torch.float64)
    right = torch.zeros(ids.shape, dtype=torch.bool)
    output = model.decoder.lm_head
    places = wanted.nonzero()
    hidden = _states(model, ids[:, :-1], chunk_tokens)[places[:, 0], places[:, 1] - 1]
    size = rows_per_chunk(output.weight.shape[0], hidden.device.type)
    labels = ids[wanted]
    losses, hits = [], []
    for part, expected in zip(hidden.split(size), labels.split(size), strict=True):
        logits = output(part).float()
        losses.append(F.cross_entropy(logits, expected, reduction="none"))
        hits.append(logits.argmax(dim=-1) == expected)
    nats[wanted.cpu()] = torch.cat(losses).double().cpu()
    right[wanted.cpu()] = torch.cat(hits).cpu()
    return nats.numpy(), right.numpy()


def _states(model: Model, input_ids: Tensor, chunk_tokens: int | None) -> Tensor:
    """[B, T, hidden_size], read all at once or in chunks through the KV cache."""
    size = chunk_tokens or input_ids.shape[1]
    if size >= input_ids.shape[1]:
        return model.decoder.hidden_states(input_ids)
    cache = model.decoder.allocate_cache(batch_size=input_ids.shape[0], max_tokens=input_ids.shape[1])
    return torch.cat([model.decoder.hidden_states(part, cache=cache) for part in input_ids.split(size, dim=1)], dim=1)
