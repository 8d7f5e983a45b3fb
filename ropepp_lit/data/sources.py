"""Where documents come from: the built-in corpus and folders of text."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ropepp_lit.errors import UsageError

BUILTIN = "builtin"
"""The name of the corpus that every Python brings: the source code of its standard library."""


def find_files(source: str) -> tuple[Path, list[Path]]:
    """The files of a source, each of which is one document.

    Args:
        source: `builtin`, or a folder that is searched to the bottom; hidden files and folders are left out.

    Returns:
        The folder, and its files sorted by path.

    Raises:
        UsageError: the folder is missing, is a file, or holds no files.
    """
    if source == BUILTIN:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            path
            for path in root.rglob("*.py")
            if not {"site-packages", "test", "tests", "idle_test"} & set(path.relative_to(root).parts)
        ]
    else:
        root = Path(source).expanduser()
        if not root.is_dir():
            problem = "is not a folder" if root.exists() else "no such folder"
            raise UsageError(f"data.source: {source}: {problem}; name a folder of text files, or {BUILTIN!r}")
        files = [
            path
            for path in root.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
        ]
    if not files:
        raise UsageError(f"data.source: {root}: the folder holds no files; put text files there, one per document")
    return root, sorted(files, key=lambda path: path.relative_to(root).as_posix())


def read_documents(files: list[Path]) -> Iterator[tuple[Path, str | None]]:
    """The text of each file, in order; None where a file is not UTF-8 or is empty.

    Args:
        files: What :func:`find_files` found.
    """
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        except OSError as error:
            raise UsageError(f"data.source: {path}: {error.strerror}; make it readable or remove it") from error
        yield path, text or None
