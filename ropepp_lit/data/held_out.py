"""Choose held-out documents for samples and evaluation."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator

import numpy as np

from ropepp_lit.text.tokenizer import TextTokenizer


def sample_texts(
    documents: Iterator[np.ndarray], tokenizer: TextTokenizer, *, limit: int, min_tokens: int
) -> list[str]:
    """Return the texts of the documents whose tokens have the smallest hashes.

    Args:
        documents: Token ids of each document.
        tokenizer: Tokenizer of the documents.
        limit: Maximum number of texts.
        min_tokens: Minimum number of tokens of a document.
    """

    def candidates() -> Iterator[np.ndarray]:
        for ids in documents:
            if len(ids) >= min_tokens and (len(ids) > 48 or tokenizer.decode(ids.tolist()).strip()):
                yield ids

    chosen = heapq.nsmallest(limit, candidates(), key=lambda ids: hashlib.sha256(ids.tobytes()).digest())
    return [tokenizer.decode(ids.tolist()) for ids in chosen]
