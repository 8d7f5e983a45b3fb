"""Merged parts of a preparation equal a single preparation; options that parts do not support are refused."""

import dataclasses
import itertools
import os
import random
import signal
import time

import pytest
from corpora import DOCUMENTS, SETTINGS, contents, run, store

from ropepp_lit.data import encoders, preparation, segment_writer
from ropepp_lit.data.manifest import Chunk, Manifest, TokenSet
from ropepp_lit.data.parts import Part, merge
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.verify import verify
from ropepp_lit.errors import UsageError

MANY = [f"{n} {text}" for n in range(5) for text in DOCUMENTS]


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(preparation, "SEGMENT_BYTES", 3000)
    monkeypatch.setattr(preparation, "CUT_BYTES", 5000)
    monkeypatch.setattr(encoders, "BATCH_BYTES", 700)


def all_bytes(folder):
    """Return all bytes of finished shards, including the manifest with the names of the sources."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def corpus(folder, num_files=9, documents=MANY):
    """Write files of different sizes and formats."""
    folder.mkdir()
    numbers, kinds = random.Random(0), ("jsonl", "parquet", "jsonl.zst")
    bounds = [0, *sorted(numbers.sample(range(1, len(documents)), num_files - 1)), len(documents)]
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        kind = kinds[n % 3]
        store(folder / "new", kind, documents[begin:end])
        (folder / "new" / f"corpus.{kind}").rename(folder / f"{n}.{kind}")
    (folder / "new").rmdir()
    (folder / "README.md").write_text("about")
    return str(folder)


def in_parts(source, folder, count, settings=SETTINGS):
    order = list(range(1, count + 1))
    random.Random(count).shuffle(order)
    for number in order:
        part = Part(number, count)
        prepare([source], settings, out=folder / f"{number}", part=part, show_progress=False)
    return [folder / f"{number}" for number in order]


@pytest.mark.parametrize("count", [4, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 13))])
def test_merged_parts_equal_a_single_run(tmp_path, count):
    source = corpus(tmp_path / "texts")
    settings = dataclasses.replace(SETTINGS, min_tokens=60, chunk_bytes=1200)
    prepare([source], settings, out=tmp_path / "one", show_progress=False)
    folders = in_parts(source, tmp_path / "parts", count, settings)
    merge(folders, out=tmp_path / "merged")
    assert all_bytes(tmp_path / "merged") == all_bytes(tmp_path / "one")
    assert verify(tmp_path / "merged") == []
    assert (tmp_path / "parts" / "1" / "manifest.json").is_file()  # parts are not changed
    num_with_documents = sum(bool(Manifest.read(folder).splits) for folder in folders)
    assert num_with_documents >= min(count, 3)
    before = (tmp_path / "merged" / "manifest.json").stat().st_mtime_ns
    merge(folders, out=tmp_path / "merged")
    prepare([source], settings, out=tmp_path / "merged", show_progress=False)  # reuses the merged shards
    assert (tmp_path / "merged" / "manifest.json").stat().st_mtime_ns == before


def test_parts_of_documents_without_cuts_by_hash(tmp_path):
    """A repeated text whose hash makes no cut: the first process prepares all documents."""
    text = next(text for text in (f"text {n}" for n in range(99)) if not preparation._is_cut(text.encode()))
    source = corpus(tmp_path / "texts", documents=[text] * 900)
    settings = PrepareSettings(tokenizer="bytes")
    prepare([source], settings, out=tmp_path / "one", show_progress=False)
    folders = in_parts(source, tmp_path / "parts", 4, settings)
    assert [bool(Manifest.read(tmp_path / "parts" / str(n)).splits) for n in (1, 2, 3, 4)] == [
        True,
        False,
        False,
        False,
    ]
    merge(folders, out=tmp_path / "merged")
    assert all_bytes(tmp_path / "merged") == all_bytes(tmp_path / "one")


def test_ranges_of_parts_are_contiguous_and_even():
    sizes = [random.Random(n).randrange(1, 1000) for n in range(500)]
    ranges = [Part(number, 7).range_of(sizes) for number in range(1, 8)]
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == 500
    assert all(0.95 < sum(sizes[slice(*r)]) / (sum(sizes) / 7) < 1.05 for r in ranges)
    assert [Part(n, 3).range_of([0, 0]) for n in (1, 2, 3)] == [(0, 2), (2, 2), (2, 2)]  # unknown sizes


ARRAYS = {
    "2/4": ({}, (2, 4)),
    "auto": ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0"}, (4, 8)),
    "auto/8": ({"JOB_COMPLETION_INDEX": "0"}, (1, 8)),
}


def test_parts_from_the_scheduler():
    for text, (environment, expected) in ARRAYS.items():
        assert dataclasses.astuple(Part.parse(text, environment)) == expected
    stepped = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "4"}
    assert Part.parse("auto", {**stepped, "SLURM_ARRAY_TASK_COUNT": "3"}) == Part(3, 3)
    for text, environment, message in (
        ("0/4", {}, "parts are numbered from 1 to 4"),
        ("5/4", {}, "parts are numbered from 1 to 4"),
        ("3", {}, "is not K/N such as 2/8"),
        ("auto", {}, "neither SLURM_ARRAY_TASK_ID"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "neither SLURM_ARRAY_TASK_ID"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}, "parts are numbered from 1 to 2"),
    ):
        with pytest.raises(UsageError, match=f"part: .*{message}"):
            Part.parse(text, environment)


def test_options_that_parts_do_not_support(tmp_path):
    source = corpus(tmp_path / "texts")
    for changes in ({"dedup": True}, {"limit": 5}, {"tokenizer": None, "train_tokenizer": 300}):
        settings = dataclasses.replace(SETTINGS, **changes)
        with pytest.raises(UsageError, match=f"{list(changes)[-1]}: requires all documents in one process"):
            prepare([source], settings, out=tmp_path / "out", part=Part(1, 2), show_progress=False)
    first, second, third = sorted(in_parts(source, tmp_path / "parts", 3))
    (other,) = in_parts(source, tmp_path / "other", 1)
    for folders, message in (
        ([first, third], "parts 2/3 are missing"),
        ([first, second, third, third], "parts 3/3 are repeated"),
        ([first, second, other], "number of parts"),
        ([first, tmp_path / "texts"], "has no finished part"),
    ):
        with pytest.raises(UsageError, match=f"merge: .*{message}"):
            merge(folders, out=tmp_path / "out")
    settings = dataclasses.replace(SETTINGS, min_tokens=5)
    prepare([source], settings, out=tmp_path / "2", part=Part(2, 3), show_progress=False)
    with pytest.raises(UsageError, match="differ in min_tokens"):
        merge([first, tmp_path / "2", third], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys, pathlib
from ropepp_lit.data import encoders, segment_writer, preparation, parts
from ropepp_lit.data.prepare import PrepareSettings, prepare
preparation.SEGMENT_BYTES, encoders.BATCH_BYTES, preparation.CUT_BYTES = 3000, 700, 5000
left = int(sys.argv[1])

def counting(function):
    def counted(*arguments, **keywords):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return counted

os.replace, os.link = counting(os.replace), counting(os.link)
segment_writer.SegmentWriter.add = counting(segment_writer.SegmentWriter.add)
pathlib.Path.rename = counting(pathlib.Path.rename)
source, out = sys.argv[2], pathlib.Path(sys.argv[3])
for number in (1, 2, 3):
    settings = PrepareSettings(tokenizer="bytes", validation_fraction=0.2)
    prepare([source], settings, out=out / str(number), part=parts.Part(number, 3), show_progress=False)
parts.merge([out / str(number) for number in (3, 1, 2)], out=out / "merged")
print("left", left)
"""


