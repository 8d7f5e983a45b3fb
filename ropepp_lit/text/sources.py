"""Where documents come from: the built-in corpus, files of text, JSON and tables, and datasets, in one order."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ropepp_lit.errors import UsageError
from ropepp_lit.files import escaped, nearest_file, write_whole
from ropepp_lit.json_files import read_json
from ropepp_lit.text.formats import Options, Record, ending_of, find_problem, kind_of
from ropepp_lit.text.hub import HUB, HubDataset
from ropepp_lit.text.readers import pick, read_file, without_nulls

BUILTIN = "builtin"
"""The name of the corpus that every Python brings: the source code of its standard library."""

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are identified by all of their bytes, larger ones by their size and by samples."""

SAMPLES, SAMPLE_BYTES = 64, 2**16
"""How many blocks of a larger file count, from its beginning to its end at equal distances, and how long they are."""

_METADATA = ("readme", "license", "licence", "notice", "copying", "citation", "changelog", "authors", "contributing")
"""How files about a corpus are called, whatever their ending."""

_METADATA_FILES = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json",
    "manifest.json", "index.json", "croissant.json", "requirements.txt", "_success",
    "md5sums", "sha256sums", "checksums.txt", "md5sum.txt", "sha256sum.txt",
}  # fmt: skip


def printable(path: object) -> str:
    """A path for messages: bytes that are not UTF-8 and control characters, such as line ends, are escaped."""
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", lambda match: repr(match[0])[1:-1], escaped(str(path)))


@dataclass(frozen=True)
class SourceFile:
    """A file of documents."""

    path: Path
    name: str
    """As messages call it: the path as it was found, printable."""

    @property
    def kind(self) -> str:
        """The format that the name promises."""
        return kind_of(self.path.name)

    @property
    def num_bytes(self) -> int:
        """Size on the disk; 0 where the file is gone."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def problem(self) -> Record | None:
        """Why the file cannot be one of documents, as far as its name and first bytes say."""
        return find_problem(self.path, self.name)


Source = SourceFile | HubDataset


class LeftOut(NamedTuple):
    """A file of a folder that is not read."""

    name: str
    reason: str


class Found(NamedTuple):
    """The files of sources, in order, and those beside them that are not read."""

    files: list[Source]
    left_out: list[LeftOut]


class Cursor(NamedTuple):
    """A place between two documents of the stream."""

    file: int
    record: int
    state: dict | None = None
    """Of a dataset's stream: from where it can go on."""


START = Cursor(0, 0)


def find(sources: Sequence[str], *, key: str) -> Found:
    """The files of sources, in order: sources as given, files within a source by path.

    A folder is searched to the bottom, links followed; each real file counts once, in all sources together. Hidden
    files and folders are left out, and so are folders of token shards. Where a folder has files of JSON or tables, only
    these and .txt files are documents; files about a corpus (README, LICENSE, dataset_info.json and the like) are not,
    unless a folder has nothing else of their ending. Of a folder that `datasets` saved (`save_to_disk`) the tables are
    read that it names.

    Args:
        sources: Each `builtin`, a file, a folder, a glob, or `hf:` and the name of a Hugging Face dataset, with its
            split or its configuration and split behind colons.
        key: What the user calls them, for messages.

    Raises:
        UsageError: a source does not exist or has no files.
    """
    found = Found([], [])
    for source in sources:
        files, left_out = _find(source, key)
        found.files.extend(files)
        found.left_out.extend(left_out)
    return Found(_once(found.files, found.left_out), found.left_out)


def find_files(sources: Sequence[str], *, key: str) -> list[Source]:
    """The files of :func:`find` alone."""
    return find(sources, key=key).files


