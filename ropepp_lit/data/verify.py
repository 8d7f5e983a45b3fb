"""Reads all that a folder of token shards holds, and compares it with the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ropepp_lit.data.shards import MANIFEST, Manifest, TokenSet, TokenShards, fault_of_index
from ropepp_lit.data.trained_tokens import REJECTED, is_trained, token_ids
from ropepp_lit.errors import UsageError


def verify(folder: Path) -> list[str]:
    """Read all that a folder of token shards holds, and compare it with the manifest.

    Args:
        folder: Of the manifest.

    Returns:
        One line for each fault, with the file's name; empty where all is as it was written.
    """
    manifest = Manifest.read(folder)
    faults = []
    try:
        manifest.read_tokenizer(folder)
    except UsageError as error:
        faults.append(str(error))
    for name, tokens in manifest.splits.items():
        found = TokenSet()
        for chunk in tokens.chunks:
            try:
                stored, offsets = TokenShards(folder, manifest, name, [chunk]).open_chunk(0)
            except UsageError as error:
                faults.append(str(error))
                continue
            bounds = (offsets.astype(np.int64) - int(offsets[0])) // stored.itemsize
            if manifest.marks_trained_tokens:
                trained = is_trained(stored)
                found.trained_tokens += int(trained.sum())
                starts = np.union1d(bounds[:-1], np.flatnonzero(stored < REJECTED))
                trained[starts] = False  # what is first is never predicted
                wrong = int((np.add.reduceat(trained, starts, dtype=np.int64) == 0).sum())
                wrong += abs(len(starts) - (1 + manifest.holds_pairs) * (len(bounds) - 1))
                problem = "have no trained token behind their first"
                problem += ", or are no pairs of answers" if manifest.holds_pairs else ""
            else:
                wrong = int((stored[bounds[1:] - 1] != manifest.eos_token_id).sum())
                problem = f"do not end with the token {manifest.eos_token_id}"
            if wrong:
                faults.append(f"{folder / name / chunk.filename}: {wrong} documents {problem}")
            found.max_token_id = max(found.max_token_id, int(token_ids(stored).max()))
        found.documents, found.tokens = (sum(getattr(c, n) for c in tokens.chunks) for n in ("documents", "tokens"))
        keys = ("documents", "tokens", "max_token_id", "trained_tokens")
        if not faults and any(getattr(found, key) != getattr(tokens, key) for key in keys):
            faults.append(f"{folder / MANIFEST}: the totals of {name} are not those of its chunks")
        if fault := fault_of_index(folder, manifest, name):
            faults.append(fault)
    return faults
