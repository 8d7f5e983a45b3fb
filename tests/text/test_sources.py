"""Reading of documents: formats and compressions, separators, and files that are not text."""

import bz2
import csv
import gzip
import io
import json
import lzma
import struct
from pathlib import Path

import psutil
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from backports import zstd
from sources import DOCUMENTS, json_lines, read, texts

from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.text import formats
from ropepp_lit.text.sources import Cursor, Reader, find_files


def table(documents, delimiter):
    file = io.StringIO(newline="")
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerows([["id", "text"], *enumerate(documents)])
    return file.getvalue().encode()


def array(documents, indent=None):
    return json.dumps([{"text": text} for text in documents], indent=indent).encode()


PLAIN = {
    "lines.jsonl": json_lines,
    "lines.JSONL": json_lines,
    "lines.ndjson": lambda documents: b"\xef\xbb\xbf" + json_lines(documents),
    "lines.json": lambda documents: b"\n" + json_lines(documents).replace(b"\n", b"\r\n\r\n"),
    "array.json": array,
    "indented.Json": lambda documents: array(documents, indent=2),
    "objects.json": lambda documents: b"\n".join(json.dumps({"text": d}, indent=2).encode() for d in documents),
    "table.csv": lambda documents: b"\xef\xbb\xbf" + table(documents, ","),
    "table.tsv": lambda documents: table(documents, "\t"),
}


def zst(data):
    """Compress to frames with large windows, which decoders must allow, between skippable frames as pzstd writes."""
    long = {zstd.CompressionParameter.window_log: 28}
    compressor = zstd.ZstdCompressor(options=long)
    skipped = struct.pack("<II", 0x184D2A51, 5) + b"hello"
    # In pieces, as from a pipe: the frame does not store its length, so the decoder requires the full window.
    first = compressor.compress(data[:500]) + compressor.compress(data[500:900]) + compressor.flush()
    return skipped + first + skipped + zstd.compress(data[900:]) + skipped


COMPRESSED = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:500]) + gzip.compress(data[500:]),
    ".ZST": zst,
    ".bz2": lambda data: bz2.compress(data[:500]) + bz2.compress(data[500:]) + bytes(512),
    ".xz": lambda data: lzma.compress(data[:500]) + bytes(8) + lzma.compress(data[500:]) + bytes(70_000),
}


def check_file(path, **options):
    """Check reading from the beginning, and from any position."""
    assert texts(path, **options) == DOCUMENTS
    for skip in (1, 256, 599, 600):
        assert texts(path, start=Cursor(0, skip), **options) == DOCUMENTS[skip:]


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("name", PLAIN)
def test_formats_and_compressions(tmp_path, name, compression):
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESSED[compression](PLAIN[name](DOCUMENTS)))
    check_file(path)
    # The bytes determine whether a file is compressed, and whether one without a known extension is JSON.
    is_json = Path(name.lower()).suffix in (".json", ".jsonl", ".ndjson")
    for other in (name.lower(), *(["part-00000", "rows.jsonl-1", "rows.txt"] if is_json else [])):
        mislabelled = tmp_path / other
        mislabelled.write_bytes(path.read_bytes())
        assert texts(mislabelled) == DOCUMENTS


