"""Tokenize texts of which only some character spans are trained, and map the spans to tokens by their offsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ropepp_lit.text.tokenizer_files import encoding_errors


class Span(NamedTuple):
    """A range of characters in a text; `end` is exclusive."""

    start: int
    end: int


class SpanTokenizer:
    """Tokenizer of texts that also returns which tokens are trained.

    Args:
        tokenizer: Content of tokenizer.json.
        special_tokens: Whether special tokens in a text are parsed; otherwise they are plain text.
    """

    def __init__(self, tokenizer: str, *, special_tokens: bool) -> None:
        values = json.loads(tokenizer)
        # A post-processor adds no tokens here, but GPT-2's removes white space from the offsets.
        self._tokenizer = Tokenizer.from_str(json.dumps({**values, "post_processor": None}))
        self._tokenizer.encode_special_tokens = not special_tokens

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokenize texts, without adding tokens, and return a mask of the trained tokens.

        A token is trained if it overlaps a span, as in transformers' `assistant_masks`: it can begin before the span or
        end after it.

        Args:
            texts: Texts to tokenize.
            spans: Trained spans of each text, in ascending order and without overlap.

        Returns:
            For each text the token ids, [tokens] int32, and the mask, [tokens] bool.
        """
        with encoding_errors():
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        encodings.reverse()
        encoded = []
        for trained in spans:
            encoding = encodings.pop()  # each takes about 100 bytes per token: free it at once
            ids = np.asarray(encoding.ids, dtype=np.int32)
            encoded.append((ids, _intersects(np.asarray(encoding.offsets).reshape(-1, 2), trained)))
        return encoded

    def leading_added_token(self, text: str) -> int | None:
        """Return the id of the first token of a text if it is an added token, else None."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids[0] if ids and ids[0] in self._tokenizer.get_added_tokens_decoder() else None

    def added(self, *, special: bool = False) -> list[str]:
        """Return the added tokens that are not white space, longest first; only special ones if `special` is set."""
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        contents = {token.content for token in tokens if token.content.strip() and (token.special or not special)}
        return sorted(contents, key=lambda token: (-len(token), token))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, including special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _intersects(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Return which tokens overlap a span; an empty token counts as its next character.

    Args:
        offsets: Start and (exclusive) end of each token's characters, [tokens, 2].
        spans: Spans in ascending order.
    """
    if not spans:
        return np.zeros(len(offsets), dtype=bool)
    starts, ends = np.asarray(spans).T
    first = np.searchsorted(ends, offsets[:, 0], side="right")  # the first span that ends after the token's start
    before = np.append(starts, np.iinfo(starts.dtype).max)[first]
    return before < np.maximum(offsets[:, 1], offsets[:, 0] + 1)
