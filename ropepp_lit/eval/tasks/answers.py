"""Answers of a model to held-out prompts, compared with the expected answers of a file.

Rows have the format of `ropepp-lit prepare --format chat` or `completion`: the last answer of a conversation is the
expected one, and everything before it is the prompt. Each model renders them with its own chat template and tokenizer,
so the answers of models with different tokenizers are comparable, but their losses per token are not.

| metric    | value                                                                                                  |
|-----------|--------------------------------------------------------------------------------------------------------|
| `loss`    | nats per token of the expected answers and their end tokens, given the prompts                         |
| `exact`   | % of the generated answers (greedy, stripped of surrounding whitespace) that equal the expected ones    |
| `rouge_l` | 100 × the F-measure of the longest common subsequence of words (ROUGE-L, torchmetrics, without stemming) |
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torchmetrics.functional.text.rouge import rouge_score

from ropepp_lit.data.encoders import Format, TextEncoder, make_encoder
from ropepp_lit.data.trained_tokens import is_trained, token_ids
from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import MAX_BATCH_TOKENS, Model
from ropepp_lit.eval.results import Measurement, sample_of
from ropepp_lit.eval.tasks.base import MAX_PROMPT_CHARACTERS, Answer, Request, Task
from ropepp_lit.eval.tasks.perplexity import read
from ropepp_lit.nn.generation import Batch
from ropepp_lit.nn.loss import IGNORE_INDEX
from ropepp_lit.text.conversations import CHAT_COLUMNS
from ropepp_lit.text.sources import Reader, find_files, identify

SPARE_TOKENS = 8
"""An answer may have up to twice the tokens of the expected one plus this number."""


class Pair(NamedTuple):
    """Token ids of a prompt and its expected answer."""

    prompt: list[int]
    answer: list[int]
    """Token ids of the answer, with its end tokens."""


def read_pairs(model: Model, source: str, *, limit: int) -> list[Pair]:
    """Read the prompts and answers of a file and tokenize them for a model; rows are selected by their hash.

    Args:
        model: Model whose tokenizer and chat template are used.
        source: Files or folders of rows, see :func:`~ropepp_lit.text.sources.find_files`.
        limit: Maximum number of pairs; those whose rows have the smallest hashes.

    Raises:
        UsageError: There are no rows, a row has no prompt and answer, or the model's tokenizer has no chat template.
    """
    records = []
    for _, record in Reader(find_files([source], key="tasks"), columns=CHAT_COLUMNS):
        if record.row is None:
            remedy = (
                "use the columns prompt and completion, or messages" if "text_key" in record.remedy else record.remedy
            )
            raise UsageError(f"tasks: answers: {record.where}: {record.problem}; {remedy}")
        records.append(record)
    if not records:
        raise UsageError(f"tasks: answers: {source}: no rows; name files of prompts and answers")
    records.sort(key=lambda record: hashlib.sha256(repr(record.row).encode("utf-8", "surrogatepass")).digest())
    records = records[:limit]
    kinds: list[Format] = [
        "completion" if isinstance((record.row or {}).get("prompt"), str) else "chat" for record in records
    ]
    encoders = {kind: _encoder(model, kind) for kind in dict.fromkeys(kinds)}
    pairs = []
    for record, kind in zip(records, kinds, strict=True):
        encoder = encoders[kind]
        rendered = encoder.render(record)
        if rendered.text is None:
            raise UsageError(f"tasks: answers: {rendered.where}: {rendered.problem}; {rendered.remedy}")
        (stored,) = encoder.encode([rendered])
        positions = is_trained(stored).nonzero()[0]
        if len(positions) == 0 or positions[0] == 0:
            raise UsageError(f"tasks: answers: {rendered.where}: no prompt before an answer; leave the row out")
        ids = token_ids(stored).tolist()
        pairs.append(Pair(ids[: positions[0]], ids[positions[0] : positions[-1] + 1]))
    return pairs


def _encoder(model: Model, kind: Format) -> TextEncoder:
    return make_encoder(
        kind, model.tokenizer, text_key="text", special_tokens=False, template=None,
        train_on="last" if kind == "chat" else "assistant",
    )  # fmt: skip


class Answers(Task):
    """Loss of the expected answers of a file, and similarity of the generated answers to them.

    Args:
        file: Files or folders, see :func:`read_pairs`.
    """

    task = "answers"
    has_length = False

    def __init__(self, file: str) -> None:
        self.part = file

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError if the rows are not prompts and answers."""
        read_pairs(model, self.part, limit=request.limit)

    def identity(self, request: Request) -> dict[str, Any]:
        """Return the digest of the file."""
        return {"file": identify(find_files([self.part], key="tasks"))}

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Measure loss, exact matches and ROUGE-L."""
        pairs = read_pairs(model, self.part, limit=request.limit)
        nats, exact, rouge = ([0.0] * len(pairs) for _ in range(3))
        expected = [model.tokenizer.decode(pair.answer).strip() for pair in pairs]
        written = [""] * len(pairs)
        for numbers in _batches(pairs):
            batch = [pairs[number] for number in numbers]
            for number, loss, text in zip(numbers, _losses(model, batch), generate_answers(model, batch), strict=True):
                nats[number], written[number] = loss, text
                exact[number], rouge[number] = score(text, expected[number])
        request.answers.extend(
            Answer.truncated(
                number=number, prompt=model.tokenizer.decode(pair.prompt[-MAX_PROMPT_CHARACTERS:]),
                expected=expected[number], written=written[number], score=rouge[number],
            )
            for number, pair in enumerate(pairs)
        )  # fmt: skip
        tokens = [float(len(pair.answer)) for pair in pairs]
        score_measurement = partial(
            self.measurement, request, denominators=[1.0] * len(pairs), sample=sample_of(expected), aggregation="score"
        )
        return [
            self.measurement(request, metric="loss", numerators=nats, denominators=tokens, sample=sample_of(pairs)),
            score_measurement(metric="exact", numerators=exact),
            score_measurement(metric="rouge_l", numerators=rouge),
        ]


def score(written: str, expected: str) -> tuple[float, float]:
    """Return whether an answer equals the expected one (1 or 0), and the F-measure of ROUGE-L, from 0 to 1."""
    rouge = rouge_score(written, expected, rouge_keys="rougeL")
    return float(written.strip() == expected.strip()), float(rouge["rougeL_fmeasure"])


def _batches(pairs: list[Pair]) -> Iterator[list[int]]:
    """Yield the indices of the pairs of each batch, sorted by length."""
    order = sorted(range(len(pairs)), key=lambda number: len(pairs[number].prompt) + 2 * len(pairs[number].answer))
    batch: list[int] = []
    for number in order:
        longest = len(pairs[number].prompt) + 2 * len(pairs[number].answer) + SPARE_TOKENS
        if batch and longest * (len(batch) + 1) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@torch.no_grad()
def _losses(model: Model, pairs: list[Pair]) -> list[float]:
    """Return the loss of each expected answer in nats, summed over its tokens."""
    longest = max(len(pair.prompt) + len(pair.answer) for pair in pairs) - 1
    input_ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, pair in enumerate(pairs):
        ids = torch.tensor([*pair.prompt, *pair.answer])
        input_ids[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(pair.prompt) - 1 : len(ids) - 1] = ids[len(pair.prompt) :]
    losses = read(model, input_ids.to(model.device), labels.to(model.device))
    return losses.double().sum(1).tolist()


def generate_answers(model: Model, pairs: list[Pair]) -> list[str]:
    """Generate answers to prompts by greedy decoding, stripped of surrounding whitespace.

    An answer ends at a token that ends a turn or a document, or after twice the tokens of the expected answer plus
    :data:`SPARE_TOKENS`.
    """
    stops = model.tokenizer.stop_token_ids
    max_tokens = [2 * len(pair.answer) + SPARE_TOKENS for pair in pairs]
    batch = Batch(model.decoder, [pair.prompt for pair in pairs], max_new_tokens=max(max_tokens))
    written: list[list[int]] = [[] for _ in pairs]
    while batch.numbers:
        for number, token in batch.step().items():
            written[number].append(token)
        batch.end([n for n in batch.numbers if written[n][-1] in stops or len(written[n]) == max_tokens[n]])
    return [
        model.tokenizer.decode(list(itertools.takewhile(lambda token: token not in stops, ids))).strip()
        for ids in written
    ]
