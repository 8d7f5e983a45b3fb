"""Incremental decoding of generated tokens to text."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ropepp_lit.text.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"
"""Replacement character that decoders produce for invalid or incomplete UTF-8."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""Pattern of byte-fallback tokens."""

MAX_PENDING = 64
"""Maximum number of tokens that are held back if they do not decode to valid text."""


class TextStream:
    """Decodes tokens incrementally; the joined text equals one :meth:`TextTokenizer.decode` of all tokens.

    Text that can still change is held back: characters with incomplete bytes, and runs of byte tokens (Llama 2's
    `<0xE4>`), which only decode together.

    Args:
        tokenizer: Tokenizer that decodes.
        prompt: Token ids before the first new one; the decoded beginning can depend on them.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        """Context tokens, whose text has been returned, followed by the pending ones."""
        self._context = len(self._ids)
        self._context_text = tokenizer.decode(self._ids)
        added = tokenizer.tokenizer.get_added_tokens_decoder()
        self._skipped = {token_id for token_id, token in added.items() if token.special}
        self._in_run = False

    def push(self, token_id: int) -> str:
        """Append a token and return the text that is now final."""
        self._ids.append(token_id)
        if token_id not in self._skipped:  # a special token does not end a run
            self._in_run = BYTE_TOKEN.fullmatch(self._tokenizer.token(token_id) or "") is not None
        if self._in_run:
            return ""
        text = self._tokenizer.decode(self._ids)
        if not text.endswith(REPLACEMENT):
            return self._emit(text, len(self._ids))
        if len(self._ids) - self._context < MAX_PENDING:
            return ""
        # Bytes that are not valid text: return all but the last ones.
        for cut in range(len(self._ids) - 1, self._context, -1):
            head = self._tokenizer.decode(self._ids[:cut])
            if head + self._tokenizer.decode(self._ids[cut:]) == text:
                return self._emit(head, cut)
        return ""

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._emit(self._tokenizer.decode(self._ids), len(self._ids))

    def _emit(self, text: str, count: int) -> str:
        """Return the new part of the text of the first `count` tokens; the last of these become the context."""
        new = text[len(self._context_text) :]
        if new:
            self._ids, self._context = self._ids[self._context :], count - self._context
            self._context_text = self._tokenizer.decode(self._ids[: self._context])
        return new


class StoppingStream:
    """Decodes tokens incrementally up to a stop token or a stop string, neither of which is part of the text.

    A stop string can begin and end within tokens: text that could be its beginning is held back.

    Args:
        tokenizer: Tokenizer that decodes.
        prompt: Token ids before the first new one.
        stop_token_ids: Tokens that end the text.
        stop_texts: Strings that end the text; the first one in the text applies.
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
        """Number of tokens so far, including the stop token."""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Append a token and return the text that is now final."""
        self.num_tokens += 1
        if token_id not in self._stop_token_ids:
            return self._emit(self._stream.push(token_id), is_last=False)
        text = self.finish()
        self.is_stopped = True
        return text

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        return "" if self.is_stopped else self._emit(self._stream.finish(), is_last=True)

    def _emit(self, new: str, *, is_last: bool) -> str:
        text = self._held + new
        positions = [position for position in (text.find(stop) for stop in self._stop_texts) if position >= 0]
        if positions:
            self.is_stopped = True
            return text[: min(positions)]
        held = 0 if is_last else max((_overlap(text, stop) for stop in self._stop_texts), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
