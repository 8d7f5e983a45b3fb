"""Read the documents of one file, in each of the formats."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from ropepp_lit.json_files import parse_json
from ropepp_lit.text.formats import (
    BROKEN,
    CONVERT,
    MAX_DOCUMENT_BYTES,
    UNPACK,
    ReadOptions,
    Record,
    decompressed,
    detect_format,
    find_problem_in_head,
    first_line,
)


def read_file(
    path: Path, name: str, options: ReadOptions, *, skip: int = 0, progress: Callable[[int], None] = lambda _: None
) -> Iterator[Record]:
    """Iterate over the records of a file, in order. The last record of a damaged file states the problem.

    Args:
        path: Path of the file.
        name: Name of the file in messages.
        options: Options for reading.
        skip: Number of records at the beginning to skip, at little cost.
        progress: Called at intervals with the number of bytes read from the file, before decompression.
    """
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            stream = stack.enter_context(decompressed(raw))
            head = stream.peek(4096)[:4096]
            if problem := find_problem_in_head(head, name):
                if skip == 0:
                    yield problem
                return
            kind = detect_format(head, name)
            for number, record in enumerate(_records(raw, stream, kind, name, options, skip)):
                if number % 64 == 0:
                    progress(raw.tell())
                yield record
    except BROKEN as error:
        yield Record(None, f"unreadable: {first_line(error)}", name, "replace it by a complete copy")
    except MemoryError:  # a length in a damaged table
        yield Record(None, "unreadable: a stored length exceeds the memory", name, "replace it by a complete copy")


def _records(
    raw: IO[bytes], stream: io.BufferedReader, kind: str, name: str, options: ReadOptions, skip: int
) -> Iterator[Record]:
    if kind in ("parquet", "arrow") and stream is not raw:
        return iter([Record(None, "a compressed table", name, UNPACK)][skip:])
    if kind == "parquet":
        return _read_parquet(raw, name, options, skip)
    if kind == "arrow":
        return _read_arrow(raw, name, options, skip)
    if kind in ("csv", "tsv"):
        return _read_csv(stream, name, options, skip, "," if kind == "csv" else "\t")
    if kind == "json":
        return _read_json(stream, name, options, skip)
    if options.columns:
        return iter([Record(None, "a text file, without rows", name, "pass JSON files or tables")][skip:])
    if options.separator is not None:
        return _read_pieces(stream, name, options.separator, skip)
    return iter([_read_document(stream, name)] if skip == 0 else [])


def _read_json(stream: io.BufferedReader, name: str, options: ReadOptions, skip: int) -> Iterator[Record]:
    """Read JSON lines, an array, or objects that span multiple lines."""
    number = 0
    if stream.peek(3).startswith(codecs.BOM_UTF8):
        stream.read(3)
    while (head := stream.peek(1)[:1]) and head.isspace():
        number += stream.read(1) == b"\n"
    if head == b"[":
        yield from _read_values(b"", stream, name, options, skip)
        return
    for line in stream:
        number += 1
        if not line.strip():
            continue
        if line.strip() == b"{":
            yield from _read_values(line, stream, name, options, skip, before=number - 1)
            return
        if skip:
            skip -= 1
        else:
            yield _parse(line, f"{name}:{number}", options)


def _read_values(
    first: bytes, stream: io.BufferedReader, name: str, options: ReadOptions, skip: int, before: int = 0
) -> Iterator[Record]:
    """Read the elements of arrays, and objects outside of them, numbered after the first `before` ones."""
    decode, text = json.JSONDecoder().raw_decode, codecs.getreader("utf-8")(stream)
    buffer, at, number, in_array, ended = first.decode(), 0, 0, False, False
    try:
        while True:
            while at < len(buffer) and (buffer[at].isspace() or (in_array and buffer[at] == ",")):
                at += 1
            if at < len(buffer) and buffer[at] in "[]" and in_array == (buffer[at] == "]"):
                in_array, at = not in_array, at + 1
                continue
            if at < len(buffer):
                try:
                    value, at = decode(buffer, at)
                except ValueError:
                    if ended or len(buffer) - at > MAX_DOCUMENT_BYTES:
                        yield Record(None, "broken JSON", f"{name}:{before + number + 1}")
                        return
                else:
                    number += 1
                    if number > skip:
                        yield record_of(value, f"{name}:{before + number}", options)
                    continue
            elif ended:
                if in_array:
                    yield Record(None, "broken JSON: the array does not end", name)
                return
            more = text.read(max(2**20, len(buffer) - at))  # doubled, so that long values are not decoded many times
            buffer, at, ended = buffer[at:] + more, 0, not more
    except UnicodeDecodeError:
        yield Record(None, "not UTF-8", f"{name}:{before + number + 1}")
    except RecursionError:
        yield Record(None, "broken JSON", f"{name}:{before + number + 1}")


def _parse(line: bytes, where: str, options: ReadOptions) -> Record:
    try:
        value = parse_json(line)
    except UnicodeDecodeError:
        return Record(None, "not UTF-8", where)
    except ValueError:
        return Record(None, "broken JSON", where)
    return record_of(value, where, options)


def record_of(value: object, where: str, options: ReadOptions) -> Record:
    """Return the record of a row: its text, or the values of the requested columns."""
    if not isinstance(value, dict):
        names = " or ".join(map(repr, options.columns or (options.text_key,)))
        return Record(None, f"no key {names}", where, "store objects with a key for the text")
    keys = options.select(value)
    if not keys:
        return options.missing(value, "key", where)
    if options.columns:
        return Record(None, None, where, row={key: value[key] for key in keys})
    return _check(value[keys[0]], where)


def _read_parquet(raw: IO[bytes], name: str, options: ReadOptions, skip: int) -> Iterator[Record]:
    with pyarrow.parquet.ParquetFile(raw) as parquet:
        names = parquet.schema_arrow.names
        columns = options.select(names)
        if not columns:
            yield options.missing(names, "column", name)
            return
        groups, number = list(range(parquet.num_row_groups)), 0
        while groups and number + parquet.metadata.row_group(groups[0]).num_rows <= skip:
            number += parquet.metadata.row_group(groups.pop(0)).num_rows
        for batch in parquet.iter_batches(batch_size=256, row_groups=groups, columns=columns):
            batch.validate(full=True)
            yield from _rows(batch.select(columns), name, number, skip, options)
            number += len(batch)


def _read_arrow(raw: IO[bytes], name: str, options: ReadOptions, skip: int) -> Iterator[Record]:
    """Read a file in Arrow's streaming format, as `datasets` writes it, or in its file format (Feather)."""
    is_stream = raw.read(6) != b"ARROW1"
    raw.seek(0)
    with (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(raw) as reader:
        columns = options.select(reader.schema.names)
        if not columns:
            yield options.missing(reader.schema.names, "column", name)
            return
        number = 0
        batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            batch.validate(full=True)
            yield from _rows(batch.select(columns), name, number, skip, options)
            number += len(batch)


def _rows(batch: pyarrow.RecordBatch, name: str, before: int, skip: int, options: ReadOptions) -> Iterator[Record]:
    """Read the rows of a batch that follows `before` rows of the file, except the file's first `skip` rows."""
    first = min(max(skip - before, 0), len(batch))
    values = (batch if options.columns else batch.column(0))[first:].to_pylist()
    for number, value in enumerate(values, start=before + first + 1):
        where = f"{name}:{number}"
        if options.columns:
            yield Record(None, None, where, row=without_nulls(value))
        else:
            yield _decode(value, where) if isinstance(value, bytes) else _check(value, where)


def without_nulls(value: Any) -> Any:
    """Remove null fields from a table's value: a column's objects all have the union of their keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_csv(
    stream: io.BufferedReader, name: str, options: ReadOptions, skip: int, delimiter: str
) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(rows, None)
        if header is None:
            return
        columns = options.select(header)
        if not columns:
            yield options.missing(header, "column", name)
            return
        for number, row in enumerate((row for row in rows if row), start=1):
            if number <= skip:
                continue
            where = f"{name}:{number}"
            if len(row) != len(header):
                yield Record(None, "the number of columns differs from that of the first line", where)
            elif options.columns:
                yield Record(None, None, where, row={column: row[header.index(column)] for column in columns})
            else:
                yield _check(row[header.index(columns[0])], where)
    finally:
        text.detach()  # the caller closes the stream


def _read_pieces(stream: io.BufferedReader, name: str, separator: re.Pattern[bytes], skip: int) -> Iterator[Record]:
    """Read the documents between separators; pieces of only white space are skipped."""
    if stream.peek(3).startswith(codecs.BOM_UTF8):
        stream.read(3)
    overlap = 2 * len(separator.pattern)
    number, buffer, searched, too_long, ended = 0, b"", 0, False, False
    while not ended:
        more = stream.read(max(2**20, min(len(buffer), 2**25)))  # grows, so that long documents are not copied often
        ended = not more
        buffer += more
        begin = 0
        while True:
            match = separator.search(buffer, max(begin, searched))
            if match is None and not ended:
                break
            end = len(buffer) if match is None else match.start()
            piece = buffer[begin:end]
            if piece.strip() or too_long:
                number += 1
                if number > skip:
                    too_long = too_long or len(piece) > MAX_DOCUMENT_BYTES
                    yield _too_long(f"{name}:{number}") if too_long else _decode(piece, f"{name}:{number}")
                too_long = False
            if match is None:
                return
            begin = searched = match.end()
        buffer = buffer[begin:]
        if len(buffer) > MAX_DOCUMENT_BYTES:
            too_long, buffer = True, buffer[-overlap:]
        searched = max(0, len(buffer) - overlap)


def _read_document(stream: io.BufferedReader, name: str) -> Record:
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    return _too_long(name) if len(data) > MAX_DOCUMENT_BYTES else _decode(data.removeprefix(codecs.BOM_UTF8), name)


def _too_long(where: str) -> Record:
    problem = f"a document of more than {MAX_DOCUMENT_BYTES // 2**20} MiB"
    return Record(None, problem, where, "set split to the separator of its documents, such as '\\n\\n'")


def _decode(data: bytes, where: str) -> Record:
    if b"\0" in data:
        return Record(None, "a binary file (NUL bytes)", where, CONVERT)
    try:
        return _check(data.decode("utf-8"), where)
    except UnicodeDecodeError:
        return Record(None, "not UTF-8", where, "convert it by `iconv -f ENCODING -t UTF-8`")


def _check(text: object, where: str) -> Record:
    if text is None or text == "":  # null in JSON, a missing value of a table
        return Record(None, "empty", where)
    if not isinstance(text, str):
        return Record(None, "the text is not a string", where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can contain as an escape, or a byte that is not UTF-8
        return Record(None, "not UTF-8", where)
    return Record(text, None, where)
