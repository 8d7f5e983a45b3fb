"""Formats of files of documents: a table of endings and compressions, checked against a file's first bytes."""

from __future__ import annotations

import bz2
import codecs
import csv
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet
from backports import zstd

from ropepp_lit.errors import UsageError
from ropepp_lit.text.trained_spans import Span

FORMATS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".csv": "csv", ".tsv": "tsv",
}  # fmt: skip
"""Formats by ending, in any case and before the ending of a compression. Every other file is text."""

COMPRESSIONS = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
"""Endings of compressed files. Whether a file is compressed, and how, is read from its first bytes."""

MAX_DOCUMENT_BYTES = 2**28
"""Bytes of a document in a text file at most: a larger one is a file of many documents."""

CONVERT = "extract its text into .txt or .jsonl files first"
UNPACK = "unpack it first"
_WEIGHTS = "it stores tensors: name files of text"

_NOT_TEXT = {
    **dict.fromkeys(
        (
            ".pdf .doc .docx .odt .rtf .epub .ps .ppt .pptx .xls .xlsx .ods .ipynb .warc .wet "
            ".wat"
        ).split(),
        CONVERT,
    ),
    **dict.fromkeys(
        (
            ".zip .tar .tgz .7z .rar .lz4 .whl .jar .lzma .z"
        ).split(),
        UNPACK,
    ),
    **dict.fromkeys(
        (
            ".bin .safetensors .gguf .pt .pth .ckpt .npy .npz .pkl .pickle .h5 .hdf5 .onnx "
            ".model .msgpack"
        ).split(),
        _WEIGHTS,
    ),
    **dict.fromkeys(
        (
            ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .ico .mp3 .mp4 .wav .flac .ogg .avi "
            ".mov"
        ).split(),
        CONVERT,
    ),
    **dict.fromkeys(
        (
            ".pyc .so .o .a .dll .exe .class .db .sqlite .sqlite3 .idx .orc .avro .tfrecord "
            ".lance"
        ).split(),
        CONVERT,
    ),
}  # fmt: skip
"""Endings of files that are not text, and what to do with them."""

_SIGNATURES = (
    (b"version https://git-lfs", "a git-lfs pointer instead of the file", "fetch the file by `git lfs pull`"),
    (b"%PDF-", "a PDF document", CONVERT),
    (b"%!PS", "a PostScript document", CONVERT),
    (b"{\\rtf", "an RTF document", CONVERT),
    (b"WARC/", "a web archive (WARC)", CONVERT),
    (b"PK\x03\x04", "a zip archive or an office document", UNPACK),
    (b"\x04\x22\x4d\x18", "compressed by lz4", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"\x1f\x9d", "compressed by compress", UNPACK),
    (b"\xff\xfe\0\0", "UTF-32 text", "convert it by `iconv -f UTF-32 -t UTF-8`"),
    (b"\0\0\xfe\xff", "UTF-32 text", "convert it by `iconv -f UTF-32 -t UTF-8`"),
    (b"\xff\xfe", "UTF-16 text", "convert it by `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "UTF-16 text", "convert it by `iconv -f UTF-16 -t UTF-8`"),
    (b"\x89PNG", "an image", CONVERT),
    (b"\xff\xd8\xff", "an image", CONVERT),
    (b"GIF8", "an image", CONVERT),
)
"""First bytes of files that are not what can be read, what these are, and what to do with them."""

_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*\"[^\"\n]*\"\s*:")
"""How a file of JSON objects begins."""

BROKEN = (
    OSError, EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError, pyarrow.ArrowException, csv.Error, UnicodeDecodeError
)  # fmt: skip
"""What readers raise for a damaged file; the last one for names of a table's columns."""


class Record(NamedTuple):
    """A document, or a row that one is made of, or why there is none."""

    text: str | None
    problem: str | None
    where: str
    """The file, and the line, row or piece in it."""
    remedy: str = "correct it"
    """What to do about the problem."""
    row: dict[str, Any] | None = None
    """Values by key or column, where :attr:`Options.columns` names them."""
    spans: list[Span] | None = None
    """What of the text is trained; None where all of it is."""
    notices: tuple[str, ...] = ()
    """What people should know of a document that is kept."""
    second: int | None = None
    """Where in the text that of the rejected answer begins, in a pair."""