@pytest.mark.end_to_end
@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.6, 0.93])
def test_parts_are_killed_and_resumed(run_file, tmp_path, fraction):
    source = corpus(tmp_path / "texts")
    run(source, tmp_path / "one")
    (tmp_path / "killed.py").write_text(KILLED)
    printed = run_file(tmp_path / "killed.py", 10**6, source, tmp_path / "complete", cwd=tmp_path).stdout
    step = round(fraction * (10**6 - int(printed.split()[-1])))
    script = (tmp_path / "killed.py", step, source, tmp_path / "out")
    run_file(*script, cwd=tmp_path, returncode=-signal.SIGKILL)
    run_file(tmp_path / "killed.py", 10**6, source, tmp_path / "out", cwd=tmp_path)
    assert contents(tmp_path / "out" / "merged") == contents(tmp_path / "one")


@pytest.mark.end_to_end
def test_the_installed_command_prepares_and_merges_parts(command_path, run_file, tmp_path, monkeypatch):
    source = corpus(tmp_path / "texts")
    command = (command_path, "prepare", source, "--tokenizer", "bytes")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    for number in "01":
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", number)
        run_file(*command, "--part", "auto", "--out", tmp_path / "parts" / number, cwd=tmp_path)
    run_file(
        command_path,
        "prepare",
        "--merge",
        *sorted((tmp_path / "parts").glob("?")),
        "--out",
        tmp_path / "merged",
        cwd=tmp_path,
    )
    run_file(*command, "--out", tmp_path / "one", cwd=tmp_path)
    assert all_bytes(tmp_path / "merged") == all_bytes(tmp_path / "one")


