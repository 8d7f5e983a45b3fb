"""Where documents come from: the built-in corpus, text files, JSON lines and parquet, in one order for ever."""

from __future__ import annotations

import glob
import io
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from ropepp_lit.errors import UsageError

BUILTIN = "builtin"
"""The name of the corpus that every Python brings: the source code of its standard library."""

JSON_LINES = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
"""Endings of files whose lines are JSON objects, and how they are compressed."""


HUB = "hf:"
"""What the name of a Hugging Face dataset begins with."""


@dataclass(frozen=True)
class SourceFile:
    """A file of documents."""

    path: Path
    name: str
    """As messages and fingerprints call it: the path as it was found."""

    @property
    def num_bytes(self) -> int:
        """Size on the disk; 0 where the file is gone."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def identity(self) -> list:
        """Changes when the file does."""
        stat = self.path.stat()
        return [self.name, stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class HubDataset:
    """A dataset that the library `datasets` streams: from the Hub, or a folder that it can read."""

    name: str
    """As it was given: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`."""
    path: str
    config: str | None
    split: str
    num_bytes: int = 0
    """Not known."""

    @property
    def identity(self) -> list:
        """Changes when the dataset does: the Hub's commit, or sizes and times of a folder's files."""
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return [self.name, [SourceFile(path, str(path)).identity for path in files]]
        from huggingface_hub import HfApi

        try:
            return [self.name, HfApi().dataset_info(self.path, timeout=20).sha]
        except Exception as error:  # httpx's, and the Hub's own
            raise UsageError(f"{self.name}: {_line(error)}; check the name and the connection") from error

    def rows(self) -> Iterator[dict]:
        """The dataset's rows, in order.

        Raises:
            UsageError: no such dataset, or it cannot be read to its end.
        """
        try:
            import datasets
        except ImportError as error:
            raise UsageError(f"{self.name}: needs the library datasets: pip install 'ropepp-lit[datasets]'") from error
        try:
            yield from datasets.load_dataset(self.path, self.config, split=self.split, streaming=True)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            # Not a record that could be skipped: everything behind it would be lost.
            raise UsageError(f"{self.name}: {_line(error)}; mended, run the same command again") from error


Source = SourceFile | HubDataset


class Record(NamedTuple):
    """A document, or why there is none."""

    text: str | None
    problem: str | None
    where: str
    """The file, and the line or row in it."""


class Cursor(NamedTuple):
    """A place between two documents of the stream."""

    file: int
    record: int


def find_files(sources: Sequence[str], *, key: str) -> list[Source]:
    """The files of sources, in order: sources as given, files within a source by path.

    Args:
        sources: Each `builtin`, a file, a folder (searched to the bottom, hidden files and folders left out), a glob,
            or `hf:` and the name of a Hugging Face dataset, with its split or its configuration and split behind
            colons.
        key: What the user calls them, for messages.

    Raises:
        UsageError: a source does not exist or holds no files.
    """
    return [file for source in sources for file in _find(source, key)]


def _find(source: str, key: str) -> list[Source]:
    if source.startswith(HUB):
        name, *rest = source.removeprefix(HUB).split(":")
        if not name or len(rest) > 2:
            raise UsageError(f"{key}: {source}: write {HUB}NAME, {HUB}NAME:SPLIT or {HUB}NAME:CONFIG:SPLIT")
        return [HubDataset(source, name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train")]
    if source == BUILTIN:
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {"site-packages", "test", "tests", "idle_test"}
        paths = [path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    else:
        root = Path(source).expanduser()
        if root.is_file():
            return [SourceFile(root, str(root))]
        if root.is_dir():
            paths = [
                path
                for path in root.rglob("*")
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
            ]
        elif glob.has_magic(source):
            paths = [path for path in map(Path, glob.glob(str(root), recursive=True)) if path.is_file()]
        else:
            raise UsageError(f"{key}: {source}: no such file or folder; name text files or folders, or {BUILTIN!r}")
    if not paths:
        raise UsageError(f"{key}: {source}: holds no files; put text, JSON lines or parquet there")
    return [SourceFile(path, str(path)) for path in sorted(paths, key=lambda path: path.as_posix())]


START = Cursor(0, 0)


class Reader:
    """The documents of files, one after the other, from any place of the stream.

    Args:
        files: What :func:`find_files` found.
        text_key: Key or column of the text in JSON lines and parquet.
        start: Where to begin.
    """

    def __init__(self, files: Sequence[Source], *, text_key: str = "text", start: Cursor = START) -> None:
        self._files, self._text_key, self._start = files, text_key, start
        self.bytes_read = 0
        """Bytes of the files read so far, compressed ones as they lie on the disk."""

    def __iter__(self) -> Iterator[tuple[Cursor, Record]]:
        """Each record, and the place behind it."""
        for index, file in enumerate(self._files):
            size = file.num_bytes
            if index < self._start.file:
                self.bytes_read += size
                continue
            before = self.bytes_read
            for number, record in enumerate(self._read(file, before), start=1):
                if index > self._start.file or number > self._start.record:
                    yield Cursor(index, number), record
            self.bytes_read = before + size

    def _read(self, file: Source, before: int) -> Iterator[Record]:
        if isinstance(file, HubDataset):
            for number, row in enumerate(file.rows(), start=1):
                yield self._pick(row, f"{file.name}:{number}")
            return
        kinds = [kind for kind in JSON_LINES if file.path.name.endswith(kind)]
        try:
            if kinds:
                yield from self._read_lines(file, JSON_LINES[kinds[0]], before)
            elif file.path.name.endswith(".parquet"):
                yield from self._read_rows(file, before)
            else:
                yield _decode(file.path.read_bytes(), file.name)
        except OSError as error:  # pyarrow's errors of damaged files among them
            yield Record(None, f"unreadable: {error.strerror or _line(error)}", file.name)
        except pyarrow.ArrowException as error:
            yield Record(None, f"unreadable: {_line(error)}", file.name)

    def _read_lines(self, file: SourceFile, compression: str | None, before: int) -> Iterator[Record]:
        raw = pyarrow.OSFile(str(file.path))
        stream = pyarrow.CompressedInputStream(raw, compression) if compression else raw
        for number, line in enumerate(io.BufferedReader(stream, 2**20), start=1):
            self.bytes_read = before + raw.tell()
            if line.strip():
                yield self._parse(line, f"{file.name}:{number}")

    def _parse(self, line: bytes, where: str) -> Record:
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            return Record(None, "not UTF-8", where)
        except (ValueError, RecursionError):
            return Record(None, "broken JSON", where)
        return self._pick(value, where)

    def _pick(self, value: object, where: str) -> Record:
        """The text in a row."""
        if not isinstance(value, dict) or self._text_key not in value:
            return Record(None, f"no key {self._text_key!r}", where)
        return _check(value[self._text_key], where)

    def _read_rows(self, file: SourceFile, before: int) -> Iterator[Record]:
        size = file.path.stat().st_size
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            if self._text_key not in parquet.schema_arrow.names:
                yield Record(None, f"no column {self._text_key!r}", file.name)
                return
            number = 0
            for batch in parquet.iter_batches(batch_size=256, columns=[self._text_key]):
                for value in batch.column(0):
                    number += 1
                    self.bytes_read = before + size * number // parquet.metadata.num_rows
                    yield _check(value.as_py(), f"{file.name}:{number}")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _decode(data: bytes, where: str) -> Record:
    try:
        return _check(data.decode("utf-8"), where)
    except UnicodeDecodeError:
        return Record(None, "not UTF-8", where)


def _check(text: object, where: str) -> Record:
    if not isinstance(text, str):
        return Record(None, "the text is not a string", where)
    if not text:
        return Record(None, "empty", where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return Record(None, "not UTF-8", where)
    return Record(text, None, where)