@dataclass(frozen=True, kw_only=True)
class Options:
    r"""How documents are read from files.

    Args:
        text_key: Key or column of the text in JSON and tables.
        split: What separates documents in text files, with escapes such as `\n`; a line end in it stands for
            CRLF too. Empty means that each text file is one document.
        columns: Instead of texts, read rows with these keys or columns, as far as they are there.

    Raises:
        UsageError: `split` is empty text or ends within an escape.
    """

    text_key: str = "text"
    split: str | None = None
    columns: tuple[str, ...] = ()

    def found(self, names: Iterable[object]) -> list[str]:
        """Those of a row's keys or a table's columns that are read."""
        wanted = self.columns or (self.text_key,)
        present = set(names)
        return [name for name in wanted if name in present]

    def missing(self, names: Iterable[object], kind: str, where: str) -> Record:
        """The record of a row or table with none of them; `kind` is what the names are called."""
        wanted, what = (self.columns, "messages") if self.columns else ((self.text_key,), "text")
        listed = ", ".join(map(str, names)) or "none"
        remedy = f"name the {kind} of the {what} by text_key ({kind}s: {listed})"
        return Record(None, f"no {kind} {' or '.join(map(repr, wanted))}", where, remedy)

    def __post_init__(self) -> None:
        if self.split is not None and not self._separator:
            raise UsageError("split: an empty separator; name what stands between documents, such as '\\n\\n'")

    @cached_property
    def _separator(self) -> bytes:
        assert self.split is not None
        try:
            return unescape(self.split).encode("utf-8")
        except UnicodeError as error:
            raise UsageError(f"split: {self.split!r} is not a text") from error

    @cached_property
    def separator(self) -> re.Pattern[bytes] | None:
        """A pattern of what separates documents in text files, by bytes."""
        if self.split is None:
            return None
        return re.compile(re.escape(self._separator).replace(b"\\\n", b"\r?\n"))


def unescape(text: str) -> str:
    r"""A text of a command line, in which `\n`, `\r`, `\t`, `\f`, `\v`, `\\`, `\xNN` and `\uNNNN` are escapes."""
    pattern = r"\\(?:[nrtfv\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"
    return re.sub(pattern, lambda match: codecs.decode(match[0], "unicode_escape"), text)


def kind_of(name: str) -> str:
    """The format that a file's name promises: json, parquet, arrow, csv, tsv or text."""
    return FORMATS.get(ending_of(name), "text")


def ending_of(name: str) -> str:
    """The ending of a file's name in small letters, without that of a compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def find_problem(path: Path, name: str) -> Record | None:
    """Why a file cannot be one of documents, by its name and first bytes; empty where nothing is known against it."""
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            stream = stack.enter_context(decompressed(raw))
            return problem_of(stream.peek(4096)[:4096], name)
    except BROKEN as error:
        return Record(None, f"unreadable: {line_of(error)}", name, "replace it by a whole copy")


def decompressed(raw: IO[bytes]) -> io.BufferedReader:
    """A stream of what a file contains, by the first bytes and not by the name."""
    assert isinstance(raw, io.BufferedReader)
    head = raw.peek(6)[:6]
    stream: Any
    if head.startswith(b"\x1f\x8b"):
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "gzip")
    elif head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        longest = {int(zstd.DecompressionParameter.window_log_max): 31}  # by `zstd --long=31`; by default 27
        stream = zstd.ZstdFile(raw, options=longest)
    elif head.startswith(b"BZh"):
        stream = _Streams(raw, bz2.BZ2Decompressor)
    elif head.startswith(b"\xfd7zXZ\x00"):
        stream = _Streams(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
    else:
        return raw
    return io.BufferedReader(stream, 2**20)


class _Streams(io.RawIOBase):
    """What streams of bz2 or xz contain that stand one after the other, also with zero bytes between and behind them.

    The classes of Python's library end at what is no stream, such as such zeros, and say nothing of what follows.
    """

    def __init__(self, raw: io.BufferedReader, make: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._raw, self._make = raw, make
        self._decompressor = make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            more = b""
            if self._decompressor.eof:
                more = self._decompressor.unused_data.lstrip(b"\0")
                while not more:
                    block = self._raw.read(2**16)
                    if not block:
                        return 0
                    more = block.lstrip(b"\0")
                self._decompressor = self._make()
            elif self._decompressor.needs_input:
                more = self._raw.read(2**16)
                if not more:
                    raise EOFError("it ends within a compressed stream")
            data = self._decompressor.decompress(more, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def problem_of(head: bytes, name: str) -> Record | None:
    """Why a file cannot be one of documents, by its name and its first bytes behind a compression."""
    for signature, problem, remedy in _SIGNATURES:
        if head.startswith(signature):
            return Record(None, problem, name, remedy)
    if kind_by_content(head, name) in ("parquet", "arrow"):
        return None
    if ending_of(name) in _NOT_TEXT:
        return Record(None, f"a {ending_of(name)} file is not text", name, _NOT_TEXT[ending_of(name)])
    if b"\0" in head:
        return Record(None, "a binary file (NUL bytes)", name, CONVERT)
    return None


def kind_by_content(head: bytes, name: str) -> str:
    """The format of a file: tables by their first bytes, others by the name.

    JSON is known by its first bytes too where the name has no ending of another format: Spark's `part-00000`,
    `rows.jsonl.1`, a `.txt` file.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    ending = ending_of(name)
    if (ending == ".txt" or not ending[1:].isalpha()) and kind_of(name) == "text" and _JSON.match(head):
        return "json"
    return kind_of(name)


def line_of(error: Exception) -> str:
    """The first line of an error's message."""
    return ((getattr(error, "strerror", None) or str(error)) or type(error).__name__).splitlines()[0]