def test_chunk_size(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(preparation, "SEGMENT_BYTES", 2**27)
    monkeypatch.setattr(preparation, "CUT_BYTES", 2**40)
    monkeypatch.setattr(encoders, "BATCH_BYTES", 2**19)
    source = store(tmp_path, "jsonl", [*["ab"] * 20_000, "x" * 200_000, *["cd"] * 100])
    manifest = run(source, tmp_path / "out", PrepareSettings(tokenizer="bytes", chunk_bytes=100_000))
    sizes = [(tmp_path / "out" / "train" / c.filename).stat().st_size for c in manifest.splits["train"].chunks]
    documents = [c.documents for c in manifest.splits["train"].chunks]
    assert [size for size in sizes if size > 100_000] == [400_000 + 4 + 12]  # the long document in its own chunk
    assert documents[sizes.index(400_016)] == 1
    assert all(size > 99_980 for size in sizes[: sizes.index(400_016) - 1])
    assert [warning for warning in recwarn if "litdata" in warning.filename] == []
    assert verify(tmp_path / "out") == []


def test_an_unfinished_preparation_with_other_settings_is_not_deleted(tmp_path, monkeypatch):
    source = store(tmp_path / "texts", "jsonl", MANY)
    real = segment_writer.SegmentWriter.finish

    def stopping(self, cursor, *, is_last):
        if self._number == 2:
            raise KeyboardInterrupt
        return real(self, cursor, is_last=is_last)

    monkeypatch.setattr(segment_writer.SegmentWriter, "finish", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    monkeypatch.undo()
    before = all_bytes(tmp_path / ".out.partial")
    with pytest.raises(UsageError, match=r"\.out\.partial has 2 finished segments .*differs in min_tokens; "):
        run(source, tmp_path / "out", min_tokens=7)
    assert all_bytes(tmp_path / ".out.partial") == before


def test_long_documents_are_tokenized_concurrently(tmp_path, monkeypatch):
    import threading

    from ropepp_lit.text.tokenizer import TextTokenizer

    monkeypatch.setenv("RAYON_NUM_THREADS", "4")
    all_running, real = threading.Barrier(4, timeout=20), TextTokenizer.encode

    def encode(self, texts):
        if texts and len(texts[0]) > 500:
            all_running.wait()  # fails unless four run concurrently
        return real(self, texts)

    monkeypatch.setattr(TextTokenizer, "encode", encode)
    source = store(tmp_path, "jsonl", [f"{n} " * 800 for n in range(4)])
    assert run(source, tmp_path / "out", PrepareSettings(tokenizer="bytes")).splits["train"].documents == 4


def test_special_tokens_option(tmp_path):
    source = store(tmp_path, "jsonl", ["a<|end_of_text|>b"] * 3)
    plain = run(source, tmp_path / "plain", PrepareSettings(tokenizer="bytes"))
    parsed = run(source, tmp_path / "parsed", PrepareSettings(tokenizer="bytes", special_tokens=True))
    assert plain.splits["train"].tokens == 3 * (2 + len("a<|end_of_text|>b"))
    assert parsed.splits["train"].tokens == 3 * (2 + 3)
    assert parsed.splits["train"].documents == 3
    assert plain.fingerprint != parsed.fingerprint


def test_reading_a_manifest_of_a_trillion_tokens_is_cheap(tmp_path):
    chunks = [
        Chunk(filename=f"chunk-{n // 4:06}-{n % 4:04}.bin", documents=20_000, tokens=16_000_000, sha256="0" * 64)
        for n in range(62_500)
    ]
    run(store(tmp_path, "jsonl"), tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    manifest.splits["train"] = TokenSet(documents=1_250_000_000, tokens=10**12, chunks=chunks)
    begin = time.process_time()
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path).splits["train"].chunks == chunks
    assert time.process_time() - begin < 5
    assert (tmp_path / "manifest.json").stat().st_size < 20e6


DAMAGE = {
    "a missing chunk": lambda path: path.unlink(),
    "a cut chunk": lambda path: os.truncate(path, path.stat().st_size - 2),
    "a named pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_chunks_are_not_merged(tmp_path, damage):
    folders = in_parts(corpus(tmp_path / "texts"), tmp_path, 2)
    path = min((folders[0] / "train").glob("*.bin"))
    DAMAGE[damage](path)
    with pytest.raises(UsageError, match=f"{path}: (missing|[0-9]+ bytes instead of)"):
        merge(folders, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def interrupted(source, out, monkeypatch, **options):
    """Leave an unfinished preparation of three parts, and return its folder."""
    commit = preparation.Preparation._commit

    def commit_three(self, writer, number, *arguments, **keywords):
        if number == 3:
            raise KeyboardInterrupt
        return commit(self, writer, number, *arguments, **keywords)

    settings = dataclasses.replace(SETTINGS, **options)
    with monkeypatch.context() as patch:
        patch.setattr(preparation.Preparation, "_commit", commit_three)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], settings, out=out, show_progress=False)
    return out.with_name(f".{out.name}.partial")


UNFINISHED = {
    "a cut chunk": ("train/*.bin", DAMAGE["a cut chunk"], "bytes instead of"),
    "no checksum": (
        "parts/*.json",
        lambda path: path.write_text(path.read_text().replace("checksum", "sum")),
        "damaged",
    ),
    "digests": ("parts/*.digests", lambda path: path.write_bytes(path.read_bytes()[:-8]), "damaged; remove"),
    "a pipe of digests": ("parts/*.digests", DAMAGE["a named pipe"], "damaged; remove"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFINISHED)
def test_a_damaged_part_is_not_continued(tmp_path, monkeypatch, case):
    glob, damage, problem = UNFINISHED[case]
    source, out = corpus(tmp_path / "texts"), tmp_path / "shards"
    folder = interrupted(source, out, monkeypatch, dedup=True)
    damage(min(folder.glob(glob)))
    with pytest.raises(UsageError, match=problem):
        prepare([source], dataclasses.replace(SETTINGS, dedup=True), out=out, show_progress=False)
    assert not out.exists()
