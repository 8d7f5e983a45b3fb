"""Verify a folder of token shards: read everything, and compare it with the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ropepp_lit.data.manifest import MANIFEST, Manifest, TokenSet
from ropepp_lit.data.shards import TokenShards, find_index_problem
from ropepp_lit.data.trained_tokens import REJECTED, is_trained, token_ids
from ropepp_lit.errors import UsageError


def verify(folder: Path) -> list[str]:
    """Read all files of a folder of token shards, and compare them with the manifest.

    Args:
        folder: Folder of the manifest.

    Returns:
        One line for each problem, with the file's name; empty if there are none.

    Raises:
        UsageError: The manifest cannot be read.
    """
    manifest = Manifest.read(folder)
    problems = []
    try:
        manifest.read_tokenizer(folder)
    except UsageError as error:
        problems.append(str(error))
    for name, tokens in manifest.splits.items():
        actual = TokenSet()
        for chunk in tokens.chunks:
            try:
                stored, offsets = TokenShards(folder, manifest, name, [chunk]).open_chunk(0)
            except UsageError as error:
                problems.append(str(error))
                continue
            bounds = (offsets.astype(np.int64) - int(offsets[0])) // stored.itemsize
            if manifest.marks_trained_tokens:
                trained = is_trained(stored)
                actual.trained_tokens += int(trained.sum())
                starts = np.union1d(bounds[:-1], np.flatnonzero(stored < REJECTED))
                trained[starts] = False  # the first token is never predicted
                wrong = int((np.add.reduceat(trained, starts, dtype=np.int64) == 0).sum())
                wrong += abs(len(starts) - (1 + manifest.holds_pairs) * (len(bounds) - 1))
                problem = "have no trained token after the first one"
                problem += ", or are not pairs of answers" if manifest.holds_pairs else ""
            else:
                wrong = int((stored[bounds[1:] - 1] != manifest.eos_token_id).sum())
                problem = f"do not end with the token {manifest.eos_token_id}"
            if wrong:
                problems.append(f"{folder / name / chunk.filename}: {wrong} documents {problem}")
            actual.max_token_id = max(actual.max_token_id, int(token_ids(stored).max()))
        actual.documents, actual.tokens = (sum(getattr(c, n) for c in tokens.chunks) for n in ("documents", "tokens"))
        keys = ("documents", "tokens", "max_token_id", "trained_tokens")
        if not problems and any(getattr(actual, key) != getattr(tokens, key) for key in keys):
            problems.append(f"{folder / MANIFEST}: the totals of {name} differ from its chunks")
        if index_problem := find_index_problem(folder, manifest, name):
            problems.append(index_problem)
    return problems
