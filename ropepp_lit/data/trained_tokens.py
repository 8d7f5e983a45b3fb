"""Which tokens of prepared conversations are trained: the sign of what is stored.

A token that is trained is stored as its id, one that is only read as its complement `~id` (-1 - id), in int32. So the
mask is in the shards, under their checksums, and is read with the tokens. Only folders whose manifest says so
(`marks_trained_tokens`) are stored this way.

A pair of answers is stored as one document: the tokens of the chosen one, with its prompt, and those of the rejected
one, with the prompt again. The first token of the rejected one, which is never trained, is `~id - 2**30`.
"""

from __future__ import annotations

import numpy as np

REJECTED = -(2**30)
"""What is stored is below this where a rejected answer (with its prompt) begins."""

ID_BITS = 2**30 - 1
"""The bits of what is stored, or of its complement, that are the token's id."""


def mark(ids: np.ndarray, is_trained: np.ndarray) -> np.ndarray:
    """Token ids as they are stored.

    Args:
        ids: [tokens], integers of 0 or more and below 2^30.
        is_trained: [tokens], bool.

    Returns:
        [tokens] int32.
    """
    ids = ids.astype(np.int32)
    return np.where(is_trained, ids, ~ids)


def join_pair(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """A pair of answers as it is stored.

    Args:
        chosen: [tokens] of :func:`mark`, with the prompt. The first token is not trained.
        rejected: [tokens] of :func:`mark`, with the prompt. The first token is not trained.

    Returns:
        [tokens of both] int32.
    """
    joined = np.concatenate((chosen, rejected))
    joined[len(chosen)] += REJECTED
    return joined


def split_pair(stored: np.ndarray) -> list[np.ndarray]:
    """The chosen and the rejected answer of what is stored, as they are stored; a document that is no pair alone."""
    return np.split(stored, np.flatnonzero(stored < REJECTED))


def token_ids(stored: np.ndarray) -> np.ndarray:
    """Token ids of what is stored, in the same dtype; plain token ids stay as they are."""
    return stored if stored.dtype.kind == "u" else np.where(stored < 0, ~stored & ID_BITS, stored)


def is_trained(stored: np.ndarray) -> np.ndarray:
    """Which tokens of what is stored are trained: bool, of the same shape."""
    return stored >= 0


def can_be_trained_on(stored: np.ndarray) -> bool:
    """Whether a document, or each answer of a pair, has a trained token behind its first, which is never predicted."""
    return all(is_trained(part[1:]).any() for part in split_pair(stored))
