import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer

from ropepp_lit.data.plan import Span
from ropepp_lit.data.prepare import prepare
from ropepp_lit.data.shards import Manifest, TokenShards
from ropepp_lit.data.sources import find_files, read_documents
from ropepp_lit.data.tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID, byte_tokenizer, train_tokenizer
from ropepp_lit.errors import UsageError


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for number in range(40):
        text = f"Document {number}: " + "the quick brown fox – äöü 漢字 🙂\n" * (1 + number % 7)
        (folder / ("deeper" if number % 3 else ".") / f"{number:02}.txt").write_text(text, encoding="utf-8")
    (folder / "broken.txt").write_bytes(b"\xff\xfe\x00bad")
    (folder / "empty.txt").write_text("")
    (folder / ".hidden").write_text("never read")
    return folder


def run(texts, tmp_path, **changes):
    settings = {"vocab_size": None, "validation_fraction": 0.2, "cache_dir": tmp_path / "cache", "show_progress": False}
    return prepare(str(texts), **{**settings, **changes})


def read_split(folder, split):
    manifest = Manifest.read(folder)
    shards = TokenShards(folder, manifest, split)
    return shards.read([Span(index, 0, chunk.tokens) for index, chunk in enumerate(shards.chunks)]).tolist()


@pytest.mark.parametrize("vocab_size", [None, 300])
def test_every_document_lands_in_one_split_as_its_tokens(texts, tmp_path, vocab_size):
    folder = run(texts, tmp_path, vocab_size=vocab_size)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    _, files = find_files(str(texts))
    expected = [text for _, text in read_documents(files) if text is not None]
    found = {}
    for split in ("train", "validation"):
        ids = read_split(folder, split)
        documents, start = [], 0
        for place, token in enumerate(ids):
            if token == EOS_TOKEN_ID:
                assert ids[start] == BOS_TOKEN_ID
                documents.append(tokenizer.decode(ids[start + 1 : place]))
                start = place + 1
        assert start == len(ids)
        found[split] = documents
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert [text for text in expected if text in found["train"]] == found["train"]  # in the order of the files
    manifest = Manifest.read(folder)
    assert manifest.skipped == 2
    for split, documents in found.items():
        totals = manifest.splits[split]
        assert totals.documents == len(documents)
        assert totals.bytes == sum(len(text.encode()) for text in documents)
        assert totals.max_token_id < manifest.vocab_size


def test_litdata_reads_the_shards(texts, tmp_path):
    from litdata import StreamingDataset, TokensLoader

    folder = run(texts, tmp_path)
    blocks = StreamingDataset(str(folder / "train"), item_loader=TokensLoader(block_size=50), shuffle=False)
    found = np.concatenate([np.asarray(block) for block in blocks]).tolist()
    assert found == read_split(folder, "train")[: len(found)]


def test_prepared_once_and_found_again(texts, tmp_path):
    first = run(texts, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert run(texts, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before


def test_another_text_or_setting_is_prepared_anew(texts, tmp_path):
    first = run(texts, tmp_path)
    assert run(texts, tmp_path, vocab_size=300) != first
    assert run(texts, tmp_path, validation_fraction=0.3) != first
    (texts / "new.txt").write_text("one more")
    assert run(texts, tmp_path) != first


def test_two_at_once_prepare_once(texts, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(texts, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [found[0]]


def test_a_killed_preparation_leaves_nothing_that_looks_whole(texts, tmp_path):
    code = (
        "import os, ropepp_lit.data.prepare as p, pathlib\n"
        "write = p.Manifest.write\n"
        "p.Manifest.write = lambda *a: os.kill(os.getpid(), 9)\n"
        f"p.prepare({str(texts)!r}, vocab_size=None, validation_fraction=0.2,"
        f" cache_dir=pathlib.Path({str(tmp_path / 'cache')!r}), show_progress=False)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    left = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert all(path.name.startswith(".") for path in left)
    folder = run(texts, tmp_path)
    assert Manifest.read(folder).splits["train"].documents > 0
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder]


def test_missing_empty_and_unreadable_sources(texts, tmp_path):
    with pytest.raises(UsageError, match=r"data\.source: .*no such folder"):
        run(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UsageError, match=r"data\.source: .*is not a folder"):
        run(texts / "00.txt", tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match=r"data\.source: .*holds no files"):
        run(tmp_path / "bare", tmp_path)
    (tmp_path / "bare" / "only.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"data\.source: .*no documents left for train among 1 files"):
        run(tmp_path / "bare", tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_damaged_shards_are_named(texts, tmp_path):
    folder = run(texts, tmp_path)
    manifest = Manifest.read(folder)
    chunk = folder / "train" / manifest.splits["train"].chunks[0].filename
    whole = chunk.read_bytes()
    flipped = bytearray(whole)
    flipped[-10] ^= 1
    chunk.write_bytes(flipped)
    with pytest.raises(UsageError, match=f"{chunk}: its checksum is not the manifest's"):
        read_split(folder, "train")
    chunk.write_bytes(whole[:-2])
    with pytest.raises(UsageError, match=f"{chunk}: {len(whole) - 2} bytes instead of {len(whole)}"):
        TokenShards(folder, manifest, "train")
    chunk.unlink()
    with pytest.raises(UsageError, match=f"{chunk}: missing"):
        TokenShards(folder, manifest, "train")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match=r"manifest\.json: not a manifest"):
        Manifest.read(folder)
    (folder / "manifest.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(UsageError, match=r"manifest\.json: not a manifest"):
        Manifest.read(folder)
    os.remove(folder / "manifest.json")
    with pytest.raises(UsageError, match=r"manifest\.json: No such file"):
        Manifest.read(folder)


def test_tokenizers_give_back_any_text():
    text = "naïve – 漢字 🙂\t\r\n  def f(x):\n        return '''x'''\n\x00\x1f"
    for tokenizer in (byte_tokenizer(), train_tokenizer(["abc abc abc", text], vocab_size=270)):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        assert (tokenizer.token_to_id("<|begin_of_text|>"), tokenizer.token_to_id("<|end_of_text|>")) == (0, 1)
    assert len(byte_tokenizer().encode(text).ids) == len(text.encode())
    assert byte_tokenizer().get_vocab_size() == 258


def test_a_trained_tokenizer_is_the_same_each_time():
    documents = [f"some words {number} and more words" for number in range(200)]
    one, other = (train_tokenizer(documents, vocab_size=300).to_str() for _ in range(2))
    assert one == other
