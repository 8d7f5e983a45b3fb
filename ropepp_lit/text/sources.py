"""Resolve sources (built-in corpus, files, folders, datasets) to inputs, and read their documents in order."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ropepp_lit.errors import UsageError
from ropepp_lit.files import escaped, nearest_file, write_whole
from ropepp_lit.json_files import read_json
from ropepp_lit.text.formats import ReadOptions, Record, extension_of, find_problem, format_of
from ropepp_lit.text.hub import HUB, HubDataset
from ropepp_lit.text.readers import read_file, record_of, without_nulls

BUILTIN = "builtin"
"""Name of the corpus that is part of every Python installation: the source code of its standard library."""

FULL_DIGEST_BYTES = 64 * 2**20
"""Maximum size of files that are identified by all of their bytes; larger ones by their size and samples."""

SAMPLES, SAMPLE_BYTES = 64, 2**16
"""Number and size of the evenly spaced blocks by which a larger file is identified."""

_METADATA = ("readme", "license", "licence", "notice", "copying", "citation", "changelog", "authors", "contributing")
"""Stems of the names of files about a corpus, with any extension."""

_METADATA_FILES = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json",
    "manifest.json", "index.json", "croissant.json", "requirements.txt", "_success",
    "md5sums", "sha256sums", "checksums.txt", "md5sum.txt", "sha256sum.txt",
}  # fmt: skip


def printable(path: object) -> str:
    """Format a path for messages: escape bytes that are not UTF-8 and control characters, such as line ends."""
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", lambda match: repr(match[0])[1:-1], escaped(str(path)))


@dataclass(frozen=True)
class SourceFile:
    """A local file of documents."""

    path: Path
    name: str
    """Printable path, for messages."""

    @property
    def kind(self) -> str:
        """Format by the file's name."""
        return format_of(self.path.name)

    @property
    def num_bytes(self) -> int:
        """Size on disk; 0 if the file no longer exists."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def problem(self) -> Record | None:
        """Why the file cannot contain documents, by its name and first bytes; None if no problem is found."""
        return find_problem(self.path, self.name)


Input = SourceFile | HubDataset
"""One input of the document stream. A source, as users pass it, resolves to one or more inputs."""


class IgnoredFile(NamedTuple):
    """A file of a folder that is not read, and the reason."""

    name: str
    reason: str


class Inputs(NamedTuple):
    """The inputs of sources, in order, and the files that are ignored."""

    files: list[Input]
    ignored: list[IgnoredFile]


class Cursor(NamedTuple):
    """A position between two records of the document stream."""

    file: int
    """Index of the input."""
    record: int
    """Number of records before the position in that input."""
    state: dict | None = None
    """State of a dataset's stream, from which it can resume."""


START = Cursor(0, 0)
"""The beginning of the document stream."""


def find_inputs(sources: Sequence[str], *, key: str) -> Inputs:
    """Resolve sources to inputs: sources in the given order, files within a source sorted by path.

    Folders are searched recursively, and links are followed; each real file is read once, across all sources. Hidden
    files and folders and folders of token shards are ignored. If a folder has JSON files or tables, only these and .txt
    files are documents. Files about a corpus (README, LICENSE, dataset_info.json and the like) are ignored, unless
    other text documents have the same extension or the source has no other files. Of a folder saved by `datasets`
    (`save_to_disk`), the tables listed in its state.json are read.

    Args:
        sources: Each is `builtin`, a file, a folder, a glob, or `hf:` and the name of a Hugging Face dataset,
            optionally followed by `:SPLIT` or `:CONFIG:SPLIT`.
        key: Name of the option, for messages.

    Raises:
        UsageError: A source does not exist or has no files.
    """
    inputs = Inputs([], [])
    for source in sources:
        files, ignored = _find_inputs(source, key)
        inputs.files.extend(files)
        inputs.ignored.extend(ignored)
    return Inputs(_unique(inputs.files, inputs.ignored), inputs.ignored)


def find_files(sources: Sequence[str], *, key: str) -> list[Input]:
    """Return the inputs of :func:`find_inputs`, without the ignored files."""
    return find_inputs(sources, key=key).files


