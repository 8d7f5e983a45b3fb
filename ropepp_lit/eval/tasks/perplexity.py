"""Loss by the length of the context, and by the position inside of it.

Each document is read whole, once for each length: in windows of so many tokens, one behind the other (`stride` is the
length) or overlapping. Every token behind the first is predicted once and counts once, in the first window that reaches
it, so all lengths are measured on the same tokens. The sum of the losses is divided by the number of tokens that were
predicted: a token that a later window only reads as context is in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import TOKENS_AT_ONCE, Model
from ropepp_lit.eval.results import Measurement, sample_of
from ropepp_lit.eval.tasks.base import Request, Task
from ropepp_lit.nn.loss import IGNORE_INDEX

RANGES = 16
"""Into which the positions of a window are divided."""


class Window(NamedTuple):
    """What a model reads at once: tokens[start:end], and predicts tokens[first:end + 1] behind them."""

    document: int
    start: int
    first: int
    end: int


def windows(num_tokens: list[int], *, length: int, stride: int) -> Iterator[Window]:
    """The windows of documents.

    Args:
        num_tokens: Of each document.
        length: Tokens of a window, the last of a document may have fewer.
        stride: From one window's start to the next's, at most the length.
    """
    for document, total in enumerate(num_tokens):
        first = 1
        for start in range(0, max(1, total - 1), stride):
            end = min(start + length, total - 1)
            if end >= first:
                yield Window(document, start, first, end)
            first = end + 1
            if end == total - 1:
                break


class Perplexity(Task):
    """Loss, perplexity and bits per byte of documents, and the loss by position."""

    task = "perplexity"
    needs_text = by_document = takes_noise = True

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError where no document has a token to predict."""
        if request.documents and max(map(len, request.documents)) < 2:
            raise UsageError(
                f"text: no document has two tokens, so {model.name} has nothing to predict; name other text"
            )

    def num_tokens(self, request: Request) -> int:
        """Of all windows."""
        assert request.length is not None
        sizes = [len(ids) for ids in request.documents]
        return tokens_read(sizes, length=request.length, stride=request.stride or request.length)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Measurements with one entry per document: nats over tokens (bytes for bits per byte)."""
        assert request.length is not None
        length, documents = request.length, request.documents
        stride = request.stride or length
        losses = np.zeros((len(documents), RANGES))
        counts = np.zeros((len(documents), RANGES))
        nats = token_losses(
            model, documents, length=length, stride=stride, chunk_tokens=request.chunk_tokens, progress=request.progress
        )
        before = tokens_before([len(ids) for ids in documents], length=length, stride=stride)
        for document, (values, places) in enumerate(zip(nats, before, strict=True)):
            ranges = (places - 1) * RANGES // length
            np.add.at(losses[document], ranges, values)
            np.add.at(counts[document], ranges, 1)
        totals, tokens = losses.sum(1).tolist(), counts.sum(1).tolist()
        sizes = [float(len(text.encode())) for text in request.texts]
        # Losses are by token, so models are compared where they read the same tokens; bits per byte, the same texts.
        measured = partial(self.measured, request, sample=sample_of(map(list, documents)))
        return [
            measured(metric="loss", numerators=totals, denominators=tokens),
            measured(metric="perplexity", numerators=totals, denominators=tokens),
            measured(metric="bits_per_byte", numerators=totals, denominators=sizes, sample=sample_of(request.texts)),
            *(
                measured(
                    metric="loss",
                    position=-(-number * length // RANGES),
                    numerators=losses[:, number].tolist(),
                    denominators=counts[:, number].tolist(),
                )
                for number in range(RANGES)
                if counts[:, number].any()
            ),
        ]


def more_context(num_tokens: Sequence[int], *, length: int, before: int, stride: int | None = None) -> Measurement:
    """The share of the predicted tokens that have more to read in windows of one length than of another.

    Args:
        num_tokens: Of each document.
        length: Tokens of a window.
        before: Tokens of the shorter windows.
        stride: See :func:`windows`; empty means the lengths.
    """
    longer, shorter = (tokens_before(num_tokens, length=size, stride=stride or size) for size in (length, before))
    return Measurement(
        task="perplexity",
        metric="more_context",
        length=length,
        numerators=[float((a > b).sum()) for a, b in zip(longer, shorter, strict=True)],
        denominators=[float(len(a)) for a in longer],
        sample=sample_of(num_tokens),
    )


def tokens_before(num_tokens: Sequence[int], *, length: int, stride: int) -> list[np.ndarray]:
    """For each document, how many tokens each of its predicted tokens has before it in its window.

    Args:
        num_tokens: Of each document.
        length: See :func:`windows`.
        stride: See :func:`windows`.
    """
    found = [np.zeros(max(0, total - 1), dtype=np.int64) for total in num_tokens]
    for window in windows(list(num_tokens), length=length, stride=stride):
        places = np.arange(window.first, window.end + 1)
        found[window.document][places - 1] = places - window.start
    return found


def tokens_read(num_tokens: Sequence[int], *, length: int, stride: int) -> int:
    """Tokens of all windows of documents; arguments are those of :func:`windows`."""
    return sum(window.end - window.start for window in windows(list(num_tokens), length=length, stride=stride))


def token_losses(
    model: Model,
    documents: Sequence[Sequence[int]],
    *,
    length: int,
    stride: int,
    chunk_tokens: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[np.ndarray]:
    """For each document, the nats of each of its tokens behind the first, read in windows.

    Args:
        model: What predicts.
        documents: Token ids.
        length: See :func:`windows`.
        stride: See :func:`windows`.
        chunk_tokens: See :func:`read`.
        progress: Called with the number of tokens read.
    """
    sizes = [len(ids) for ids in documents]
    nats = [np.zeros(max(0, total - 1)) for total in sizes]
    for batch in _batches(windows(sizes, length=length, stride=stride)):
        found = _losses(model, documents, batch, chunk_tokens).double().cpu().numpy()
        for window, row in zip(batch, found, strict=True):
            first = window.first - 1
            nats[window.document][first : window.end] = row[first - window.start : window.end - window.start]
        progress(sum(window.end - window.start for window in batch))
    return nats


def _batches(several: Iterator[Window]) -> Iterator[list[Window]]:
    """As many windows as may be read at once, padded to the longest."""
    batch: list[Window] = []
    for window in several:
        longest = max((other.end - other.start for other in [*batch, window]), default=0)
        if batch and longest * (len(batch) + 1) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.no_grad()  # not in inference mode, whose tensors FSDP2 would reuse in training
def _losses(model: Model, documents: Sequence[Sequence[int]], batch: list[Window], chunk_tokens: int | None) -> Tensor:
    """[windows, tokens] nats; 0 where a token was predicted before or the window has ended."""
    longest = max(window.end - window.start for window in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, window in enumerate(batch):
        ids = documents[window.document]
        input_ids[row, : window.end - window.start] = torch.tensor(ids[window.start : window.end])
        predicted = slice(window.first - window.start - 1, window.end - window.start)
        labels[row, predicted] = torch.tensor(ids[window.first : window.end + 1])
    input_ids, labels = input_ids.to(model.device), labels.to(model.device)
    return read(model, input_ids, labels, chunk_tokens=chunk_tokens)


def read(model: Model, input_ids: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """The loss of each token, all read at once or in chunks through the KV cache.

    Args:
        model: What predicts.
        input_ids: [B, T].
        labels: [B, T], shifted; -100 does not count.
        chunk_tokens: Tokens of a row in one forward pass; empty means all.

    Returns:
        [B, T] nats.
    """
    size = chunk_tokens or input_ids.shape[1]
    if size >= input_ids.shape[1]:
        return model.decoder.loss(input_ids, labels, reduction="none")
    cache = model.decoder.allocate_cache(batch_size=input_ids.shape[0], max_tokens=input_ids.shape[1])
    parts = zip(input_ids.split(size, dim=1), labels.split(size, dim=1), strict=True)
    return torch.cat([model.decoder.loss(ids, wanted, reduction="none", cache=cache) for ids, wanted in parts], dim=1)
