"""From text to token shards: once, found again by fingerprint, under their final name only when whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from filelock import FileLock
from litdata.streaming import Cache, TokensLoader
from tokenizers import Tokenizer
from tqdm import tqdm

from ropepp_lit.data.shards import FORMAT_VERSION, TOKENIZER, Chunk, Manifest, TokenSet, checksum
from ropepp_lit.data.sources import find_files, read_documents
from ropepp_lit.data.tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID, byte_tokenizer, train_tokenizer
from ropepp_lit.errors import UsageError

CHUNK_BYTES = 64 * 2**20


def default_cache_dir() -> Path:
    """Where prepared data lies unless told otherwise: `ropepp_lit` in the user's cache folder (XDG's convention)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ropepp_lit"


def prepare(
    source: str, *, vocab_size: int | None, validation_fraction: float, cache_dir: Path, show_progress: bool = True
) -> Path:
    """Token shards of a source: made now, or found if they were made before.

    Args:
        source: `builtin` or a folder of text files.
        vocab_size: Train a BPE with so many tokens on the training documents; None means bytes.
        validation_fraction: Share of the documents that is held out, chosen by a hash of their text.
        cache_dir: Holds one folder for each source and setting.
        show_progress: Draw progress bars.

    Returns:
        The folder: manifest, tokenizer, and the splits `train` and `validation`.

    Raises:
        UsageError: the source holds no text, or too little to hold documents out.
    """
    root, files = find_files(source)
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in files]
    identity = {
        "format_version": FORMAT_VERSION,
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "root": str(root.resolve()),
        "vocab_size": vocab_size,
        "validation_fraction": validation_fraction,
    }
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    tokens = "bytes" if vocab_size is None else f"bpe{vocab_size}"
    target = cache_dir / f"{source if source == 'builtin' else root.resolve().name}-{tokens}-{fingerprint}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.exists():
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _write(partial, source, files, fingerprint, vocab_size, validation_fraction, show_progress)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _write(
    folder: Path,
    source: str,
    files: list[Path],
    fingerprint: str,
    vocab_size: int | None,
    validation_fraction: float,
    show_progress: bool,
) -> None:
    splits: dict[str, list[Path]] = {"train": [], "validation": []}
    for path, text in read_documents(files):
        if text is not None:
            splits["validation" if _held_out(text, validation_fraction) else "train"].append(path)
    for name, paths in splits.items():
        if not paths:
            raise UsageError(
                f"data.source: {source}: no documents left for {name} among {len(files)} files; "
                "give more text files (UTF-8), or change data.validation_fraction"
            )

    def texts(paths: list[Path], what: str) -> Iterable[str]:
        documents = tqdm(
            read_documents(paths), what, len(paths), unit=" documents", disable=not show_progress, leave=False
        )
        return (text for _, text in documents if text is not None)

    if vocab_size is None:
        tokenizer = byte_tokenizer()
    else:
        tokenizer = train_tokenizer(texts(splits["train"], "Training the tokenizer"), vocab_size=vocab_size)
    folder.mkdir()
    dtype = torch.uint16 if tokenizer.get_vocab_size() <= 2**16 else torch.int32
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint,
        source=source,
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        dtype=str(dtype).removeprefix("torch."),
        skipped=len(files) - sum(map(len, splits.values())),
        splits={
            name: _write_split(
                folder / name, texts(paths, f"Tokenizing {name}"), tokenizer, dtype, with_gzip=name == "validation"
            )
            for name, paths in splits.items()
        },
    )
    tokenizer.save(str(folder / TOKENIZER))
    manifest.write(folder)


def _write_split(
    folder: Path, texts: Iterable[str], tokenizer: Tokenizer, dtype: torch.dtype, *, with_gzip: bool
) -> TokenSet:
    folder.mkdir()
    writer = Cache(str(folder), chunk_bytes=CHUNK_BYTES, item_loader=TokensLoader())
    documents = tokens = num_bytes = gzip_bytes = max_token_id = 0
    for text in texts:
        ids = [BOS_TOKEN_ID, *tokenizer.encode(text, add_special_tokens=False).ids, EOS_TOKEN_ID]
        writer[documents] = torch.tensor(ids, dtype=dtype)
        data = text.encode("utf-8")
        documents, tokens, num_bytes = documents + 1, tokens + len(ids), num_bytes + len(data)
        max_token_id = max(max_token_id, *ids)
        if with_gzip:
            gzip_bytes += len(gzip.compress(data, compresslevel=9))
    writer.done()
    writer.merge(1)
    chunks = [
        Chunk(
            filename=chunk["filename"],
            documents=chunk["chunk_size"],
            tokens=chunk["dim"],
            sha256=checksum(folder / chunk["filename"]),
        )
        for chunk in json.loads((folder / "index.json").read_text())["chunks"]
    ]
    written = sum(chunk.documents for chunk in chunks), sum(chunk.tokens for chunk in chunks)
    assert written == (documents, tokens), f"{folder}: wrote {written} of {(documents, tokens)} documents and tokens"
    return TokenSet(
        documents=documents,
        tokens=tokens,
        bytes=num_bytes,
        gzip_bytes=gzip_bytes if with_gzip else None,
        max_token_id=max_token_id,
        chunks=chunks,
    )


def _held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64