def _find_inputs(source: str, key: str) -> Inputs:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) and not os.path.exists(source):
        raise UsageError(
            f"{key}: {source}: text can only be read from local files; copy it to this machine, or pass a dataset as "
            f"{HUB}NAME (only token shards are read from s3:// and gs://)"
        )
    if source.startswith(HUB):
        return Inputs([HubDataset.from_name(source, key=key)], [])
    if not source.strip():  # as a path it would be the current folder
        raise UsageError(f"{key}: a source has an empty name; pass files or folders of text, or {BUILTIN!r}")
    ignored: list[IgnoredFile] = []
    if source == BUILTIN:
        root = Path(sysconfig.get_path("stdlib"))
        names = {"site-packages", "test", "tests", "idle_test"}
        paths = sorted(path for path in root.rglob("*.py") if not names & set(path.relative_to(root).parts))
    else:
        root = Path(source).expanduser()
        if root.is_file():
            return Inputs([SourceFile(root, printable(root))], [])
        if root.is_dir():
            paths = list(_walk(root, ignored, key))
        elif root.exists():
            raise UsageError(f"{key}: {printable(source)}: not a regular file (a pipe or device); write it to a file")
        elif glob.has_magic(source):
            paths = [path for path in map(Path, glob.glob(str(root), recursive=True)) if path.is_file()]
        else:
            raise UsageError(
                f"{key}: {printable(source)}: no such file or folder; pass files or folders of text, or {BUILTIN!r}"
                f"{nearest_file(root)}"
            )
        paths.sort(key=lambda path: path.as_posix())
        paths = _documents(paths, ignored)
    if not paths:
        raise UsageError(f"{key}: {printable(source)}: it contains no files to read; add text, JSON or tables")
    return Inputs([SourceFile(path, printable(path)) for path in paths], ignored)


def _walk(root: Path, ignored: list[IgnoredFile], key: str) -> Iterator[Path]:
    """Iterate over the files below a folder; each real folder is entered once, so that cycles of links end."""
    entered: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise UsageError(f"{key}: {printable(error.filename)}: {error.strerror}; make it readable, or pass its files")

    for name, folders, files in os.walk(root, followlinks=True, onerror=fail):
        folder, stat = Path(name), os.stat(name)
        if (stat.st_dev, stat.st_ino) in entered:
            ignored.append(IgnoredFile(printable(folder), "a link to a folder that is already read"))
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        # Real folders first: if a link leads to one of them, its files are named by the real folder.
        folders[:] = sorted((f for f in folders if f[0] != "."), key=lambda f: (os.path.islink(folder / f), f))
        if "dataset_dict.json" in files:
            names = ", ".join(printable(folder / f) for f in sorted(folders))
            raise UsageError(
                f"{key}: {printable(folder)}: a DatasetDict with multiple splits; pass one of them: {names}"
            )
        if {"manifest.json", "tokenizer.json"} <= set(files):
            ignored.append(IgnoredFile(printable(folder), "token shards of `prepare`, not documents"))
            folders.clear()
            continue
        if {"state.json", "dataset_info.json"} <= set(files):
            yield from _saved_tables(folder, key)
            folders.clear()
            continue
        for file in files:
            path = folder / file
            if path.is_file() and file[0] != ".":
                yield path
            elif file[0] != ".":
                ignored.append(IgnoredFile(printable(path), "a broken link, or not a regular file"))


def _saved_tables(folder: Path, key: str) -> Iterator[Path]:
    """Iterate over the tables of a folder of `save_to_disk`, as listed in its state.json."""
    try:
        state = read_json(folder / "state.json")
        names = [file["filename"] for file in state["_data_files"]]
        is_complete = all(Path(name).name == name and (folder / name).is_file() for name in names)
    except (ValueError, KeyError, TypeError):
        is_complete = False
    if not is_complete or state.get("_indices_data_files"):
        raise UsageError(
            f"{key}: {printable(folder)}: tables listed in its state.json are missing, or it is damaged; save it "
            "again by datasets' save_to_disk"
        )
    yield from (folder / name for name in names)


def _documents(paths: list[Path], ignored: list[IgnoredFile]) -> list[Path]:
    """Return the files that contain documents, decided by the other files of the source."""

    def is_metadata(path: Path) -> bool:
        name = path.name.lower()
        return name in _METADATA_FILES or name.split(".")[0].split("-")[0].split("_")[0] in _METADATA

    endings = {extension_of(path.name) for path in paths if not is_metadata(path)}
    has_data = any(format_of(path.name) != "text" for path in paths if not is_metadata(path))
    documents = []
    for path in paths:
        if is_metadata(path) and endings and (has_data or extension_of(path.name) not in endings):
            ignored.append(IgnoredFile(printable(path), "about the corpus, not a document"))
        elif has_data and format_of(path.name) == "text" and extension_of(path.name) != ".txt":
            ignored.append(IgnoredFile(printable(path), "next to files of JSON or tables, not a document"))
        else:
            documents.append(path)
    return documents


