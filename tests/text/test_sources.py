"""Text as people have it: a table of formats and compressions, folders, links, names, and what is not text."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import struct
from pathlib import Path

import datasets
import psutil
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from backports import zstd

from ropepp_lit.data.prepare import Settings, prepare
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.text import formats
from ropepp_lit.text.sources import START, Cursor, Reader, find, find_files, identify

DOCUMENTS = [f'Document {n}, "äöü 漢字 🙂"\r\n\tfox' * (1 + n % 5) for n in range(600)]


def json_lines(documents):
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)).encode()


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
    """Frames with windows that need a decoder's leave, between frames to be skipped, as pzstd writes them."""
    long = {zstd.CompressionParameter.window_log: 28}
    compressor = zstd.ZstdCompressor(options=long)
    skipped = struct.pack("<II", 0x184D2A51, 5) + b"hello"
    # In pieces, as from a pipe: the frame does not say how long it is, so the decoder needs the whole window.
    first = compressor.compress(data[:500]) + compressor.compress(data[500:900]) + compressor.flush()
    return skipped + first + skipped + zstd.compress(data[900:]) + skipped


COMPRESSED = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:500]) + gzip.compress(data[500:]),
    ".ZST": zst,
    ".bz2": lambda data: bz2.compress(data[:500]) + bz2.compress(data[500:]),
    ".xz": lambda data: lzma.compress(data[:500]) + lzma.compress(data[500:]),
}


def read(*sources, start=START, **options):
    return [record for _, record in Reader(find_files([str(s) for s in sources], key="text"), start=start, **options)]


def texts(*sources, **options):
    records = read(*sources, **options)
    assert [record.problem for record in records if record.text is None] == []
    return [record.text for record in records]


def check_file(path, **options):
    """Read from the beginning, and from any place."""
    assert texts(path, **options) == DOCUMENTS
    for skip in (1, 256, 599, 600):
        assert texts(path, start=Cursor(0, skip), **options) == DOCUMENTS[skip:]


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("name", PLAIN)
def test_formats_and_compressions(tmp_path, name, compression):
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESSED[compression](PLAIN[name](DOCUMENTS)))
    check_file(path)
    # The bytes decide whether a file is compressed, and whether one without an ending of its own is JSON.
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


def test_parquet_goes_on_by_row_groups(tmp_path, monkeypatch):
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


def test_a_line_end_in_a_separator_is_that_of_windows_too(tmp_path):
    (tmp_path / "all.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\n\nfour\r\n")
    assert texts(tmp_path / "all.txt", split="\n\n") == ["one\r\ntwo", "three", "four\r\n"]


def test_separators_across_blocks(tmp_path):
    documents = ["x" * 2**20, "y" * (2**20 - 1), "z" * (3 * 2**20 + 5), "\r" * 3 + "end"]
    (tmp_path / "all.txt").write_bytes("\r\n--\r\n".join(documents).encode())
    assert texts(tmp_path / "all.txt", split=r"\n--\n") == documents


def test_a_piece_that_is_not_text_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("ropepp_lit.text.readers.MAX_DOCUMENT_BYTES", 2 * 2**20)
    monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 2 * 2**20)
    (tmp_path / "all.txt").write_bytes(b"one|caf\xe9|" + b"long" * 2**21 + b"|a\0b|last")
    records = read(tmp_path / "all.txt", split="|")
    problems = ["not UTF-8", "a document of more than 2 MiB", "a binary file (NUL bytes)"]
    assert [r.problem for r in records] == [None, *problems, None]
    assert [records[0].text, records[-1].text, records[-1].where] == ["one", "last", f"{tmp_path}/all.txt:5"]
    (record,) = read(tmp_path / "all.txt")
    assert record.problem == "a document of more than 2 MiB"
    assert "by split" in record.remedy


