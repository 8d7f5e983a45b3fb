"""From records to tokens: texts, conversations, or prompts with completions; in order, on all cores."""

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
    completion_of,
    completion_pair_of,
    conversation_of,
    conversation_pair_of,
)
from ropepp_lit.text.formats import Record
from ropepp_lit.text.sources import Cursor, Reader
from ropepp_lit.text.tokenizer import TextTokenizer
from ropepp_lit.text.trained_spans import Span, SpanTokenizer

Format = Literal["text", "chat", "completion", "chat_pairs", "completion_pairs"]
"""What sources hold."""

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
    makes_pairs = False
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


class _RowEncoder(TextEncoder, ABC):
    """Rows that become texts of which spans are trained; or pairs of such texts, a chosen and a rejected answer."""

    marks_trained_tokens = True
    _tokens: SpanTokenizer
    _around: tuple[Sequence[int], Sequence[int]] = ((), ())
    """Tokens before a text, and those behind it, which are trained."""

    def render(self, record: Record) -> Record:
        if record.row is None:
            return record
        try:
            texts = self._render_pair(record.row) if self.makes_pairs else [self._render(record.row)]
            for text in texts:
                text.text.encode("utf-8")
        except (RowError, ChatTemplateError) as error:
            return Record(None, str(error), record.where)
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
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
            second=len(first.text) if self.makes_pairs else None,
        )

    def encode(self, records: Sequence[Record]) -> list[np.ndarray]:
        parts = [part for record in records for part in _parts(record)]
        encoded = self._tokens.encode([text for text, _ in parts], [spans for _, spans in parts])
        stored = iter([self._stored(ids, is_trained) for ids, is_trained in encoded])
        return [next(stored) if record.second is None else join_pair(next(stored), next(stored)) for record in records]

    def _stored(self, ids: np.ndarray, is_trained: np.ndarray) -> np.ndarray:
        before, behind = (np.asarray(ids, dtype=np.int32) for ids in self._around)
        trained = np.concatenate((np.zeros(len(before), bool), is_trained, np.ones(len(behind), bool)))
        trained[:1] = False  # nothing stands before it from which it could be predicted
        return mark(np.concatenate((before, ids, behind)), trained)

    @abstractmethod
    def _render(self, row: dict[str, Any]) -> Rendered:
        """A row that is one text."""

    @abstractmethod
    def _render_pair(self, row: dict[str, Any]) -> list[Rendered]:
        """The texts of a row's chosen and rejected answer, each with the prompt."""


def _parts(record: Record) -> list[tuple[str, list[Span]]]:
    """A record's texts, one or two, and what of each is trained."""
    text, spans, second = str(record.text), record.spans or [], record.second
    if second is None:
        return [(text, spans)]
    return [
        (text[:second], [span for span in spans if span.start < second]),
        (text[second:], [Span(start - second, end - second) for start, end in spans if start >= second]),
    ]


class ChatEncoder(_RowEncoder):
    """Conversations: what the assistant writes is trained.

    Args:
        tokenizer: Of the conversations.
        template: How they become text; None means the tokenizer's own chat template.
        columns: The key of the messages, or those of prompt, chosen and rejected; empty means those of
            :data:`~ropepp_lit.text.conversations.CHAT_COLUMNS`.
        train_on: One of :data:`~ropepp_lit.text.chat.TRAIN_ON`.
        makes_pairs: Whether rows hold a chosen and a rejected answer.

    Raises:
        UsageError: there is no template, or it cannot render questions and answers.
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
        return self._rendered(conversation_of(row, *self._keys))

    def _render_pair(self, row: dict[str, Any]) -> list[Rendered]:
        prompt, chosen, rejected = self._keys
        return [self._rendered(conversation) for conversation in conversation_pair_of(row, (prompt, chosen, rejected))]

    def _rendered(self, conversation: Conversation) -> Rendered:
        return self._template.render_trained(conversation, self._train_on)


class CompletionEncoder(_RowEncoder):
    """Prompts with their completions, which are trained, with the tokens that end documents.

    Args:
        tokenizer: Of the texts.
        columns: The keys of prompt and completion, or of prompt, chosen and rejected completion.
        train_on: `all` trains the prompt too.
        special_tokens: Whether special tokens spelt in a text are tokens.
    """

    def __init__(
        self, tokenizer: TextTokenizer, *, columns: tuple[str, ...], train_on: str, special_tokens: bool
    ) -> None:
        super().__init__(tokenizer)
        self.columns, self.makes_pairs = columns, len(columns) == 3
        self._trains_prompt = train_on == "all"
        self._tokens = SpanTokenizer(tokenizer.json, special_tokens=special_tokens)
        self._around = tokenizer.document_tokens

    def _render(self, row: dict[str, Any]) -> Rendered:
        prompt, completion = self.columns
        return self._rendered(*completion_of(row, (prompt, completion)))

    def _render_pair(self, row: dict[str, Any]) -> list[Rendered]:
        prompt_key, *keys = self.columns
        prompt, *answers = completion_pair_of(row, (prompt_key, keys[0], keys[1]))
        return [self._rendered(prompt, answer) for answer in answers]

    def _rendered(self, prompt: str, completion: str) -> Rendered:
        text = prompt + completion
        return Rendered(text, [Span(0 if self._trains_prompt else len(prompt), len(text))])


def make_encoder(
    kind: Format, tokenizer: TextTokenizer, *, text_key: str, special_tokens: bool, template: str | None, train_on: str
) -> TextEncoder:
    """The encoder of a format.

    Args:
        kind: What the sources hold.
        tokenizer: Of the documents.
        text_key: `text`, or another key of the messages; for `completion` the keys of prompt and completion with a
            comma between them, for pairs those of prompt, chosen and rejected.
        special_tokens: Whether special tokens spelt in a text are tokens; in conversations they are.
        template: A Jinja template instead of the tokenizer's own.
        train_on: What is trained.

    Raises:
        UsageError: an option does not fit the format, or the chat template is missing or fails.
    """
    is_chat, makes_pairs = kind in ("chat", "chat_pairs"), kind in ("chat_pairs", "completion_pairs")
    if not is_chat and template is not None:
        raise UsageError(f"chat_template: of use for --format chat and chat_pairs, not for {kind}; leave it out")
    meaningless = {"all"} if makes_pairs else set()
    meaningless |= set() if is_chat else {"last"}
    if train_on in meaningless or (kind == "text" and train_on != "assistant"):
        raise UsageError(f"train_on: {train_on} has no meaning for --format {kind}; leave it out")
    if kind == "text":
        return TextEncoder(tokenizer)
    defaults = PAIR_COLUMNS if makes_pairs else () if is_chat else COMPLETION_COLUMNS
    columns: tuple[str, ...] = defaults
    if text_key != "text":
        columns = (text_key,) if kind == "chat" else tuple(name.strip() for name in text_key.split(","))
    if kind != "chat" and len(columns) != len(defaults):
        example = ",".join("ABC"[: len(defaults)])
        raise UsageError(f"text_key: {text_key}: for --format {kind} name the keys of {_listed(defaults)}: {example}")
    if is_chat:
        return ChatEncoder(tokenizer, template=template, columns=columns, train_on=train_on, makes_pairs=makes_pairs)
    return CompletionEncoder(tokenizer, columns=columns, train_on=train_on, special_tokens=special_tokens)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


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
