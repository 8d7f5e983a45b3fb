"""Files that appear under their name only when they are complete, and what they contain."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, contents: str | bytes) -> None:
    """Write a file, text as UTF-8, that appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
