"""Property-based tests of readers: documents are read as written, with any line ends and layouts."""

import csv
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import read

from ropepp_lit.text.sources import Cursor

TEXTS = st.text(
    st.one_of(
        st.sampled_from("ab\"\\,{}[]:'"), st.sampled_from("\r\n\t\u2028\x85\ufeff🙂\x00"), st.characters(codec="utf-8")
    ),
    max_size=8,
)
DOCUMENTS = st.lists(TEXTS, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def expected(documents):
    return [(None, "empty") if text == "" else (text, None) for text in documents]


def read_texts(path, start=0, **options):
    return [(record.text, record.problem) for record in read(path, start=Cursor(0, start), **options)]


@given(
    documents=DOCUMENTS, layout=st.sampled_from(["lines", "array", "objects"]), ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]), line_end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf", b"\n", b"\xef\xbb\xbf\n "]), last=st.booleans(), skip=st.integers(0, 6),
)  # fmt: skip
def test_json(folder, documents, layout, ascii_only, indent, line_end, mark, last, skip):
    rows = [{"id": number, "text": text} for number, text in enumerate(documents)]
    options = {"ensure_ascii": ascii_only}
    if layout == "array":
        text = json.dumps(rows, indent=indent, **options)
    else:
        indent = 1 if layout == "objects" else None
        text = line_end.join(json.dumps(row, indent=indent, **options) for row in rows)
    path = folder / "rows.jsonl"
    path.write_bytes(mark + text.encode() + (line_end.encode() if last else b""))
    assert read_texts(path) == expected(documents)
    assert read_texts(path, skip) == expected(documents)[skip:]


@given(
    documents=DOCUMENTS, delimiter=st.sampled_from([",", "\t"]), line_end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]), mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    skip=st.integers(0, 6),
)  # fmt: skip
def test_tables(folder, documents, delimiter, quoting, line_end, mark, skip):
    documents = [text.replace("\0", "") for text in documents]
    if line_end == "\n":
        quoting = csv.QUOTE_ALL  # the writer does not quote a lone \r, which readers cannot distinguish from a line end
    file = io.StringIO(newline="")
    rows = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=line_end)
    rows.writerows([["id", "text"], *enumerate(documents)])
    path = folder / ("rows.csv" if delimiter == "," else "rows.tsv")
    path.write_bytes(mark + file.getvalue().encode())
    assert read_texts(path) == expected(documents)
    assert read_texts(path, skip) == expected(documents)[skip:]


@given(
    pieces=st.lists(st.text(st.sampled_from("ab \n\r-é🙂"), max_size=8), max_size=6),
    separator=st.sampled_from(["\n\n", "\n---\n", "--", "\n", "é"]), skip=st.integers(0, 7),
)  # fmt: skip
def test_pieces_of_a_text_file(folder, pieces, separator, skip):
    data = separator.join(pieces).encode()
    pattern = re.escape(separator).replace("\\\n", "\r?\n").encode()
    documents = [piece.decode() for piece in re.split(pattern, data) if piece.strip()]
    path = folder / "pieces.txt"
    path.write_bytes(data)
    assert read_texts(path, split=separator) == expected(documents)
    assert read_texts(path, skip, split=separator) == expected(documents)[skip:]
    if data and b"\0" not in data:
        assert read_texts(path) == [(data.decode(), None)]
