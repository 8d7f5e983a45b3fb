"""Corpora in all storage formats, and readers of prepared folders."""

import dataclasses
import gzip
import hashlib
import json

import numpy as np
import pyarrow
import pyarrow.parquet

from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.plan import ChunkSlice
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.text.tokenizer import byte_tokenizer

DOCUMENTS = [f"Document {n}: " + "the quick brown fox – äöü 漢字 🙂\r\n" * (1 + n % 7) for n in range(60)]
SETTINGS = PrepareSettings(tokenizer="bytes", validation_fraction=0.2)


def store(folder, kind, documents=DOCUMENTS):
    """Write a corpus in one of the storage formats; returns the name of the source."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)).encode()
    path = folder / f"corpus.{kind}"
    if kind == "txt":
        for number, text in enumerate(documents):
            (folder / f"{number:04}.txt").write_bytes(text.encode())
        return str(folder / "*.txt")
    if kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines[:500]) + gzip.compress(lines[500:]))
    elif kind == "jsonl.zst":
        path.write_bytes(b"".join(pyarrow.compress(x, codec="zstd", asbytes=True) for x in (lines[:500], lines[500:])))
    elif kind == "parquet":
        table = pyarrow.table({"id": list(range(len(documents))), "text": documents})
        pyarrow.parquet.write_table(table, path, row_group_size=17)
    return str(path)


def run(source, out, settings=SETTINGS, **changes):
    sources = [source] if isinstance(source, str) else source
    return prepare(sources, dataclasses.replace(settings, **changes), out=out, show_progress=False)


def read_slices(shards, slices):
    tokens = np.empty(sum(each.num_tokens for each in slices), dtype=np.int64)
    assert shards.read(slices, tokens) == len(tokens)
    return tokens.tolist()


def read_split(folder, split):
    shards = TokenShards(folder, Manifest.read(folder), split)
    return read_slices(shards, [ChunkSlice(index, 0, chunk.tokens) for index, chunk in enumerate(shards.chunks)])


def contents(folder):
    """Return the files and manifest of finished shards, except values that depend on the names of the sources."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    for key in ("fingerprint", "sources", "checksum"):
        del manifest[key]
    return files, manifest


def reference(documents, fraction=0.2):
    """Compute the tokens of each split by a simple loop."""
    tokenizer = byte_tokenizer().tokenizer
    splits = {"train": [], "validation": []}
    for text in documents:
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        split = "validation" if number < fraction * 2**64 else "train"
        splits[split] += [0, *tokenizer.encode(text, add_special_tokens=False).ids, 1]
    return splits
