"""Loss by context length, and by position in the context.

Each document is evaluated completely at each length, in windows of `length` tokens that are adjacent (`stride` equals
the length) or overlap. Every token except the first is predicted and counted exactly once, in the first window that
reaches it, so all lengths are measured on the same tokens. The sum of the losses is divided by the number of predicted
tokens; tokens that a later window reads only as context are not counted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import MAX_BATCH_TOKENS, Model
from ropepp_lit.eval.results import Measurement, sample_of
from ropepp_lit.eval.tasks.base import Request, Task
from ropepp_lit.nn.loss import IGNORE_INDEX

RANGES = 16
"""Number of ranges into which the positions of a window are divided."""


class Window(NamedTuple):
    """Window with the inputs tokens[start:end] and the predicted tokens[first:end + 1]."""

    document: int
    start: int
    first: int
    end: int


def windows(num_tokens: list[int], *, length: int, stride: int) -> Iterator[Window]:
    """Yield the windows of documents.

    Args:
        num_tokens: Number of tokens of each document.
        length: Tokens of a window; the last window of a document may have fewer.
        stride: Tokens between the starts of consecutive windows, at most the length.
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
    """Loss, perplexity and bits per byte of documents, and loss by position."""

    task = "perplexity"
    needs_text = by_document = takes_noise = True

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError if no document has a token to predict."""
        if request.documents and max(map(len, request.documents)) < 2:
            raise UsageError(
                f"text: no document has two tokens, so {model.name} has nothing to predict; name other text"
            )

    def num_tokens(self, request: Request) -> int:
        """Return the tokens of all windows."""
        assert request.length is not None
        sizes = [len(ids) for ids in request.documents]
        return tokens_read(sizes, length=request.length, stride=request.stride or request.length)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Return measurements with one entry per document: nats over tokens (over bytes for bits per byte)."""
        assert request.length is not None
        length, documents = request.length, request.documents
        stride = request.stride or length
        losses = np.zeros((len(documents), RANGES))
        counts = np.zeros((len(documents), RANGES))
        nats = token_losses(
            model, documents, length=length, stride=stride, chunk_tokens=request.chunk_tokens, progress=request.progress
        )
        before = tokens_before([len(ids) for ids in documents], length=length, stride=stride)
        for document, (values, positions) in enumerate(zip(nats, before, strict=True)):
            ranges = (positions - 1) * RANGES // length
            np.add.at(losses[document], ranges, values)
            np.add.at(counts[document], ranges, 1)
        totals, tokens = losses.sum(1).tolist(), counts.sum(1).tolist()
        sizes = [float(len(text.encode())) for text in request.texts]
        # Losses are by token, so models are compared where they read the same tokens; bits per byte, the same texts.
        measurement = partial(self.measurement, request, sample=sample_of(map(list, documents)))
        return [
            measurement(metric="loss", numerators=totals, denominators=tokens),
            measurement(metric="perplexity", numerators=totals, denominators=tokens),
            measurement(metric="bits_per_byte", numerators=totals, denominators=sizes, sample=sample_of(request.texts)),
            *(
                measurement(
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
    """Measure the share of the predicted tokens that have more context in windows of one length than of another.

    Args:
        num_tokens: Number of tokens of each document.
        length: Tokens of a window.
        before: Tokens of the shorter windows.
        stride: See :func:`windows`; None uses each length as its stride.
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
    """Return the context size of each predicted token: the number of tokens before it in its window, by document.

    Args:
        num_tokens: Number of tokens of each document.
        length: See :func:`windows`.
        stride: See :func:`windows`.
    """
    before = [np.zeros(max(0, total - 1), dtype=np.int64) for total in num_tokens]
    for window in windows(list(num_tokens), length=length, stride=stride):
        positions = np.arange(window.first, window.end + 1)
        before[window.document][positions - 1] = positions - window.start
    return before


def tokens_read(num_tokens: Sequence[int], *, length: int, stride: int) -> int:
    """Return the number of input tokens of all windows; see :func:`windows` for the arguments."""
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
    """Return the loss in nats of each token after the first, by document, computed in windows.

    Args:
        model: The model.
        documents: Token ids of the documents.
        length: See :func:`windows`.
        stride: See :func:`windows`.
        chunk_tokens: See :func:`read`.
        progress: Called with the number of tokens read.
    """
    sizes = [len(ids) for ids in documents]
    nats = [np.zeros(max(0, total - 1)) for total in sizes]
    for batch in _batches(windows(sizes, length=length, stride=stride)):
        losses = _losses(model, documents, batch, chunk_tokens).double().cpu().numpy()
        for window, row in zip(batch, losses, strict=True):
            first = window.first - 1
            nats[window.document][first : window.end] = row[first - window.start : window.end - window.start]
        progress(sum(window.end - window.start for window in batch))
    return nats


def _batches(all_windows: Iterator[Window]) -> Iterator[list[Window]]:
    """Yield batches with up to MAX_BATCH_TOKENS tokens, including padding to the longest window."""
    batch: list[Window] = []
    for window in all_windows:
        longest = max((other.end - other.start for other in [*batch, window]), default=0)
        if batch and longest * (len(batch) + 1) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.no_grad()  # not in inference mode, whose tensors FSDP2 would reuse in training
def _losses(model: Model, documents: Sequence[Sequence[int]], batch: list[Window], chunk_tokens: int | None) -> Tensor:
    """Return losses in nats, [windows, tokens]; 0 for tokens predicted in an earlier window, and for padding."""
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
    """Return the loss of each token, computed in one forward pass or in chunks with a KV cache.

    Args:
        model: The model.
        input_ids: Token ids, [B, T].
        labels: Shifted labels, [B, T]; -100 is ignored.
        chunk_tokens: Maximum number of tokens of a row in one forward pass; None means all.

    Returns:
        Losses in nats, [B, T].
    """
    size = chunk_tokens or input_ids.shape[1]
    if size >= input_ids.shape[1]:
        return model.decoder.loss(input_ids, labels, reduction="none")
    cache = model.decoder.allocate_cache(batch_size=input_ids.shape[0], max_tokens=input_ids.shape[1])
    chunks = zip(input_ids.split(size, dim=1), labels.split(size, dim=1), strict=True)
    return torch.cat([model.decoder.loss(ids, target, reduction="none", cache=cache) for ids, target in chunks], dim=1)