def _find(source: str, key: str) -> Found:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) and not os.path.exists(source):
        raise UsageError(
            f"{key}: {source}: text is read from this machine; copy it here, or name a dataset as {HUB}NAME (token "
            "shards alone are read from s3:// and gs://)"
        )
    if source.startswith(HUB):
        return Found([HubDataset.from_name(source, key=key)], [])
    if not source.strip():  # as a path it would be the current folder
        raise UsageError(f"{key}: an empty name among the sources; name files or folders of text, or {BUILTIN!r}")
    left_out: list[LeftOut] = []
    if source == BUILTIN:
        root = Path(sysconfig.get_path("stdlib"))
        names = {"site-packages", "test", "tests", "idle_test"}
        paths = sorted(path for path in root.rglob("*.py") if not names & set(path.relative_to(root).parts))
    else:
        root = Path(source).expanduser()
        if root.is_file():
            return Found([SourceFile(root, printable(root))], [])
        if root.is_dir():
            paths = list(_walk(root, left_out, key))
        elif root.exists():
            raise UsageError(f"{key}: {printable(source)}: not a regular file (a pipe or device); write it to a file")
        elif glob.has_magic(source):
            paths = [path for path in map(Path, glob.glob(str(root), recursive=True)) if path.is_file()]
        else:
            raise UsageError(
                f"{key}: {printable(source)}: no such file or folder; name files or folders of text, or {BUILTIN!r}"
                f"{nearest_file(root)}"
            )
        paths.sort(key=lambda path: path.as_posix())
        paths = _documents(paths, left_out)
    if not paths:
        raise UsageError(f"{key}: {printable(source)}: no files there; put text, JSON or tables there")
    return Found([SourceFile(path, printable(path)) for path in paths], left_out)


def _walk(root: Path, left_out: list[LeftOut], key: str) -> Iterator[Path]:
    """Files below a folder; each real folder is entered once, so that links in circles end."""
    entered: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise UsageError(f"{key}: {printable(error.filename)}: {error.strerror}; allow reading it, or name its files")

    for name, folders, files in os.walk(root, followlinks=True, onerror=fail):
        folder, stat = Path(name), os.stat(name)
        if (stat.st_dev, stat.st_ino) in entered:
            left_out.append(LeftOut(printable(folder), "a link to a folder that is read already"))
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        # Real folders first: where a link leads to one of them, files keep the names of the real one.
        folders[:] = sorted((f for f in folders if f[0] != "."), key=lambda f: (os.path.islink(folder / f), f))
        if "dataset_dict.json" in files:
            names = ", ".join(printable(folder / f) for f in sorted(folders))
            raise UsageError(f"{key}: {printable(folder)}: a DatasetDict of several splits; name one of them: {names}")
        if {"manifest.json", "tokenizer.json"} <= set(files):
            left_out.append(LeftOut(printable(folder), "token shards of `prepare`, not documents"))
            folders.clear()
            continue
        if {"state.json", "dataset_info.json"} <= set(files):
            yield from _saved(folder, key)
            folders.clear()
            continue
        for file in files:
            path = folder / file
            if path.is_file() and file[0] != ".":
                yield path
            elif file[0] != ".":
                left_out.append(LeftOut(printable(path), "a broken link, or not a regular file"))


def _saved(folder: Path, key: str) -> Iterator[Path]:
    """The tables of a folder of `save_to_disk`, those that its state names."""
    try:
        state = read_json(folder / "state.json")
        names = [file["filename"] for file in state["_data_files"]]
        whole = all(Path(name).name == name and (folder / name).is_file() for name in names)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole or state.get("_indices_data_files"):
        raise UsageError(
            f"{key}: {printable(folder)}: its state.json does not name tables that are all there; save it again by "
            "datasets' save_to_disk"
        )
    yield from (folder / name for name in names)


def _documents(paths: list[Path], left_out: list[LeftOut]) -> list[Path]:
    """The files that are documents, by what stands beside them."""

    def is_metadata(path: Path) -> bool:
        name = path.name.lower()
        return name in _METADATA_FILES or name.split(".")[0].split("-")[0].split("_")[0] in _METADATA

    endings = {ending_of(path.name) for path in paths if not is_metadata(path)}
    has_data = any(kind_of(path.name) != "text" for path in paths if not is_metadata(path))
    documents = []
    for path in paths:
        if is_metadata(path) and endings and (has_data or ending_of(path.name) not in endings):
            left_out.append(LeftOut(printable(path), "about the corpus, not a document"))
        elif has_data and kind_of(path.name) == "text" and ending_of(path.name) != ".txt":
            left_out.append(LeftOut(printable(path), "beside files of JSON or tables, not a document"))
        else:
            documents.append(path)
    return documents