def test_split_is_checked(tmp_path):
    (tmp_path / "lines.jsonl").write_bytes(json_lines(DOCUMENTS))
    with pytest.raises(UsageError, match="split: SOURCE has no text files"):
        prepare([str(tmp_path)], Settings(tokenizer="bytes", split="|"), out=tmp_path / "out", show_progress=False)
    with pytest.raises(UsageError, match="split: an empty separator"):
        read(tmp_path, split="")


def test_a_large_text_file_is_a_stream(tmp_path):
    """100 MB in one file: what grows is a few blocks."""
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
    "utf16.txt": ("text".encode("utf-16"), "UTF-16 text; convert it by `iconv"),
    "end.jsonl": (json_lines(DOCUMENTS) + b"{", ":601: broken JSON"),
    "no key.txt": (b'{"content": "a"}\n', ":1: no key 'text'; name the key"),
    "latin1.txt": (b"caf\xe9", "not UTF-8; convert"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer .*`git lfs pull`"),
    "crawl.gz": (gzip.compress(b"WARC/1.0\r\n"), "a web archive"),
    "rows.parquet.gz": (gzip.compress(b"PAR1..."), "a compressed table; unpack"),
    "cut.json": (b'[{"text": "a"}', "broken JSON: the array does not end"),
    "broken.json": (b'{\n "text": "a",\n', ":1: broken JSON"),
    "columns.csv": (b"id,content\n1,a\n", r"no column 'text'; name the column .* by text_key \(columns: id, content\)"),
    "ragged.csv": (b"id,text\n1,a\n2\n", ":2: another number of columns"),
    "keys.jsonl": (b'{"id": 1, "content": "a"}\n', r"no key 'text'; name the key .* by text_key \(keys: id, content\)"),
    "cut.jsonl.gz": (gzip.compress(json_lines(DOCUMENTS))[:-50], "unreadable: .*; replace it by a whole copy"),
    "cut.jsonl.zst": (zst(json_lines(DOCUMENTS))[:-50], "unreadable: .*; replace it by a whole copy"),
    "cut.jsonl.bz2": (bz2.compress(json_lines(DOCUMENTS))[:-50], "unreadable: .*; replace it by a whole copy"),
    "cut.jsonl.xz": (lzma.compress(json_lines(DOCUMENTS))[:-50], "unreadable: .*; replace it by a whole copy"),
    "cut.arrow": (b"\xff\xff\xff\xff\x10\0\0\0", "unreadable: "),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_what_is_not_text_is_refused(tmp_path, name):
    data, message = NOT_TEXT[name]
    path = tmp_path / name
    path.write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    sources = [str(tmp_path / "good.txt"), str(path)]
    settings = Settings(tokenizer="bytes")
    with pytest.raises(UsageError, match=rf"{path}.*{message}.*--on_error skip"):
        prepare(sources, settings, out=tmp_path / "out", show_progress=False)
    settings.on_error = "skip"
    manifest = prepare(sources, settings, out=tmp_path / "skip", show_progress=False)
    assert sum(manifest.skipped.values()) == 1
    assert manifest.examples[0].startswith(str(path))
    data = TokenData(source=str(path), tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"--data\.on_error skip"):
        data.prepare_data()


def test_options_of_text_in_fit(tmp_path, capsys):
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


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = json_lines(["x"]) if "json" in name else b"x"
        path.write_bytes(data)


FOLDERS = {
    "a downloaded dataset": (
        ["data/a.jsonl", "data/b.JSON", "more.txt"],
        ["README.md", "LICENSE", "dataset_infos.json", "load.py", "state.json", "requirements.txt", "x/README"],
    ),
    "notes": (["a.md", "README.md", "b/README.md"], ["LICENSE"]),
    "only a README": (["README.md"], []),
    "texts": (["a.txt", "b.txt", "license_plates.txt.txt"][:2], ["README.md", "LICENSE.md"]),
    "code": (["a.py", "b/Makefile"], ["README.md"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_of_a_folder_are_documents(tmp_path, case):
    documents, others = FOLDERS[case]
    fill(tmp_path, *documents, *others, ".gitattributes", ".git/config")
    found = find([str(tmp_path)], key="text")
    assert [file.name for file in found.files] == sorted(str(tmp_path / name) for name in documents)
    assert sorted(name for name, _ in found.left_out) == sorted(str(tmp_path / name) for name in others)
    if others:
        assert texts(tmp_path / others[0])  # named by itself it is what it is


def test_what_datasets_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS[:50]}).shuffle(seed=0)
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(b"not named by the state")
    assert texts(tmp_path / "saved") == rows["text"]
    assert texts(tmp_path / "saved", start=Cursor(1, 3)) == rows["text"][17 + 3 :]
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "dict")
    with pytest.raises(UsageError, match=r"dict: a DatasetDict of several splits; name one of them: .*dict/test, "):
        read(tmp_path / "dict")
    assert texts(tmp_path / "dict" / "test") == rows["text"][:5]
    (tmp_path / "dict" / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UsageError, match=r"state\.json does not name tables that are all there"):
        read(tmp_path / "dict" / "test")


def test_links(tmp_path):
    fill(tmp_path, "outside/a.txt", "outside/deep/b.txt", "source/z/c.txt")
    (tmp_path / "source/linked").symlink_to(tmp_path / "outside")
    (tmp_path / "source/again").symlink_to(tmp_path / "outside/deep")
    (tmp_path / "outside/circle").symlink_to(tmp_path / "source")
    (tmp_path / "source/c2.txt").symlink_to(tmp_path / "source/z/c.txt")
    (tmp_path / "source/broken.txt").symlink_to(tmp_path / "nothing")
    for source in (tmp_path / "source", tmp_path / "source/**"):
        found = find([str(source)], key="text")
        real = [os.path.realpath(file.path) for file in found.files]
        assert sorted(real) == sorted(
            str(tmp_path / n) for n in ("outside/a.txt", "outside/deep/b.txt", "source/z/c.txt")
        )
        assert str(tmp_path / "source/z/c.txt") in [file.name for file in found.files]
    reasons = {Path(name).name: reason for name, reason in find([str(tmp_path / "source")], key="text").left_out}
    assert reasons["c2.txt"] == "a second name of a file that is read"
    assert reasons["broken.txt"] == "a broken link, or not a regular file"
    assert reasons["circle"] == "a link to a folder that is read already"


def test_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Path(os.fsdecode(folder + b"/\xff.txt")).write_text("text")
    Path(os.fsdecode(folder + b"/bad\n.txt")).write_bytes(b"\xff")  # a line end must not break a message's line
    settings = Settings(tokenizer="bytes", on_error="skip")
    manifest = prepare([str(tmp_path)], settings, out=tmp_path / "out", show_progress=False)
    assert manifest.splits["train"].documents == 1
    assert manifest.examples == [f"{tmp_path}/caf\\xe9/bad\\n.txt: not UTF-8"]
    (record,) = read(os.fsdecode(folder + b"/\xff.txt"))
    record.where.encode("utf-8")


def test_shards_inside_of_their_source(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    first, again = (
        prepare([str(tmp_path)], Settings(tokenizer="bytes"), out=tmp_path / "out", show_progress=False)
        for _ in range(2)
    )
    assert again == first
    assert find([str(tmp_path)], key="text").left_out == [
        (str(tmp_path / "out"), "token shards of `prepare`, not documents")
    ]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"pipe: not a regular file .*; write it to a file"):
        find_files([str(tmp_path / "pipe")], key="text")


def test_sources_are_known_by_their_contents(tmp_path, monkeypatch):
    cache = tmp_path / "digests"
    (tmp_path / "one").mkdir()
    fill(tmp_path / "one", "a.txt", "b.txt")
    large = tmp_path / "one" / "c.txt"
    large.write_bytes(os.urandom(3 * 2**20))

    def known(folder):
        return identify(find_files([str(tmp_path / folder)], key="text"), cache_dir=cache)

    before = known("one")
    os.utime(large)
    assert known("one") == before
    (tmp_path / "one").rename(tmp_path / "two")
    assert known("two") == before
    large = tmp_path / "two" / "c.txt"
    data = bytearray(large.read_bytes())
    data[2**20 + 12345] ^= 1
    large.write_bytes(data)
    assert known("two") != before
    data[2**20 + 12345] ^= 1
    large.write_bytes(data)
    assert known("two") == before
    monkeypatch.setattr("ropepp_lit.text.sources.WHOLE_BYTES", 2**21)  # larger files count by samples
    monkeypatch.setattr("ropepp_lit.text.sources.SAMPLES", 4)
    cache = tmp_path / "other"
    sampled = known("two")
    data[-1] ^= 1
    large.write_bytes(data)
    assert known("two") != sampled
    (tmp_path / "two" / "a.txt").write_text("y")
    assert known("two")[0] != sampled[0]


SCRIPT = "raise SystemExit('a script of a dataset ran')"


def mixed(folder):
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "b.jsonl").write_text('{"text": {"b": 1}, "other": 3}\n')


