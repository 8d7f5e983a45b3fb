"""Which files of a folder are documents, and how sources are identified."""

import os
from pathlib import Path

import datasets
import pytest
from sources import DOCUMENTS, json_lines, read, texts

from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.errors import UsageError
from ropepp_lit.text.sources import Cursor, find_files, find_inputs, identify


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
def test_documents_of_a_folder(tmp_path, case):
    documents, others = FOLDERS[case]
    fill(tmp_path, *documents, *others, ".gitattributes", ".git/config")
    found = find_inputs([str(tmp_path)], key="text")
    assert [file.name for file in found.files] == sorted(str(tmp_path / name) for name in documents)
    assert sorted(name for name, _ in found.ignored) == sorted(str(tmp_path / name) for name in others)
    if others:
        assert texts(tmp_path / others[0])  # read if passed directly


def test_folders_saved_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS[:50]}).shuffle(seed=0)
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(b"not named by the state")
    assert texts(tmp_path / "saved") == rows["text"]
    assert texts(tmp_path / "saved", start=Cursor(1, 3)) == rows["text"][17 + 3 :]
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "dict")
    with pytest.raises(UsageError, match=r"dict: a DatasetDict with multiple splits; pass one of them: .*dict/test, "):
        read(tmp_path / "dict")
    assert texts(tmp_path / "dict" / "test") == rows["text"][:5]
    (tmp_path / "dict" / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UsageError, match=r"tables listed in its state\.json are missing"):
        read(tmp_path / "dict" / "test")


def test_links(tmp_path):
    fill(tmp_path, "outside/a.txt", "outside/deep/b.txt", "source/z/c.txt")
    (tmp_path / "source/linked").symlink_to(tmp_path / "outside")
    (tmp_path / "source/again").symlink_to(tmp_path / "outside/deep")
    (tmp_path / "outside/circle").symlink_to(tmp_path / "source")
    (tmp_path / "source/c2.txt").symlink_to(tmp_path / "source/z/c.txt")
    (tmp_path / "source/broken.txt").symlink_to(tmp_path / "nothing")
    for source in (tmp_path / "source", tmp_path / "source/**"):
        found = find_inputs([str(source)], key="text")
        real = [os.path.realpath(file.path) for file in found.files]
        assert sorted(real) == sorted(
            str(tmp_path / n) for n in ("outside/a.txt", "outside/deep/b.txt", "source/z/c.txt")
        )
        assert str(tmp_path / "source/z/c.txt") in [file.name for file in found.files]
    several = [str(tmp_path / name) for name in ("source/linked", "source/z/c.txt", "source", "outside")]
    found = find_inputs(several, key="text")
    assert sorted(file.name for file in found.files) == [
        str(tmp_path / n) for n in ("outside/a.txt", "outside/deep/b.txt", "source/z/c.txt")
    ]
    assert (several[1], "another name of a file that is already read") in found.ignored
    reasons = {Path(name).name: reason for name, reason in find_inputs([str(tmp_path / "source")], key="text").ignored}
    assert reasons["c2.txt"] == "another name of a file that is already read"
    assert reasons["broken.txt"] == "a broken link, or not a regular file"
    assert reasons["circle"] == "a link to a folder that is already read"


def test_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Path(os.fsdecode(folder + b"/\xff.txt")).write_text("text")
    Path(os.fsdecode(folder + b"/bad\n.txt")).write_bytes(b"\xff")  # a line end must not break the line of a message
    settings = PrepareSettings(tokenizer="bytes", on_error="skip")
    manifest = prepare([str(tmp_path)], settings, out=tmp_path / "out", show_progress=False)
    assert manifest.splits["train"].documents == 1
    assert manifest.examples == [f"{tmp_path}/caf\\xe9/bad\\n.txt: not UTF-8"]
    (record,) = read(os.fsdecode(folder + b"/\xff.txt"))
    record.where.encode("utf-8")


def test_shards_inside_their_source(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    first, again = (
        prepare([str(tmp_path)], PrepareSettings(tokenizer="bytes"), out=tmp_path / "out", show_progress=False)
        for _ in range(2)
    )
    assert again == first
    assert find_inputs([str(tmp_path)], key="text").ignored == [
        (str(tmp_path / "out"), "token shards of `prepare`, not documents")
    ]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"pipe: not a regular file .*; write it to a file"):
        find_files([str(tmp_path / "pipe")], key="text")


def test_sources_are_identified_by_their_contents(tmp_path, monkeypatch):
    cache = tmp_path / "digests"
    (tmp_path / "one").mkdir()
    fill(tmp_path / "one", "a.txt", "b.txt")
    large = tmp_path / "one" / "c.txt"
    large.write_bytes(os.urandom(3 * 2**20))

    def identity(folder):
        return identify(find_files([str(tmp_path / folder)], key="text"), cache_dir=cache)

    before = identity("one")
    os.utime(large)
    assert identity("one") == before
    (tmp_path / "one").rename(tmp_path / "two")
    assert identity("two") == before
    large = tmp_path / "two" / "c.txt"
    data = bytearray(large.read_bytes())
    data[2**20 + 12345] ^= 1
    large.write_bytes(data)
    assert identity("two") != before
    data[2**20 + 12345] ^= 1
    large.write_bytes(data)
    assert identity("two") == before
    monkeypatch.setattr("ropepp_lit.text.sources.FULL_DIGEST_BYTES", 2**21)  # larger files are sampled
    monkeypatch.setattr("ropepp_lit.text.sources.SAMPLES", 4)
    cache = tmp_path / "other"
    sampled = identity("two")
    data[-1] ^= 1
    large.write_bytes(data)
    assert identity("two") != sampled
    (tmp_path / "two" / "a.txt").write_text("y")
    assert identity("two")[0] != sampled[0]