def _once(files: list[Source], left_out: list[LeftOut]) -> list[Source]:
    """Each real file once: by the first of its names that is not a link, else by the first."""
    real = [os.path.realpath(file.path) if isinstance(file, SourceFile) else file.name for file in files]
    first: dict[str, int] = {}
    for place in sorted(range(len(files)), key=lambda place: real[place] != os.path.abspath(files[place].path)):
        first.setdefault(real[place], place)
    kept = set(first.values())
    left_out += [
        LeftOut(file.name, "a second name of a file that is read")
        for place, file in enumerate(files) if place not in kept
    ]  # fmt: skip
    return [file for place, file in enumerate(files) if place in kept]


def identify(files: Sequence[Source], *, cache_dir: Path | None = None) -> list[Any]:
    """What tells these sources from others: contents and their order, not paths and times.

    A file of up to 64 MiB counts with all of its bytes. Of a larger one its size and 64 blocks of 64 KiB do, spread
    evenly from beginning to end: a change that keeps the size and leaves those as they are is not seen.

    Args:
        files: What :func:`find` found.
        cache_dir: Where digests are kept by path, size and time, so that unchanged files are not read again; empty
            means `ropepp_lit/digests` in the user's cache folder.

    Raises:
        UsageError: a file or dataset cannot be read.
    """
    folder = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ropepp_lit" / "digests"
    with ThreadPoolExecutor(max_workers=4) as executor:
        return list(executor.map(lambda file: _identity(file, folder), files))


def _identity(file: Source, folder: Path) -> list[Any]:
    if isinstance(file, HubDataset):
        if file.folder is None:
            return [file.path, file.commit, file.config, file.split]
        paths = sorted(path for path in file.folder.rglob("*") if path.is_file())
        return [[_identity(SourceFile(path, printable(path)), folder) for path in paths], file.config, file.split]
    try:
        return [kind_of(file.path.name), *_digest(file.path, folder)]
    except OSError as error:
        raise UsageError(f"{file.name}: {error.strerror}; allow reading it, or leave it out") from error


def _digest(path: Path, folder: Path) -> list[Any]:
    """Size and SHA-256."""
    stat = path.stat()
    if stat.st_size <= 2**20:
        return [stat.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    known = [os.fsencode(os.path.realpath(path)).hex(), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    entry = folder / hashlib.sha256(json.dumps(known).encode()).hexdigest()
    try:
        return [stat.st_size, entry.read_text(encoding="ascii")]
    except OSError:
        pass
    with path.open("rb") as file:
        if stat.st_size <= WHOLE_BYTES:
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
    except OSError:  # read-only or full: the file is read again next time
        pass
    return [stat.st_size, digest]


class Reader:
    """The documents of files, one after the other, from any place of the stream.

    Args:
        files: What :func:`find_files` found.
        text_key: Key or column of the text in JSON and tables.
        split: What separates documents in text files; empty means that each file is one.
        columns: Instead of texts, read rows with these keys or columns.
        start: Where to begin.

    Raises:
        UsageError: see :class:`~ropepp_lit.text.formats.Options`.
    """

    def __init__(
        self,
        files: Sequence[Source],
        *,
        text_key: str = "text",
        split: str | None = None,
        columns: tuple[str, ...] = (),
        start: Cursor = START,
    ) -> None:
        self._files, self._start = files, start
        self._options = Options(text_key=text_key, split=split, columns=columns)
        self.bytes_read = 0
        """Bytes of the files read so far, compressed ones as they lie on the disk."""

    def __iter__(self) -> Iterator[tuple[Cursor, Record]]:
        """Each record, and the place behind it."""
        for index, file in enumerate(self._files):
            before, skip, begin = self.bytes_read, 0, None
            if index == self._start.file:
                skip, begin = self._start.record, self._start.state
            if index >= self._start.file:
                if isinstance(file, HubDataset):
                    for number, (row, state) in enumerate(file.rows(skip, begin), start=skip + 1):
                        value = without_nulls(row) if self._options.columns else row
                        yield Cursor(index, number, state), pick(value, f"{file.name}:{number}", self._options)
                else:
                    records = read_file(file.path, file.name, self._options, skip=skip, progress=self._advance(before))
                    for number, record in enumerate(records, start=skip + 1):
                        yield Cursor(index, number), record
            self.bytes_read = before + file.num_bytes

    def _advance(self, before: int) -> Any:
        def advance(num_bytes: int) -> None:
            self.bytes_read = before + num_bytes

        return advance