def broken_connection(folder, monkeypatch):
    import aiohttp

    (folder / "a.jsonl").write_text('{"text": "a"}\n')

    def rows(self):
        yield {"text": "a"}
        raise aiohttp.ClientPayloadError("Response payload is not completed")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", rows)


def test_datasets_that_fail_end_in_one_line(tmp_path, monkeypatch):
    for name, message in (
        ("script", r"Dataset scripts are no longer supported.*; prepare its files by themselves, after `hf download`"),
        ("mixed", r"at row 2: .*; run the same command again \(finished parts are kept\)"),
        ("connection", r"at row 2: ClientPayloadError: Response payload is not completed; run the same command again"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if name == "script":
            (folder / "script.py").write_text(SCRIPT)
        elif name == "mixed":
            mixed(folder)
        else:
            broken_connection(folder, monkeypatch)
        with pytest.raises(UsageError, match=message) as caught:
            read(f"hf:{folder}")
        assert "\n" not in str(caught.value)


def test_a_stream_goes_on_by_its_own_state(tmp_path, monkeypatch):
    monkeypatch.setattr("ropepp_lit.text.hub.STATE_ROWS", 50)
    for number in range(3):
        rows = pyarrow.table({"text": DOCUMENTS[200 * number : 200 * number + 200]})
        pyarrow.parquet.write_table(rows, tmp_path / f"{number}.parquet", row_group_size=40)
    files = find_files([f"hf:{tmp_path}"], key="text")
    cursors = [cursor for cursor, _ in Reader(files)]
    cursor = cursors[470]
    cursor = Cursor(*json.loads(json.dumps(list(cursor))))
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    data[4:500] = bytes(496)  # the first rows; their file is not read again, but for its schema
    (tmp_path / "0.parquet").write_bytes(data)
    assert [record.text for _, record in Reader(files, start=cursor)] == DOCUMENTS[471:]


def test_revisions(monkeypatch):
    (file,) = find_files([f"hf:org/name@{'a' * 40}:config:train"], key="text")
    assert (file.path, file.revision, file.config, file.split) == ("org/name", "a" * 40, "config", "train")
    assert file.commit == "a" * 40
    loaded = {}

    def load_dataset(path, config, **options):
        loaded.update(options)
        return datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    class Info:
        sha = "b" * 40

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: Info)
    assert [record.text for _, record in Reader(find_files(["hf:org/name@main"], key="text"))] == ["a"]
    assert loaded["revision"] == "b" * 40  # what `main` was when the work began
    with pytest.raises(UsageError, match="write hf:NAME"):
        find_files(["hf:org/name@"], key="text")