TYPES = [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary(), "dictionary"]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_tables_of_columns(tmp_path, kind):
    column = pyarrow.array(DOCUMENTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    rows = pyarrow.table({"id": list(range(len(DOCUMENTS))), "text": column})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.PARQUET", row_group_size=100)
    pyarrow.parquet.write_table(rows, tmp_path / "no_ending", row_group_size=256)
    pyarrow.feather.write_feather(rows, tmp_path / "rows.feather", chunksize=100)
    with pyarrow.ipc.new_stream(tmp_path / "rows.arrow", rows.schema) as stream:
        stream.write_table(rows, max_chunksize=70)
    for name in ("rows.PARQUET", "no_ending", "rows.feather", "rows.arrow"):
        check_file(tmp_path / name)


def test_rows_without_a_text_are_empty(tmp_path):
    rows = ["a", None, "b"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        assert [(r.text, r.problem) for r in read(tmp_path / name)] == [("a", None), (None, "empty"), ("b", None)]


def test_parquet_resumes_by_row_groups(tmp_path, monkeypatch):
    rows = pyarrow.table({"text": DOCUMENTS})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet", row_group_size=100)
    groups = []
    original = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self, *arguments, row_groups, **options):
        groups.append(list(row_groups))
        return original(self, *arguments, row_groups=row_groups, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    assert texts(tmp_path / "rows.parquet", start=Cursor(0, 350)) == DOCUMENTS[350:]
    assert groups == [[3, 4, 5]]


SEPARATORS = {r"\n\n": "\n\n", "\n---\n": "\n---\n", "<|endoftext|>": "<|endoftext|>", r"\x1e": "\x1e", r"\\n": r"\n"}


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("option", SEPARATORS, ids=repr)
def test_many_documents_in_a_text_file(tmp_path, option, compression):
    path = tmp_path / f"all.txt{compression}"
    data = b"\xef\xbb\xbf" + SEPARATORS[option].join(DOCUMENTS).encode() + SEPARATORS[option].encode() * 3
    path.write_bytes(COMPRESSED[compression](data))
    check_file(path, split=option)


def test_a_line_end_in_a_separator_matches_crlf(tmp_path):
    (tmp_path / "all.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\n\nfour\r\n")
    assert texts(tmp_path / "all.txt", split="\n\n") == ["one\r\ntwo", "three", "four\r\n"]


def test_separators_across_blocks(tmp_path):
    documents = ["x" * 2**20, "y" * (2**20 - 1), "z" * (3 * 2**20 + 5), "\r" * 3 + "end"]
    (tmp_path / "all.txt").write_bytes("\r\n--\r\n".join(documents).encode())
    assert texts(tmp_path / "all.txt", split=r"\n--\n") == documents


def test_an_invalid_piece_does_not_affect_others(tmp_path, monkeypatch):
    monkeypatch.setattr("ropepp_lit.text.readers.MAX_DOCUMENT_BYTES", 2 * 2**20)
    monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 2 * 2**20)
    (tmp_path / "all.txt").write_bytes(b"one|caf\xe9|" + b"long" * 2**21 + b"|a\0b|last")
    records = read(tmp_path / "all.txt", split="|")
    problems = ["not UTF-8", "a document of more than 2 MiB", "a binary file (NUL bytes)"]
    assert [r.problem for r in records] == [None, *problems, None]
    assert [records[0].text, records[-1].text, records[-1].where] == ["one", "last", f"{tmp_path}/all.txt:5"]
    (record,) = read(tmp_path / "all.txt")
    assert record.problem == "a document of more than 2 MiB"
    assert "set split to" in record.remedy


def test_split_is_checked(tmp_path):
    (tmp_path / "lines.jsonl").write_bytes(json_lines(DOCUMENTS))
    with pytest.raises(UsageError, match="split: SOURCE has no text files"):
        prepare(
            [str(tmp_path)], PrepareSettings(tokenizer="bytes", split="|"), out=tmp_path / "out", show_progress=False
        )
    with pytest.raises(UsageError, match="split: the separator is empty"):
        read(tmp_path, split="")


def test_a_large_text_file_is_a_stream(tmp_path):
    """Memory grows by a few blocks for a file of 100 MB."""
    path = tmp_path / "all.txt"
    with path.open("w") as file:
        for _ in range(100):
            file.write(("line of text\n" * 80 + "\n") * 950)
    process, count, most = psutil.Process(), 0, 0
    before = process.memory_info().rss
    for _, record in Reader(find_files([str(path)], key="text"), split=r"\n\n"):
        count += record.text is not None
        if count % 5000 == 0:
            most = max(most, process.memory_info().rss - before)
    assert count == 100 * 950
    assert most < 50 * 2**20


NOT_TEXT = {
    "nul.txt": (b"text\0text", r"a binary file \(NUL bytes\); extract"),
    "late.txt": (b"text" * 2000 + b"\0", r"a binary file \(NUL bytes\); extract"),
    "paper.pdf": (b"%PDF-1.7 ...", "a PDF document; extract"),
    "paper.txt": (b"%PDF-1.7 ...", "a PDF document; extract"),
    "word.docx": (b"PK\x03\x04...", "a zip archive or an office document; unpack"),
    "model.safetensors": (b"{}", r"a \.safetensors file is not text; it stores tensors"),
    "model.bin": (b"text", r"a \.bin file is not text"),
    "x.tar.gz": (gzip.compress(b"text"), r"a \.tar file is not text; unpack"),
    "image.PNG": (b"\x89PNG\r\n", "an image"),
    "utf16.txt": ("text".encode("utf-16"), "UTF-16 text; convert it by `iconv -f UTF-16"),
    "utf32.txt": ("text".encode("utf-32"), "UTF-32 text; convert it by `iconv -f UTF-32"),
    "end.jsonl": (json_lines(DOCUMENTS) + b"{", ":601: broken JSON"),
    "no key.txt": (b'{"content": "a"}\n', ":1: no key 'text'; set text_key to the key"),
    "latin1.txt": (b"caf\xe9", "not UTF-8; convert it by `iconv -f ENCODING -t UTF-8`"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer .*`git lfs pull`"),
    "crawl.gz": (gzip.compress(b"WARC/1.0\r\n"), "a web archive"),
    "rows.parquet.gz": (gzip.compress(b"PAR1..."), "a compressed table; unpack"),
    "cut.json": (b'[{"text": "a"}', "broken JSON: the array does not end"),
    "broken.json": (b'{\n "text": "a",\n', ":1: broken JSON"),
    "columns.csv": (b"id,content\n1,a\n", r"no column 'text'; set text_key to the column .* \(columns: id, content\)"),
    "ragged.csv": (b"id,text\n1,a\n2\n", ":2: the number of columns differs"),
    "keys.jsonl": (b'{"id": 1, "content": "a"}\n', r"no key 'text'; set text_key to the key .* \(keys: id, content\)"),
    "cut.jsonl.gz": (gzip.compress(json_lines(DOCUMENTS))[:-50], "unreadable: .*; replace it by a complete copy"),
    "cut.jsonl.zst": (zst(json_lines(DOCUMENTS))[:-50], "unreadable: .*; replace it by a complete copy"),
    "cut.jsonl.bz2": (bz2.compress(json_lines(DOCUMENTS))[:-50], "unreadable: .*; replace it by a complete copy"),
    "cut.jsonl.xz": (lzma.compress(json_lines(DOCUMENTS))[:-50], "unreadable: .*; replace it by a complete copy"),
    "second.jsonl.bz2": (
        bz2.compress(json_lines(DOCUMENTS)) + b"oops",
        "unreadable: .*; replace it by a complete copy",
    ),
    "second.jsonl.xz": (
        lzma.compress(json_lines(DOCUMENTS)) + b"oops",
        "unreadable: .*; replace it by a complete copy",
    ),
    "cut.arrow": (b"\xff\xff\xff\xff\x10\0\0\0", "unreadable: "),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_unsupported_files_are_refused(tmp_path, name):
    data, message = NOT_TEXT[name]
    path = tmp_path / name
    path.write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    sources = [str(tmp_path / "good.txt"), str(path)]
    settings = PrepareSettings(tokenizer="bytes")
    with pytest.raises(UsageError, match=rf"{path}.*{message}.*--on_error skip"):
        prepare(sources, settings, out=tmp_path / "out", show_progress=False)
    settings.on_error = "skip"
    manifest = prepare(sources, settings, out=tmp_path / "skip", show_progress=False)
    assert sum(manifest.skipped.values()) == 1
    assert manifest.examples[0].startswith(str(path))
    data = TokenData(source=str(path), tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"--data\.on_error skip"):
        data.prepare_data()


def test_text_options_of_fit(tmp_path, capsys):
    documents = [f"text {n}" * 9 for n in range(60)]
    (tmp_path / "rows.csv").write_text("body\n" + "".join(f"{text}\n" for text in documents))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "all.txt").write_text("\n\n".join(documents))
    for source, option in ((tmp_path, {"text_key": "body"}), (tmp_path / "all.txt", {"split": r"\n\n"})):
        if source == tmp_path:
            (tmp_path / "all.txt").rename(tmp_path / ".all.txt")
        data = TokenData(
            source=str(source), tokenizer="bytes", validation_fraction=0.3, context_length=32,
            cache_dir=str(tmp_path / ".cache"), **option,
        )  # fmt: skip
        data.prepare_data()
        data.setup("fit")
        assert sum(split.documents for split in data.manifests[source.name].splits.values()) == 60
        printed = capsys.readouterr().out
        assert ("README.md" in printed) == (source == tmp_path)
        if source == tmp_path:
            assert f"data: {tmp_path}: left out: 1 (about the corpus, not a document)" in printed
            (tmp_path / ".all.txt").rename(tmp_path / "all.txt")
