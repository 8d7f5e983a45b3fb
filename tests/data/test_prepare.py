"""Preparation of token shards: independent of the storage format, options, caching and damaged inputs."""

import dataclasses
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from corpora import DOCUMENTS, SETTINGS, contents, read_slices, read_split, reference, run, store
from tokenizers import Tokenizer

from ropepp_lit.data import encoders
from ropepp_lit.data import preparation as module
from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.plan import ChunkSlice
from ropepp_lit.data.prepare import PrepareSettings, prepare_cached
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.data.verify import verify
from ropepp_lit.errors import UsageError
from ropepp_lit.text.tokenizer import train_tokenizer


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_all_storage_formats_result_in_the_same_shards(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1500)
    monkeypatch.setattr(encoders, "BATCH_BYTES", 700)
    run(store(tmp_path / "jsonl", "jsonl"), tmp_path / "first")
    run(store(tmp_path / kind, kind), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "first")
    for split, tokens in reference(DOCUMENTS).items():
        assert read_split(tmp_path / "out", split) == tokens
    assert len(Manifest.read(tmp_path / "out").splits["train"].chunks) > 3
    assert verify(tmp_path / "out") == []


def test_litdata_reads_the_shards(tmp_path, monkeypatch):
    from litdata import StreamingDataset, TokensLoader

    monkeypatch.setattr(module, "SEGMENT_BYTES", 3000)
    run(store(tmp_path, "jsonl"), tmp_path / "out")
    blocks = StreamingDataset(str(tmp_path / "out" / "train"), item_loader=TokensLoader(block_size=50), shuffle=False)
    shards = TokenShards(tmp_path / "out", Manifest.read(tmp_path / "out"), "train")
    expected = []
    for index, chunk in enumerate(shards.chunks):  # litdata drops the remainder of each chunk
        expected += read_slices(shards, [ChunkSlice(index, 0, chunk.tokens // 50 * 50)])
    assert np.concatenate([np.asarray(block) for block in blocks]).tolist() == expected


def test_a_trained_tokenizer_round_trips_text(tmp_path):
    run(store(tmp_path, "jsonl"), tmp_path / "out", tokenizer=None, train_tokenizer=300)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    decoded = []
    for split in ("train", "validation"):
        ids = np.array(read_split(tmp_path / "out", split))
        for document in np.split(ids, np.flatnonzero(ids == 1) + 1)[:-1]:
            assert (document[0], document[-1]) == (0, 1)
            decoded.append(tokenizer.decode(document.tolist()))
    assert sorted(decoded) == sorted(DOCUMENTS)


def test_lengths_limit_and_min_and_max_tokens(tmp_path):
    source = store(tmp_path, "jsonl")
    everything = run(source, tmp_path / "all", validation_fraction=0.0)
    sizes = [len(text.encode()) + 2 for text in DOCUMENTS]
    assert list(everything.splits) == ["train"]
    assert sum(documents for documents, _ in everything.splits["train"].lengths) == len(DOCUMENTS)
    assert everything.splits["train"].lengths[6] == [
        sum(64 <= s < 128 for s in sizes),
        sum(s for s in sizes if 64 <= s < 128),
    ]
    some = run(source, tmp_path / "some", validation_fraction=0.0, min_tokens=100, max_tokens=200)
    assert some.splits["train"].documents == sum(100 <= size <= 200 for size in sizes)
    assert some.skipped == {
        "shorter than min_tokens": sum(size < 100 for size in sizes),
        "longer than max_tokens": sum(size > 200 for size in sizes),
    }
    first = run(source, tmp_path / "first", validation_fraction=0.0, limit=7)
    assert read_split(tmp_path / "first", "train") == reference(DOCUMENTS[:7], 0)["train"]
    assert first.splits["train"].documents == 7


def test_exact_duplicates_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1500)
    source = store(tmp_path, "jsonl", [*DOCUMENTS, *DOCUMENTS[:20], "new", "new"])
    manifest = run(source, tmp_path / "out", dedup=True)
    assert manifest.skipped == {"repeats an earlier one": 21}
    expected = reference([*DOCUMENTS, "new"])
    assert {name: read_split(tmp_path / "out", name) for name in expected} == expected


def test_a_hugging_face_dataset_is_streamed(tmp_path):
    source = tmp_path / "dataset"
    store(source / "data", "parquet")
    dataset = f"hf:{source}"
    assert run(dataset, tmp_path / "out").sources == [dataset]
    run(store(tmp_path, "jsonl"), tmp_path / "jsonl")
    assert contents(tmp_path / "out") == contents(tmp_path / "jsonl")
    run(f"{dataset}:train", tmp_path / "split", limit=30)
    with pytest.raises(UsageError, match=f"{dataset}:test:.*[Ss]plit"):
        run(f"{dataset}:test", tmp_path / "none")
    with pytest.raises(UsageError, match=r"SOURCE: hf:a:b:c:d: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        run("hf:a:b:c:d", tmp_path / "none")
    (source / "data" / "second.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match=r"at row 61: .*; run the same command again"):
        run(dataset, tmp_path / "none", on_error="skip")


def test_a_dataset_that_is_not_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"hf:someone/nothing: .*; check the name and the connection"):
        run("hf:someone/nothing", tmp_path / "none")


def test_prepared_shards_are_reused(tmp_path):
    source, cache = store(tmp_path / "texts", "jsonl"), tmp_path / "cache"
    found = []

    def find(**changes):
        settings = dataclasses.replace(SETTINGS, **changes)
        found.append(prepare_cached(source, settings, cache_dir=cache, show_progress=False))
        return found[-1]

    threads = [threading.Thread(target=find) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    before = {path: path.stat().st_mtime_ns for path in found[0].rglob("*")}
    assert find() == found[0]
    assert {path: path.stat().st_mtime_ns for path in found[0].rglob("*")} == before
    assert find(validation_fraction=0.3) != found[0]
    assert find(tokenizer=None, train_tokenizer=300) != found[0]
    Path(source).write_text(Path(source).read_text() + '{"text": "one more"}\n')
    assert find() != found[0]


def test_a_folder_with_other_content_is_not_changed(tmp_path):
    source = store(tmp_path / "texts", "jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.bin").write_text("weights")
    with pytest.raises(UsageError, match=r"out: .* is not empty; name an empty or a new folder"):
        run(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.bin"]
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty")
    with pytest.raises(UsageError, match=r"contains shards of other sources or settings"):
        run(source, tmp_path / "empty", min_tokens=5)


BAD_LINES = [
    (b'{"text": "cut', "broken JSON"),
    (b'{"other": "key"}', "no key 'text'"),
    (b'["text"]', "no key 'text'"),
    (b'{"text": 5}', "the text is not a string"),
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
    (b'{"text": "\\ud83d"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines(tmp_path, line, problem):
    good = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join([*good[:10], line, b"", b'{"text": ""}', *good[10:]]) + b"\n")
    with pytest.raises(UsageError, match=rf"corpus\.jsonl:11: {problem}; "):
        run(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = run(str(path), tmp_path / "out", on_error="skip")
    assert manifest.skipped == {problem: 1, "empty": 1}
    assert manifest.examples == [f"{path}:11: {problem}", f"{path}:13: empty"]
    for split, tokens in reference(DOCUMENTS).items():
        assert read_split(tmp_path / "out", split) == tokens


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "txt"])
def test_damaged_files(tmp_path, kind):
    good = store(tmp_path / "good", "jsonl")
    path = tmp_path / "bad" / f"corpus.{kind}"
    if kind == "txt":
        path.parent.mkdir()
        path.write_bytes(b"caf\xe9")
    else:
        store(path.parent, kind, [os.urandom(40).hex() for _ in range(3000)])
        path.write_bytes(path.read_bytes()[:-100])
    problem = "not UTF-8" if kind == "txt" else "unreadable: "
    with pytest.raises(UsageError, match=rf"corpus\.{kind}: {problem}"):
        run([str(path), good], tmp_path / "out")
    manifest = run([str(path), good], tmp_path / "out", on_error="skip")
    assert sum(count for reason, count in manifest.skipped.items() if reason.startswith(problem)) == 1
    tail = reference(DOCUMENTS)["train"]
    assert read_split(tmp_path / "out", "train")[-len(tail) :] == tail  # all other documents are kept


def test_missing_columns_and_sources(tmp_path):
    with pytest.raises(UsageError, match=r"corpus\.parquet: no column 'content'"):
        run(store(tmp_path / "a", "parquet"), tmp_path / "out", text_key="content")
    with pytest.raises(UsageError, match=r"SOURCE: .*nowhere: no such file or folder"):
        run(str(tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(UsageError, match=r"SOURCE: .*\*\.none: it contains no files to read"):
        run(str(tmp_path / "*.none"), tmp_path / "out")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match=r"SOURCE: no documents for train in 1 files \(1 empty\)"):
        run(str(tmp_path / "empty.txt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_shards_are_reported(tmp_path):
    run(store(tmp_path, "jsonl"), tmp_path / "out")
    folder = tmp_path / "out"
    manifest = Manifest.read(folder)
    chunk = folder / "train" / manifest.splits["train"].chunks[0].filename
    original = chunk.read_bytes()
    flipped = bytearray(original)
    flipped[-10] ^= 1
    chunk.write_bytes(flipped)
    TokenShards(folder, manifest, "train")
    with pytest.raises(UsageError, match=f"{chunk}: its checksum differs from the manifest"):
        read_split(folder, "train")
    assert str(chunk) in verify(folder)[0]
    chunk.write_bytes(original[:-2])
    with pytest.raises(UsageError, match=f"{chunk}: {len(original) - 2} bytes instead of {len(original)}"):
        TokenShards(folder, manifest, "train")
    chunk.unlink()
    with pytest.raises(UsageError, match=f"{chunk}: missing"):
        TokenShards(folder, manifest, "train")
    chunk.write_bytes(original)
    assert verify(folder) == []
    (folder / "train" / "index.json").write_text("{")
    with pytest.raises(UsageError, match=f"{folder}/train/index.json: missing, damaged"):
        TokenShards(folder, manifest, "train")
    assert f"{folder}/train/index.json: missing, damaged" in verify(folder)[0]
    for text in ("{", json.dumps({"format_version": 99})):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UsageError, match=r"manifest\.json: (not a manifest|format_version is 99)"):
            Manifest.read(folder)
    os.remove(folder / "manifest.json")
    with pytest.raises(UsageError, match=r"manifest\.json: No such file"):
        Manifest.read(folder)


def test_special_tokens_in_a_text_do_not_end_its_document(tmp_path):
    text = "before <|end_of_text|> after <|begin_of_text|>"
    for settings in (SETTINGS, PrepareSettings(train_tokenizer=300)):
        out = tmp_path / str(settings.train_tokenizer)
        source = store(tmp_path, "jsonl", [text, *DOCUMENTS])
        run(source, out, dataclasses.replace(settings, validation_fraction=0.0))
        ids = read_split(out, "train")
        assert ids.count(1) == ids.count(0) == 1 + len(DOCUMENTS)
        assert Tokenizer.from_file(str(out / "tokenizer.json")).decode(ids[1 : ids.index(1)]) == text


def test_a_changed_tokenizer_file_does_not_resume(tmp_path):
    source, path = store(tmp_path / "texts", "jsonl"), tmp_path / "tokenizer.json"
    train_tokenizer(DOCUMENTS, vocab_size=300).tokenizer.save(str(path))
    run(source, tmp_path / "out", tokenizer=str(path))
    train_tokenizer(DOCUMENTS, vocab_size=280).tokenizer.save(str(path))
    with pytest.raises(UsageError, match=r"contains shards of other sources or settings"):
        run(source, tmp_path / "out", tokenizer=str(path))
