"""Documents of datasets on the Hugging Face Hub and of the library datasets."""

import json

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from sources import DOCUMENTS, read

from ropepp_lit.errors import UsageError
from ropepp_lit.text.sources import Cursor, Reader, find_files

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


def test_failing_datasets_are_reported_in_one_line(tmp_path, monkeypatch):
    for name, message in (
        ("script", r"Dataset scripts are no longer supported.*; prepare its files directly, after `hf download`"),
        ("split", r"at its beginning: .*; check its name, configuration and split and the connection, or prepare its"),
        ("mixed", r"at row 2: .*; run the same command again \(finished segments are kept\)"),
        ("connection", r"at row 2: ClientPayloadError: Response payload is not completed; run the same command again"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if name == "script":
            (folder / "script.py").write_text(SCRIPT)
        elif name == "split":
            (folder / "a.jsonl").write_text('{"text": "a"}\n')
        elif name == "mixed":
            mixed(folder)
        else:
            broken_connection(folder, monkeypatch)
        with pytest.raises(UsageError, match=message) as caught:
            read(f"hf:{folder}" + (":nowhere" if name == "split" else ""))
        assert "\n" not in str(caught.value)


def test_a_stream_resumes_from_its_state(tmp_path, monkeypatch):
    monkeypatch.setattr("ropepp_lit.text.hub.STATE_ROWS", 50)
    for number in range(3):
        rows = pyarrow.table({"text": DOCUMENTS[200 * number : 200 * number + 200]})
        pyarrow.parquet.write_table(rows, tmp_path / f"{number}.parquet", row_group_size=40)
    files = find_files([f"hf:{tmp_path}"], key="text")
    cursors = [cursor for cursor, _ in Reader(files)]
    cursor = cursors[470]
    cursor = Cursor(*json.loads(json.dumps(list(cursor))))
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    data[4:500] = bytes(496)  # the first rows; their file is not read again, except for its schema
    (tmp_path / "0.parquet").write_bytes(data)
    assert [record.text for _, record in Reader(files, start=cursor)] == DOCUMENTS[471:]


def test_revisions(tmp_path, monkeypatch):
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
    assert loaded["revision"] == "b" * 40  # the commit of `main` at the start
    with pytest.raises(UsageError, match="write hf:NAME"):
        find_files(["hf:org/name@"], key="text")
    with pytest.raises(UsageError, match="is a local folder, which has no revisions; remove @main"):
        find_files([f"hf:{tmp_path}@main"], key="text")
