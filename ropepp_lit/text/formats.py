"""File formats of documents: extensions and compressions, and detection by a file's first bytes."""

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
"""Format by file extension (case-insensitive, without that of a compression). All other files are text."""

COMPRESSIONS = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
"""Extensions of compressed files. The compression itself is detected from a file's first bytes."""

MAX_DOCUMENT_BYTES = 2**28
"""Maximum bytes of a document in a text file; a larger file is assumed to contain many documents."""

CONVERT = "extract its text into .txt or .jsonl files first"
UNPACK = "unpack it first"
_WEIGHTS = "it stores tensors: pass text files"

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
"""Extensions of files that are not text, with the remedy for each."""

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
"""First bytes of unsupported files, with their description and the remedy."""

_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*\"[^\"\n]*\"\s*:")
"""How a file of JSON objects begins."""

BROKEN = (
    OSError, EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError, pyarrow.ArrowException, csv.Error, UnicodeDecodeError
)  # fmt: skip
"""What readers raise for a damaged file; the last one for names of a table's columns."""


class Record(NamedTuple):
    """A document, a row from which one is rendered, or the problem of a record that cannot be read."""

    text: str | None
    problem: str | None
    where: str
    """File, and line, row or piece number in it."""
    remedy: str = "correct it"
    """Instruction for fixing the problem."""
    row: dict[str, Any] | None = None
    """Values by key or column, if :attr:`ReadOptions.columns` is set."""
    spans: list[Span] | None = None
    """Trained spans of the text; None if all of it is trained."""
    notices: tuple[str, ...] = ()
    """Notices about a document that is kept."""
    rejected_start: int | None = None
    """Index in the text at which the rejected answer's text begins; None if the record is not a pair."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    r"""Options for reading documents from files.

    Args:
        text_key: Key or column of the text in JSON and tables.
        split: Separator of documents in text files, with escapes such as `\n`; a line end in it also matches CRLF.
            None means that each text file is one document.
        columns: Instead of texts, read rows with those of these keys or columns that exist.

    Raises:
        UsageError: `split` is an empty string or is not valid Unicode.
    """

    text_key: str = "text"
    split: str | None = None
    columns: tuple[str, ...] = ()

    def select(self, names: Iterable[object]) -> list[str]:
        """Return those of a row's keys or a table's columns that are read."""
        requested = self.columns or (self.text_key,)
        present = set(names)
        return [name for name in requested if name in present]

    def missing(self, names: Iterable[object], kind: str, where: str) -> Record:
        """Return the record of a row or table with none of them; `kind` is `key` or `column`."""
        requested, content = (self.columns, "messages") if self.columns else ((self.text_key,), "text")
        listed = ", ".join(map(str, names)) or "none"
        remedy = f"set text_key to the {kind} of the {content} ({kind}s: {listed})"
        return Record(None, f"no {kind} {' or '.join(map(repr, requested))}", where, remedy)

    def __post_init__(self) -> None:
        if self.split is not None and not self._separator:
            raise UsageError("split: the separator is empty; pass the separator of documents, such as '\\n\\n'")

    @cached_property
    def _separator(self) -> bytes:
        assert self.split is not None
        try:
            return unescape(self.split).encode("utf-8")
        except UnicodeError as error:
            raise UsageError(f"split: {self.split!r} is not valid Unicode") from error

    @cached_property
    def separator(self) -> re.Pattern[bytes] | None:
        """Byte pattern of the separator of documents in text files."""
        if self.split is None:
            return None
        return re.compile(re.escape(self._separator).replace(b"\\\n", b"\r?\n"))


def unescape(text: str) -> str:
    r"""Replace the escapes `\n`, `\r`, `\t`, `\f`, `\v`, `\\`, `\xNN` and `\uNNNN` of a command-line argument."""
    pattern = r"\\(?:[nrtfv\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"
    return re.sub(pattern, lambda match: codecs.decode(match[0], "unicode_escape"), text)


def format_of(name: str) -> str:
    """Return the format by a file's name: json, parquet, arrow, csv, tsv or text."""
    return FORMATS.get(extension_of(name), "text")


def extension_of(name: str) -> str:
    """Return the extension of a file's name in lower case, ignoring that of a compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def find_problem(path: Path, name: str) -> Record | None:
    """Return why a file cannot contain documents, by its name and first bytes; None if no problem is found."""
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            stream = stack.enter_context(decompressed(raw))
            return find_problem_in_head(stream.peek(4096)[:4096], name)
    except BROKEN as error:
        return Record(None, f"unreadable: {first_line(error)}", name, "replace it by a complete copy")


def decompressed(raw: IO[bytes]) -> io.BufferedReader:
    """Return a stream of a file's decompressed content; the compression is detected from the first bytes."""
    assert isinstance(raw, io.BufferedReader)
    head = raw.peek(6)[:6]
    stream: Any
    if head.startswith(b"\x1f\x8b"):
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "gzip")
    elif head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        options = {int(zstd.DecompressionParameter.window_log_max): 31}  # for `zstd --long=31`; the default is 27
        stream = zstd.ZstdFile(raw, options=options)
    elif head.startswith(b"BZh"):
        stream = _ConcatenatedStreams(raw, bz2.BZ2Decompressor)
    elif head.startswith(b"\xfd7zXZ\x00"):
        stream = _ConcatenatedStreams(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
    else:
        return raw
    return io.BufferedReader(stream, 2**20)


class _ConcatenatedStreams(io.RawIOBase):
    """Content of concatenated bz2 or xz streams, also with zero bytes between and after them.

    The classes of Python's standard library stop silently at data that is not a stream, such as these zero bytes.
    """

    def __init__(
        self, raw: io.BufferedReader, create: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]
    ) -> None:
        self._raw, self._create = raw, create
        self._decompressor = create()

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
                self._decompressor = self._create()
            elif self._decompressor.needs_input:
                more = self._raw.read(2**16)
                if not more:
                    raise EOFError("the file ends within a compressed stream")
            data = self._decompressor.decompress(more, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def find_problem_in_head(head: bytes, name: str) -> Record | None:
    """Return why a file cannot contain documents, by its name and its first decompressed bytes."""
    for signature, problem, remedy in _SIGNATURES:
        if head.startswith(signature):
            return Record(None, problem, name, remedy)
    if detect_format(head, name) in ("parquet", "arrow"):
        return None
    if extension_of(name) in _NOT_TEXT:
        return Record(None, f"a {extension_of(name)} file is not text", name, _NOT_TEXT[extension_of(name)])
    if b"\0" in head:
        return Record(None, "a binary file (NUL bytes)", name, CONVERT)
    return None


def detect_format(head: bytes, name: str) -> str:
    """Return the format of a file: of tables by their first bytes, of others by the name.

    JSON is also detected by its first bytes if the name has no extension of another format: Spark's `part-00000`,
    `rows.jsonl.1`, a `.txt` file.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    ending = extension_of(name)
    if (ending == ".txt" or not ending[1:].isalpha()) and format_of(name) == "text" and _JSON.match(head):
        return "json"
    return format_of(name)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return ((getattr(error, "strerror", None) or str(error)) or type(error).__name__).splitlines()[0]
