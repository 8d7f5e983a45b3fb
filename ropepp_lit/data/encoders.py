"""Encoders that tokenize records (texts, conversations, prompts with completions), in order, on all cores."""

from __future__ import annotations

import datetime
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from ropepp_lit.data.trained_tokens import join_pair, mark
from ropepp_lit.errors import UsageError
from ropepp_lit.text.chat import ChatTemplate, ChatTemplateError, Rendered
from ropepp_lit.text.conversations import (
    CHAT_COLUMNS,
    COMPLETION_COLUMNS,
    PAIR_COLUMNS,
    Conversation,
    RowError,
    parse_completion,
    parse_completion_pair,
    parse_conversation,
    parse_conversation_pair,
)
from ropepp_lit.text.formats import Record
from ropepp_lit.text.sources import Cursor, Reader
from ropepp_lit.text.tokenizer import TextTokenizer
from ropepp_lit.text.trained_spans import Span, SpanTokenizer

Format = Literal["text", "chat", "completion", "chat_pairs", "completion_pairs"]
"""Format of the sources' records."""

BATCH_BYTES = 2**19
"""Minimum bytes of text in a tokenized batch."""

PENDING_BYTES = 8 * 2**20
"""Maximum bytes of text per core in pending batches, unless a single document is larger."""


class TextEncoder:
    """Encoder of text documents, all of whose tokens are trained.

    Args:
        tokenizer: Tokenizer of the texts.
    """

    columns: tuple[str, ...] = ()
    """Keys or columns of the rows to read; empty if texts are read."""
    marks_trained_tokens = False
    """Whether only some tokens are trained, so that stored tokens are marked."""
    makes_pairs = False
    """Whether documents are pairs of a chosen and a rejected answer."""
    chat_template: str | None = None
    """Jinja template of conversations."""
    end_of_turn: Sequence[int] = ()
    """Token ids that end an assistant's turn."""
    identity: dict[str, Any] = {}  # noqa: RUF012 (read-only)
    """Values that affect the tokens, in addition to the settings and the tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def render(self, record: Record) -> Record:
        """Return the record with its text, or with the problem of its row."""
        return record

    def encode(self, records: Sequence[Record]) -> list[np.ndarray]:
        """Tokenize records that have a text; returns the stored form of each document, [tokens] int32."""
        return self.tokenizer.encode([str(record.text) for record in records])


class _RowEncoder(TextEncoder, ABC):
    """Encoder of rows that are rendered to texts with trained spans, or to pairs of them (chosen and rejected)."""

    marks_trained_tokens = True
    _tokens: SpanTokenizer
    _document_tokens: tuple[Sequence[int], Sequence[int]] = ((), ())
    """Token ids before a text, and after it; the latter are trained."""

    def render(self, record: Record) -> Record:
        if record.row is None:
            return record
        try:
            texts = self._render_pair(record.row) if self.makes_pairs else [self._render(record.row)]
            for text in texts:
                text.text.encode("utf-8")
        except (RowError, ChatTemplateError) as error:
            return Record(None, str(error), record.where)
        except UnicodeEncodeError:  # a lone surrogate, which JSON can contain as an escape
            return Record(None, "not UTF-8", record.where)
        first = texts[0]
        spans = [*first.spans]
        notices = dict.fromkeys(notice for text in texts for notice in text.notices)
        if self.makes_pairs:
            spans += [Span(start + len(first.text), end + len(first.text)) for start, end in texts[1].spans]
        return Record(
            "".join(text.text for text in texts),
            None,
            record.where,
            spans=spans,
            notices=tuple(notices),
            rejected_start=len(first.text) if self.makes_pairs else None,
        )

    def encode(self, records: Sequence[Record]) -> list[np.ndarray]:
        parts = [part for record in records for part in _parts(record)]
        encoded = self._tokens.encode([text for text, _ in parts], [spans for _, spans in parts])
        stored = iter([self._stored(ids, is_trained) for ids, is_trained in encoded])
        return [
            next(stored) if record.rejected_start is None else join_pair(next(stored), next(stored))
            for record in records
        ]

    def _stored(self, ids: np.ndarray, is_trained: np.ndarray) -> np.ndarray:
        opening, closing = (np.asarray(ids, dtype=np.int32) for ids in self._document_tokens)
        trained = np.concatenate((np.zeros(len(opening), bool), is_trained, np.ones(len(closing), bool)))
        trained[:1] = False  # the first token is never predicted
        return mark(np.concatenate((opening, ids, closing)), trained)

    @abstractmethod
    def _render(self, row: dict[str, Any]) -> Rendered:
        """Render a row to its text."""

    @abstractmethod
    def _render_pair(self, row: dict[str, Any]) -> list[Rendered]:
        """Render a row to the texts of its chosen and rejected answer, each with the prompt."""


def _parts(record: Record) -> list[tuple[str, list[Span]]]:
    """Split a record into its texts, one or two, with their trained spans."""
    text, spans, rejected_start = str(record.text), record.spans or [], record.rejected_start
    if rejected_start is None:
        return [(text, spans)]
    return [
        (text[:rejected_start], [span for span in spans if span.start < rejected_start]),
        (
            text[rejected_start:],
            [Span(start - rejected_start, end - rejected_start) for start, end in spans if start >= rejected_start],
        ),
    ]


class ChatEncoder(_RowEncoder):
    """Encoder of conversations, of which the assistant's turns are trained.

    Args:
        tokenizer: Tokenizer of the conversations.
        template: Jinja template; None means the tokenizer's own chat template.
        columns: Key of the messages, or keys of prompt, chosen and rejected; empty means
            :data:`~ropepp_lit.text.conversations.CHAT_COLUMNS`.
        train_on: One of :data:`~ropepp_lit.text.chat.TRAIN_ON`.
        makes_pairs: Whether rows have a chosen and a rejected answer.

    Raises:
        UsageError: There is no template, or it cannot render questions and answers.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        template: str | None,
        columns: tuple[str, ...],
        train_on: str,
        makes_pairs: bool,
    ) -> None:
        super().__init__(tokenizer)
        self._template, self._train_on = ChatTemplate.from_tokenizer(tokenizer, template), train_on
        self._keys, self.makes_pairs = columns, makes_pairs
        self._tokens = self._template.tokens
        others = tuple(name for name in CHAT_COLUMNS if name in ("tools", "system", "chat_template_kwargs"))
        self.columns = (*columns, *others) if columns else CHAT_COLUMNS
        self.chat_template, self.end_of_turn = self._template.source, self._template.end_of_turn
        self.identity = {"chat_template": self._template.identity}
        if self._template.uses_date:
            self.identity["date"] = datetime.date.today().isoformat()

    def _render(self, row: dict[str, Any]) -> Rendered:
        return self._rendered(parse_conversation(row, *self._keys))

    def _render_pair(self, row: dict[str, Any]) -> list[Rendered]:
        prompt, chosen, rejected = self._keys
        return [
            self._rendered(conversation) for conversation in parse_conversation_pair(row, (prompt, chosen, rejected))
        ]

    def _rendered(self, conversation: Conversation) -> Rendered:
        return self._template.render_trained(conversation, self._train_on)


