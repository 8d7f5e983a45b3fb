"""Which tokens of prepared conversations are trained: the sign of what is stored.

A token that is trained is stored as its id, one that is only read as its complement `~id` (-1 - id), in int32. So the
mask is in the shards, under their checksums, and is read with the tokens. Only folders whose manifest says so
(`marks_trained_tokens`) are stored this way.
"""

from __future__ import annotations

import numpy as np


def mark(ids: np.ndarray, is_trained: np.ndarray) -> np.ndarray:
    """Token ids as they are stored.

    Args:
        ids: [tokens], integers of 0 or more.
        is_trained: [tokens], bool.

    Returns:
        [tokens] int32.
    """
    ids = ids.astype(np.int32)
    return np.where(is_trained, ids, ~ids)


def token_ids(stored: np.ndarray) -> np.ndarray:
    """Token ids of what :func:`mark` returned, in the same dtype; plain token ids stay as they are."""
    return np.where(stored < 0, ~stored, stored)


def is_trained(stored: np.ndarray) -> np.ndarray:
    """Which tokens of what :func:`mark` returned are trained: bool, of the same shape."""
    return stored >= 0
