"""Texts of which only spans are trained, as tokens: one pass of the tokenizer, with character offsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ropepp_lit.text.tokenizer_files import encoding_errors


class Span(NamedTuple):
    """A range of a text's characters, `end` not included."""

    start: int
    end: int


class SpanTokenizer:
    """Tokenizes texts and says which tokens are trained.

    Args:
        tokenizer: In the format of tokenizer.json.
        special_tokens: Whether special tokens spelt in a text are tokens.
    """

    def __init__(self, tokenizer: str, *, special_tokens: bool) -> None:
        values = json.loads(tokenizer)
        # It would add nothing here, but GPT-2's takes white space out of the offsets.
        self._tokenizer = Tokenizer.from_str(json.dumps({**values, "post_processor": None}))
        self._tokenizer.encode_special_tokens = not special_tokens

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids of texts alone, and which of them are trained.

        A token is trained where it has a character of a span, as in transformers' `assistant_masks`: also one that
        begins before the span or ends behind it.

        Args:
            texts: Nothing is put before or behind them.
            spans: Of each text, in order; they do not overlap.

        Returns:
            For each text [tokens] int32 and [tokens] bool.
        """
        with encoding_errors():
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        encodings.reverse()
        encoded = []
        for trained in spans:
            encoding = encodings.pop()  # each takes a hundred bytes a token: let it go at once
            ids = np.asarray(encoding.ids, dtype=np.int32)
            encoded.append((ids, _intersects(np.asarray(encoding.offsets).reshape(-1, 2), trained)))
        return encoded

    def first_added(self, text: str) -> int | None:
        """The token at the beginning of a text, where it is one of those added to the vocabulary."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids[0] if ids and ids[0] in self._tokenizer.get_added_tokens_decoder() else None

    def added(self, *, special: bool = False) -> list[str]:
        """The tokens that were added to the vocabulary and are not white space, longest first; `special` ones alone."""
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        found = {token.content for token in tokens if token.content.strip() and (token.special or not special)}
        return sorted(found, key=lambda token: (-len(token), token))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _intersects(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens have a character of a span; one without characters counts as the one behind it.

    Args:
        offsets: [tokens, 2], first character of each token and the one behind it.
        spans: In order.
    """
    if not spans:
        return np.zeros(len(offsets), dtype=bool)
    starts, ends = np.asarray(spans).T
    first = np.searchsorted(ends, offsets[:, 0], side="right")  # the first span that ends behind the token's start
    before = np.append(starts, np.iinfo(starts.dtype).max)[first]
    return before < np.maximum(offsets[:, 1], offsets[:, 0] + 1)