class CompletionEncoder(_RowEncoder):
    """Encoder of prompts with completions, of which the completion and the tokens after it are trained.

    Args:
        tokenizer: Tokenizer of the texts.
        columns: Keys of prompt and completion, or of prompt, chosen and rejected completion.
        train_on: With `all`, the prompt is trained too.
        special_tokens: Whether special tokens in a text are parsed.
    """

    def __init__(
        self, tokenizer: TextTokenizer, *, columns: tuple[str, ...], train_on: str, special_tokens: bool
    ) -> None:
        super().__init__(tokenizer)
        self.columns, self.makes_pairs = columns, len(columns) == 3
        self._trains_prompt = train_on == "all"
        self._tokens = SpanTokenizer(tokenizer.json, special_tokens=special_tokens)
        self._document_tokens = tokenizer.document_tokens

    def _render(self, row: dict[str, Any]) -> Rendered:
        prompt, completion = self.columns
        return self._rendered(*parse_completion(row, (prompt, completion)))

    def _render_pair(self, row: dict[str, Any]) -> list[Rendered]:
        prompt_key, *keys = self.columns
        prompt, *answers = parse_completion_pair(row, (prompt_key, keys[0], keys[1]))
        return [self._rendered(prompt, answer) for answer in answers]

    def _rendered(self, prompt: str, completion: str) -> Rendered:
        text = prompt + completion
        return Rendered(text, [Span(0 if self._trains_prompt else len(prompt), len(text))])


def make_encoder(
    kind: Format, tokenizer: TextTokenizer, *, text_key: str, special_tokens: bool, template: str | None, train_on: str
) -> TextEncoder:
    """Create the encoder of a format.

    Args:
        kind: Format of the sources' records.
        tokenizer: Tokenizer of the documents.
        text_key: `text`, or another key of the messages; for `completion` the comma-separated keys of prompt and
            completion, for pairs those of prompt, chosen and rejected.
        special_tokens: Whether special tokens in a text are parsed; in conversations they always are.
        template: Jinja template that replaces the tokenizer's own.
        train_on: One of :data:`~ropepp_lit.text.chat.TRAIN_ON`.

    Raises:
        UsageError: An option is not valid for the format, or the chat template is missing or fails.
    """
    is_chat, makes_pairs = kind in ("chat", "chat_pairs"), kind in ("chat_pairs", "completion_pairs")
    if not is_chat and template is not None:
        raise UsageError(f"chat_template: only valid with --format chat and chat_pairs, not with {kind}; remove it")
    invalid = {"all"} if makes_pairs else set()
    invalid |= set() if is_chat else {"last"}
    if train_on in invalid or (kind == "text" and train_on != "assistant"):
        raise UsageError(f"train_on: {train_on} is not valid with --format {kind}; remove it")
    if kind == "text":
        return TextEncoder(tokenizer)
    defaults = PAIR_COLUMNS if makes_pairs else () if is_chat else COMPLETION_COLUMNS
    columns: tuple[str, ...] = defaults
    if text_key != "text":
        columns = (text_key,) if kind == "chat" else tuple(name.strip() for name in text_key.split(","))
    if kind != "chat" and len(columns) != len(defaults):
        example = ",".join("ABC"[: len(defaults)])
        raise UsageError(f"text_key: {text_key}: for --format {kind} pass the keys of {_listed(defaults)}: {example}")
    if is_chat:
        return ChatEncoder(tokenizer, template=template, columns=columns, train_on=train_on, makes_pairs=makes_pairs)
    return CompletionEncoder(tokenizer, columns=columns, train_on=train_on, special_tokens=special_tokens)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def encode_records(
    reader: Reader, encoder: TextEncoder, advance: Callable[[int], None]
) -> Iterator[tuple[Cursor, Record, np.ndarray | None]]:
    """Tokenize records in parallel and yield them in order, with their texts and tokens.

    Batches are tokenized while earlier ones are consumed. The library tokenizers parallelizes over the short documents
    of a batch; long documents, of which a batch has one, are parallelized by concurrent batches, as many as cores.

    Args:
        reader: Reader of the records.
        encoder: Encoder that renders and tokenizes them.
        advance: Called with the number of bytes read.

    Yields:
        The position after a record, the rendered record, and its stored tokens (None if it has no text).
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
