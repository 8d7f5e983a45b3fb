"""Storage of the loss mask: the sign of a stored token marks whether it is trained.

A trained token is stored as its id, any other token as its complement `~id` (-1 - id), in int32. So the mask is part of
the shards and their checksums, and is read with the tokens. This form is used if the manifest sets
`marks_trained_tokens`.

A pair of answers is stored as one document: the prompt and chosen answer, followed by the prompt and rejected answer.
The first token of the latter, which is never trained, is stored as `~id - 2**30`.
"""

from __future__ import annotations

import numpy as np

REJECTED = -(2**30)
"""Offset of the first token of a rejected answer (with its prompt), which is stored below this value."""

ID_BITS = 2**30 - 1
"""Bits of the token's id in a stored value or its complement."""


def mark(ids: np.ndarray, is_trained: np.ndarray) -> np.ndarray:
    """Mark token ids for storing.

    Args:
        ids: [tokens], integers of 0 or more and below 2^30.
        is_trained: [tokens], bool.

    Returns:
        [tokens] int32.
    """
    ids = ids.astype(np.int32)
    return np.where(is_trained, ids, ~ids)


def join_pair(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Join a pair of answers for storing.

    Args:
        chosen: [tokens] from :func:`mark`, with the prompt. The first token is not trained.
        rejected: [tokens] from :func:`mark`, with the prompt. The first token is not trained.

    Returns:
        [tokens of both] int32.
    """
    joined = np.concatenate((chosen, rejected))
    joined[len(chosen)] += REJECTED
    return joined


def split_pair(stored: np.ndarray) -> list[np.ndarray]:
    """Split a stored document into its chosen and rejected answer, in stored form; other documents are not split."""
    return np.split(stored, np.flatnonzero(stored < REJECTED))


def token_ids(stored: np.ndarray) -> np.ndarray:
    """Return the token ids of a stored document, in the same dtype; plain token ids are returned unchanged."""
    return stored if stored.dtype.kind == "u" else np.where(stored < 0, ~stored & ID_BITS, stored)


def is_trained(stored: np.ndarray) -> np.ndarray:
    """Return which tokens of a stored document are trained: bool, of the same shape."""
    return stored >= 0


def can_be_trained_on(stored: np.ndarray) -> bool:
    """Return whether a stored document, or each answer of a pair, has a trained token after its first token."""
    return all(is_trained(part[1:]).any() for part in split_pair(stored))
