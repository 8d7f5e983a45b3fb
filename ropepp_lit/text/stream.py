"""Text as a model writes it, token by token."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ropepp_lit.text.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no text, or not yet."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

MAX_PENDING = 64
"""Tokens that are held back at most, where they are not text at all."""


class TextStream:
    """Text of tokens that come one by one, equal to one :meth:`TextTokenizer.decode` of all of them.

    What may still change is held back: characters whose bytes are not complete, and runs of byte tokens (Llama 2's
    `<0xE4>`), which decode together or not at all.

    Args:
        tokenizer: Decodes.
        prompt: Token ids before the first new one; how a decoder begins may depend on them.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        """Tokens whose text is given, as context, and those behind them."""
        self._context = len(self._ids)
        self._given = tokenizer.decode(self._ids)
        added = tokenizer.tokenizer.get_added_tokens_decoder()
        self._skipped = {token_id for token_id, token in added.items() if token.special}
        self._in_run = False

    def push(self, token_id: int) -> str:
        """Take a token; the text that is certain now."""
        self._ids.append(token_id)
        if token_id not in self._skipped:  # a special token does not end a run
            self._in_run = BYTE_TOKEN.fullmatch(self._tokenizer.token(token_id) or "") is not None
        if self._in_run:
            return ""
        text = self._tokenizer.decode(self._ids)
        if not text.endswith(REPLACEMENT):
            return self._give(text, len(self._ids))
        if len(self._ids) - self._context < MAX_PENDING:
            return ""
        for cut in range(len(self._ids) - 1, self._context, -1):  # bytes that are no text: give all but the last ones
            head = self._tokenizer.decode(self._ids[:cut])
            if head + self._tokenizer.decode(self._ids[cut:]) == text:
                return self._give(head, cut)
        return ""

    def finish(self) -> str:
        """The text that was held back."""
        return self._give(self._tokenizer.decode(self._ids), len(self._ids))

    def _give(self, text: str, count: int) -> str:
        """The new part of the text of the first `count` tokens, whose last ones become the context."""
        new = text[len(self._given) :]
        if new:
            self._ids, self._context = self._ids[self._context :], count - self._context
            self._given = self._tokenizer.decode(self._ids[: self._context])
        return new


class StoppingStream:
    """Text of tokens that come one by one, up to a token or a text that ends it; neither is part of the text.

    A text that ends it may begin and end anywhere within tokens: what could be its beginning is held back.

    Args:
        tokenizer: Decodes.
        prompt: Token ids before the first new one.
        stop_token_ids: Tokens that end the text.
        stop_texts: Texts that end it; the first in the text counts.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt: Sequence[int] = (),
        *,
        stop_token_ids: Collection[int] = (),
        stop_texts: Sequence[str] = (),
    ) -> None:
        self._stream = TextStream(tokenizer, prompt)
        self._stop_token_ids, self._stop_texts = stop_token_ids, stop_texts
        self._held = ""
        self.num_tokens = 0
        """Tokens so far, that which ended the text included."""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Take a token; the text that is certain now."""
        self.num_tokens += 1
        if token_id not in self._stop_token_ids:
            return self._give(self._stream.push(token_id), is_last=False)
        text = self.finish()
        self.is_stopped = True
        return text

    def finish(self) -> str:
        """The text that was held back, where no more tokens come."""
        return "" if self.is_stopped else self._give(self._stream.finish(), is_last=True)

    def _give(self, new: str, *, is_last: bool) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop_texts) if place >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        held = 0 if is_last else max((_overlap(text, stop) for stop in self._stop_texts), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of another, not all of it."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
