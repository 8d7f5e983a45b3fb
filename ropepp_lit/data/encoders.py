"""From records to tokens: texts, conversations, or prompts with completions; in order, on all cores."""

from __future__ import annotations

import datetime
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ropepp_lit.data.trained_tokens import mark
from ropepp_lit.errors import UsageError
from ropepp_lit.text.chat import ChatTemplate, ChatTemplateError
from ropepp_lit.text.conversations import CHAT_COLUMNS, COMPLETION_COLUMNS, RowError, completion_of, conversation_of
from ropepp_lit.text.formats import Record
from ropepp_lit.text.sources import Cursor, Reader
from ropepp_lit.text.tokenizer import TextTokenizer
from ropepp_lit.text.trained_spans import Span, SpanTokenizer

FORMATS = ("text", "chat", "completion")

BATCH_BYTES = 2**19
"""Bytes of text that are tokenized at once."""

PENDING_BYTES = 8 * 2**20
"""Bytes of text per core that are tokenized at the same time at most, but for one document."""


class TextEncoder:
    """Whole documents, all of whose tokens are trained.

    Args:
        tokenizer: Of the texts.
    """

    columns: tuple[str, ...] = ()
    """Keys or columns of the rows to read; none where texts are read."""
    marks_trained_tokens = False
    chat_template: str | None = None
    end_of_turn: Sequence[int] = ()
    identity: dict[str, Any] = {}  # noqa: RUF012 (read alone)
    """What the tokens depend on beside the settings and the tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def render(self, record: Record) -> Record:
        """The record with its text, or why it has none."""
        return record

    def encode(self, records: Sequence[Record]) -> list[np.ndarray]:
        """The tokens of records that have a text, each as they are stored: [tokens] int32."""
        return self.tokenizer.encode([str(record.text) for record in records])


class _RowEncoder(TextEncoder):
    """Rows that become texts of which spans are trained."""

    marks_trained_tokens = True
    _tokens: SpanTokenizer
    _around: tuple[Sequence[int], Sequence[int]] = ((), ())
    """Tokens before a text, and those behind it, which are trained."""

    def render(self, record: Record) -> Record:
        if record.row is None:
            return record
        try:
            text, spans, notices = self._render(record.row)
            text.encode("utf-8")
        except (RowError, ChatTemplateError) as error:
            return Record(None, str(error), record.where)
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            return Record(None, "not UTF-8", record.where)
        return Record(text, None, record.where, spans=spans, notices=notices)

    def encode(self, records: Sequence[Record]) -> list[np.ndarray]:
        before, behind = (np.asarray(ids, dtype=np.int32) for ids in self._around)
        encoded = self._tokens.encode(
            [str(record.text) for record in records], [record.spans or [] for record in records]
        )
        stored = []
        for ids, is_trained in encoded:
            trained = np.concatenate((np.zeros(len(before), bool), is_trained, np.ones(len(behind), bool)))
            trained[:1] = False  # nothing stands before it from which it could be predicted
            stored.append(mark(np.concatenate((before, ids, behind)), trained))
        return stored

    def _render(self, row: dict[str, Any]) -> tuple[str, list[Span], tuple[str, ...]]:
        """Text, what of it is trained, and notices."""
        raise NotImplementedError


class ChatEncoder(_RowEncoder):
    """Conversations: what the assistant writes is trained.

    Args:
        tokenizer: Of the conversations.
        template: How they become text; None means the tokenizer's own chat template.
        column: The key of the messages; None means those of :data:`~ropepp_lit.text.conversations.CHAT_COLUMNS`.
        train_on: One of :data:`~ropepp_lit.text.chat.TRAIN_ON`.

    Raises:
        UsageError: there is no template, or it cannot render questions and answers.
    """

    def __init__(self, tokenizer: TextTokenizer, *, template: str | None, column: str | None, train_on: str) -> None:
        super().__init__(tokenizer)
        self._template, self._column, self._train_on = (
            ChatTemplate.from_tokenizer(tokenizer, template),
            column,
            train_on,
        )
        self._tokens = self._template.tokens
        others = tuple(name for name in CHAT_COLUMNS if name in ("tools", "system", "chat_template_kwargs"))
        self.columns = CHAT_COLUMNS if column is None else (column, *others)
        self.chat_template, self.end_of_turn = self._template.source, self._template.end_of_turn
        self.identity = {"chat_template": self._template.identity}
        if self._template.uses_date:
            self.identity["date"] = datetime.date.today().isoformat()

    def _render(self, row: dict[str, Any]) -> tuple[str, list[Span], tuple[str, ...]]:
        rendered = self._template.render_trained(conversation_of(row, self._column), self._train_on)
        return rendered.text, rendered.spans, rendered.notices


class CompletionEncoder(_RowEncoder):
    """Prompts with their completions, which are trained, with the tokens that end documents.

    Args:
        tokenizer: Of the texts.
        columns: The keys of prompt and completion.
        train_on: `all` trains the prompt too.
        special_tokens: Whether special tokens spelt in a text are tokens.
    """

    def __init__(
        self, tokenizer: TextTokenizer, *, columns: tuple[str, str], train_on: str, special_tokens: bool
    ) -> None:
        super().__init__(tokenizer)
        self.columns: tuple[str, str] = columns
        self._trains_prompt = train_on == "all"
        self._tokens = SpanTokenizer(tokenizer.json, special_tokens=special_tokens)
        self._around = tokenizer.around

    def _render(self, row: dict[str, Any]) -> tuple[str, list[Span], tuple[str, ...]]:
        prompt, completion = completion_of(row, self.columns)
        text = prompt + completion
        return text, [Span(0 if self._trains_prompt else len(prompt), len(text))], ()


def make_encoder(
    kind: str, tokenizer: TextTokenizer, *, text_key: str, special_tokens: bool, template: str | None, train_on: str
) -> TextEncoder:
    """The encoder of a format.

    Args:
        kind: One of :data:`FORMATS`.
        tokenizer: Of the documents.
        text_key: `text`, or another key of the messages; for `completion` the keys of prompt and completion with a
            comma between them.
        special_tokens: Whether special tokens spelt in a text are tokens; in conversations they are.
        template: A Jinja template instead of the tokenizer's own.
        train_on: What is trained.

    Raises:
        UsageError: an option does not fit the format, or the chat template is missing or fails.
    """
    if kind != "chat" and template is not None:
        raise UsageError(f"chat_template: of use for --format chat alone, not for {kind}; leave it out")
    if train_on != "assistant" and (kind == "text" or (kind == "completion" and train_on == "last")):
        raise UsageError(f"train_on: {train_on} has no meaning for --format {kind}; leave it out")
    if kind == "text":
        return TextEncoder(tokenizer)
    if kind == "chat":
        column = None if text_key == "text" else text_key
        return ChatEncoder(tokenizer, template=template, column=column, train_on=train_on)
    names = COMPLETION_COLUMNS if text_key == "text" else tuple(name.strip() for name in text_key.split(","))
    if len(names) != 2:
        raise UsageError(
            f"text_key: {text_key}: for completions name two keys, of the prompt and of the completion: A,B"
        )
    columns = names[0], names[1]
    return CompletionEncoder(tokenizer, columns=columns, train_on=train_on, special_tokens=special_tokens)


def encoded(
    reader: Reader, encoder: TextEncoder, advance: Callable[[int], None]
) -> Iterator[tuple[Cursor, Record, np.ndarray | None]]:
    """Records with their texts and tokens, in order; batches are tokenized while those before are written.

    Short documents are spread over the cores within a batch, by the library; long ones, of which a batch has one, by as
    many batches at the same time as there are cores.

    Args:
        reader: Of the records.
        encoder: What makes tokens of them.
        advance: Gets the number of bytes read.
    """
    cores = int(os.environ.get("RAYON_NUM_THREADS") or 0) or os.cpu_count() or 1
    pending: deque[tuple[list[tuple[Cursor, Record]], int, Future]] = deque()
    with ThreadPoolExecutor(max_workers=max(2, cores)) as executor:
        batch: list[tuple[Cursor, Record]] = []
        size = 0

        def submit() -> None:
            records = [record for _, record in batch if record.text is not None]
            pending.append((batch, size, executor.submit(encoder.encode, records)))

        for cursor, read in reader:
            record = encoder.render(read)
            batch.append((cursor, record))
            size += len(record.text or "") + 64
            if size >= BATCH_BYTES:
                while pending and sum(other for _, other, _ in pending) + size > cores * PENDING_BYTES:
                    yield from _results(*pending.popleft())
                submit()
                batch, size = [], 0
                while len(pending) >= max(2, cores):
                    yield from _results(*pending.popleft())
                advance(reader.bytes_read)
        submit()
        while pending:
            yield from _results(*pending.popleft())


def _results(
    batch: list[tuple[Cursor, Record]], _: int, future: Future
) -> Iterator[tuple[Cursor, Record, np.ndarray | None]]:
    ids = iter(future.result())
    for cursor, record in batch:
        yield cursor, record, None if record.text is None else next(ids)