def _unique(files: list[Input], ignored: list[IgnoredFile]) -> list[Input]:
    """Remove repeated names of a real file; keep the first name that is not a link, or else the first."""
    real = [os.path.realpath(file.path) if isinstance(file, SourceFile) else file.name for file in files]
    first: dict[str, int] = {}
    for index in sorted(range(len(files)), key=lambda index: real[index] != os.path.abspath(files[index].path)):
        first.setdefault(real[index], index)
    kept = set(first.values())
    ignored += [
        IgnoredFile(file.name, "another name of a file that is already read")
        for index, file in enumerate(files) if index not in kept
    ]  # fmt: skip
    return [file for index, file in enumerate(files) if index in kept]


def identify(files: Sequence[Input], *, cache_dir: Path | None = None) -> list[Any]:
    """Return values that identify the inputs by their contents and order, not by paths and times.

    A file of up to 64 MiB is identified by all of its bytes. A larger one is identified by its size and 64 evenly
    spaced blocks of 64 KiB: a change outside these blocks that keeps the size is not detected.

    Args:
        files: Inputs returned by :func:`find_inputs`.
        cache_dir: Folder that caches digests by path, size and time, so that unchanged files are not read again; None
            means `ropepp_lit/digests` in the user's cache folder.

    Raises:
        UsageError: A file or dataset cannot be read.
    """
    folder = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ropepp_lit" / "digests"
    with ThreadPoolExecutor(max_workers=4) as executor:
        return list(executor.map(lambda file: _identity(file, folder), files))


def _identity(file: Input, folder: Path) -> list[Any]:
    if isinstance(file, HubDataset):
        if file.folder is None:
            return [file.path, file.commit, file.config, file.split]
        paths = sorted(path for path in file.folder.rglob("*") if path.is_file())
        return [[_identity(SourceFile(path, printable(path)), folder) for path in paths], file.config, file.split]
    try:
        return [format_of(file.path.name), *_digest(file.path, folder)]
    except OSError as error:
        raise UsageError(f"{file.name}: {error.strerror}; make it readable, or remove it from the sources") from error


def _digest(path: Path, folder: Path) -> list[Any]:
    """Return the size and SHA-256 of a file."""
    stat = path.stat()
    if stat.st_size <= 2**20:
        return [stat.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    key = [os.fsencode(os.path.realpath(path)).hex(), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    entry = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()
    try:
        return [stat.st_size, entry.read_text(encoding="ascii")]
    except OSError:
        pass
    with path.open("rb") as file:
        if stat.st_size <= FULL_DIGEST_BYTES:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            sampled = hashlib.sha256()
            for number in range(SAMPLES):
                file.seek((stat.st_size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                sampled.update(file.read(SAMPLE_BYTES))
            digest = sampled.hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(entry, digest)
    except OSError:  # read-only or full: the file is hashed again next time
        pass
    return [stat.st_size, digest]


class Reader:
    """Reads the records of inputs sequentially, from any position of the stream.

    Args:
        files: Inputs returned by :func:`find_files`.
        text_key: Key or column of the text in JSON and tables.
        split: Separator of documents in text files; None means that each file is one document.
        columns: Instead of texts, read rows with these keys or columns.
        start: Position of the first record.

    Raises:
        UsageError: See :class:`~ropepp_lit.text.formats.ReadOptions`.
    """

    def __init__(
        self,
        files: Sequence[Input],
        *,
        text_key: str = "text",
        split: str | None = None,
        columns: tuple[str, ...] = (),
        start: Cursor = START,
    ) -> None:
        self._files, self._start = files, start
        self._options = ReadOptions(text_key=text_key, split=split, columns=columns)
        self.bytes_read = 0
        """Bytes read so far, before decompression."""

    def __iter__(self) -> Iterator[tuple[Cursor, Record]]:
        """Iterate over the records, each with the position after it."""
        for index, file in enumerate(self._files):
            before, skip, begin = self.bytes_read, 0, None
            if index == self._start.file:
                skip, begin = self._start.record, self._start.state
            if index >= self._start.file:
                if isinstance(file, HubDataset):
                    for number, (row, state) in enumerate(file.rows(skip, begin), start=skip + 1):
                        value = without_nulls(row) if self._options.columns else row
                        yield Cursor(index, number, state), record_of(value, f"{file.name}:{number}", self._options)
                else:
                    progress = self._progress_after(before)
                    records = read_file(file.path, file.name, self._options, skip=skip, progress=progress)
                    for number, record in enumerate(records, start=skip + 1):
                        yield Cursor(index, number), record
            self.bytes_read = before + file.num_bytes

    def _progress_after(self, before: int) -> Callable[[int], None]:
        def progress(num_bytes: int) -> None:
            self.bytes_read = before + num_bytes

        return progress
