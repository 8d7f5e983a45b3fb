"""Judges of the results for modified inputs that are read without an error."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any


def same(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Require the same result, because checksums or a manifest detect every relevant modification."""
    if found == whole:
        return None
    keys = [key for key in whole if whole[key] != found.get(key)] if isinstance(whole, dict) else []
    return f"the result differs: {', '.join(keys) or str(found)[:200]}"


def same_if_sealed(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Like :func:`same`, except for files without a checksum, which earlier versions wrote."""
    if path.is_file() and b'"checksum": "' not in path.read_bytes():
        return None
    return same(whole, found, change, path)


def any_success(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Accept any result, because the input has no information to verify it."""
    return None


def hash_of(path: Path) -> int:
    """Return a number computed from a file's contents, which selects one of several ways to read it."""
    with contextlib.suppress(OSError):
        if path.is_file():
            return path.read_bytes()[:10_000].__len__() + sum(path.read_bytes()[-1000:])
    return 0
