"""From text to token shards: in parts that a kill leaves whole, and under their final name only when all is done.

While it works, a folder beside the target (`.NAME.partial`) has the target's layout. A part's chunks are written into
`writing/`, moved into the splits' folders, and then counted by `parts/N.json`, which also holds where the next part
begins. A part without its count is written again, to the same bytes. Parts are cut by the bytes of the documents, in
the order of the stream, so the shards depend on the documents alone and not on how they are stored.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata.streaming import Cache, TokensLoader
from tqdm import tqdm

from ropepp_lit.data.shards import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    TOKENIZER,
    Chunk,
    Manifest,
    TokenSet,
)
from ropepp_lit.errors import DISK_FULL, UsageError
from ropepp_lit.files import check_new_folder, checksum, locked, write_whole
from ropepp_lit.text.identity import tokenizer_digest
from ropepp_lit.text.sources import START, Cursor, Reader, Record, Source, find_files
from ropepp_lit.text.tokenizer import BOS, EOS, TextTokenizer, load_tokenizer, train_tokenizer

PART_BYTES = 32 * 2**20
"""Bytes of text in a part: what a kill costs at most."""

BATCH_BYTES = 2**19
"""Bytes of text that are tokenized at once."""

TRAINING_BYTES = 256 * 2**20
"""Bytes of text that a tokenizer is trained on at most, from the beginning of the stream."""

SPLITS = ("train", "validation")


@dataclass(kw_only=True)
class Settings:
    """What the shards depend on beside the sources: options of :func:`ropepp_lit.commands.prepare.prepare`."""

    tokenizer: str | None = None
    train_tokenizer: int | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    text_key: str = "text"
    min_tokens: int = 0
    max_tokens: int | None = None
    validation_fraction: float = 0.0
    limit: int | None = None
    dedup: bool = False
    on_error: str = "stop"
    chunk_bytes: int = 64 * 2**20
    """`--chunk_size` in bytes."""


@dataclass
class _Part:
    """What a finished part holds, and where the stream goes on."""

    cursor: list[int]
    documents_read: int
    splits: dict[str, TokenSet]
    skipped: dict[str, int]
    examples: list[str]
    index_config: dict[str, Any]
    """litdata's description of the chunks; empty where the part has none."""


def fingerprint_of(files: list[Source], settings: Settings) -> str:
    """A name for sources and settings: another file, size, time, setting or tokenizer gives another one.

    Raises:
        UsageError: the tokenizer cannot be loaded.
    """
    identity = {
        "format_version": FORMAT_VERSION,
        "files": [file.identity for file in files],
        **dataclasses.asdict(settings),
    }
    if settings.tokenizer is not None:  # what the file holds, and not only its name
        tokenizer = load_tokenizer(settings.tokenizer, bos_token=settings.bos_token, eos_token=settings.eos_token)
        identity["tokenizer"] = tokenizer.fingerprint
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def prepare_cached(source: str, settings: Settings, *, cache_dir: Path, show_progress: bool = True) -> Path:
    """Token shards of a source in a cache folder: made now, or found if they were made before.

    Args:
        source: See :func:`~ropepp_lit.text.sources.find_files`.
        settings: What the shards depend on.
        cache_dir: Holds one folder for each source and setting.
        show_progress: Draw progress bars.

    Returns:
        The folder.
    """
    out = cached_folder(source, settings, cache_dir=cache_dir)
    prepare([source], settings, out=out, key="data.source", show_progress=show_progress)
    return out


def cached_folder(source: str, settings: Settings, *, cache_dir: Path) -> Path:
    """Where :func:`prepare_cached` puts the shards of a source, or has put them."""
    name = "builtin" if source == "builtin" else Path(source).resolve().name
    return cache_dir / f"{name}-{fingerprint_of(find_files([source], key='data.source'), settings)}"


def prepare(
    sources: list[str], settings: Settings, *, out: Path, key: str = "SOURCE", show_progress: bool = True
) -> Manifest:
    """Token shards of sources, in a folder: made now, continued, or found whole.

    Args:
        sources: See :func:`~ropepp_lit.text.sources.find_files`.
        settings: What the shards depend on.
        out: The folder; must not exist, be empty, or hold these very shards.
        key: What the user calls the sources, for messages.
        show_progress: Draw progress bars.

    Raises:
        UsageError: nothing to read, a damaged document (unless `on_error` is skip), no space, a folder that holds
            something else.
    """
    files = find_files(sources, key=key)
    fingerprint = fingerprint_of(files, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock")):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not (out / MANIFEST).is_file():
                raise UsageError(f"out: {out} holds something else; name an empty or a new folder")
            manifest = Manifest.read(out)
            if manifest.fingerprint != fingerprint:
                raise UsageError(f"out: {out} holds shards of other sources or settings; name another folder")
            return manifest
        check_new_folder(out)
        try:
            return _Work(sources, files, settings, fingerprint, out, key, show_progress).run()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise UsageError(
                f"out: {out}: {error.strerror}; make room and run the same command again: finished parts are kept"
            ) from error


class _Work:
    """One preparation, from its first part or from where an earlier one was stopped."""

    def __init__(
        self,
        sources: list[str],
        files: list[Source],
        settings: Settings,
        fingerprint: str,
        out: Path,
        key: str,
        show_progress: bool,
    ) -> None:
        self._sources = sources
        self._files, self._settings, self._fingerprint, self._out = files, settings, fingerprint, out
        self._key, self._show_progress = key, show_progress
        self._folder = out.with_name(f".{out.name}.partial")

    def run(self) -> Manifest:
        if (self._folder / MANIFEST).is_file():  # stopped when all was written
            manifest = Manifest.read(self._folder)
            if manifest.fingerprint == self._fingerprint:
                return self._publish(manifest)
        mark = self._folder / "fingerprint"
        if not mark.is_file() or mark.read_text() != self._fingerprint:
            shutil.rmtree(self._folder, ignore_errors=True)
            for name in ("parts", *SPLITS):
                (self._folder / name).mkdir(parents=True)
            write_whole(mark, self._fingerprint)
        self._tokenizer = self._find_tokenizer()
        parts = self._finished_parts()
        self._seen: set[int] = set()
        if self._settings.dedup:
            for number in range(len(parts)):
                self._seen.update(np.fromfile(self._digests_path(number), dtype=np.uint64).tolist())
        with tqdm(
            total=sum(file.num_bytes for file in self._files) or None,
            desc="Tokenizing",
            unit="B",
            unit_scale=True,
            disable=not self._show_progress,
            leave=False,
        ) as self._bar:
            self._started = time.monotonic()
            self._write_parts(parts)
        return self._finish(parts)

    def _find_tokenizer(self) -> TextTokenizer:
        settings = self._settings
        if settings.train_tokenizer is None:
            assert settings.tokenizer is not None
            tokenizer = load_tokenizer(settings.tokenizer, bos_token=settings.bos_token, eos_token=settings.eos_token)
            write_whole(self._folder / TOKENIZER, tokenizer.json)
            return tokenizer
        path = self._folder / TOKENIZER
        if path.is_file():
            return load_tokenizer(str(path), bos_token=BOS, eos_token=EOS)
        with tqdm(
            desc="Training the tokenizer", unit=" documents", disable=not self._show_progress, leave=False
        ) as bar:
            tokenizer = train_tokenizer(self._training_texts(bar), vocab_size=settings.train_tokenizer)
        write_whole(path, tokenizer.json)
        return tokenizer

    def _training_texts(self, bar: tqdm) -> Iterator[str]:
        """Documents that are not held out."""
        left = TRAINING_BYTES
        for _, record in Reader(self._files, text_key=self._settings.text_key):
            if record.text is not None and not self._held_out(record.text):
                left -= len(record.text)
                bar.update()
                yield record.text
                if left < 0:
                    return

    def _finished_parts(self) -> list[_Part]:
        parts: list[_Part] = []
        while (path := self._part_path(len(parts))).is_file():
            values = json.loads(path.read_text())
            values["splits"] = {name: TokenSet.from_dict(split) for name, split in values["splits"].items()}
            parts.append(_Part(**values))
        return parts

    def _part_path(self, number: int) -> Path:
        return self._folder / "parts" / f"{number:06}.json"

    def _digests_path(self, number: int) -> Path:
        return self._part_path(number).with_suffix(".digests")

    def _write_parts(self, parts: list[_Part]) -> None:
        start = Cursor(*parts[-1].cursor) if parts else START
        limit, read, tokens = self._settings.limit, sum(part.documents_read for part in parts), 0
        writer: _PartWriter | None = None
        cursor = start
        for cursor, record, ids in self._tokenized(start):
            if limit is not None and read >= limit:
                break
            if writer is None:
                writer = _PartWriter(self._folder, len(parts), self._settings, self._tokenizer)
            read += 1
            tokens += 0 if ids is None else len(ids)
            self._add(writer, record, ids)
            if read % 50 == 0:
                rate = tokens / (time.monotonic() - self._started)
                self._bar.set_postfix_str(f"{read:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            if writer.num_bytes >= PART_BYTES:
                parts.append(self._commit(writer, len(parts), cursor))
                writer = None
        if writer is not None:
            parts.append(self._commit(writer, len(parts), cursor))

    def _add(self, writer: _PartWriter, record: Record, ids: np.ndarray | None) -> None:
        settings = self._settings
        if record.text is None or ids is None:
            problem = record.problem or ""
            if problem != "empty" and settings.on_error == "stop":
                raise UsageError(
                    f"{record.where}: {problem}; mend it, or leave such documents out and count them by --on_error skip"
                )
            writer.skip(problem, record.where)
        elif len(ids) < settings.min_tokens:
            writer.skip("shorter than min_tokens", None)
        elif settings.max_tokens is not None and len(ids) > settings.max_tokens:
            writer.skip("longer than max_tokens", None)
        elif settings.dedup and (digest := _digest(record.text)) in self._seen:
            writer.skip("repeats an earlier one", None)
        else:
            if settings.dedup:
                self._seen.add(digest)
                writer.digests.append(digest)
            writer.add("validation" if self._held_out(record.text) else "train", record.text, ids)

    def _held_out(self, text: str) -> bool:
        share = self._settings.validation_fraction
        return share > 0 and _digest(text) < share * 2**64

    def _tokenized(self, start: Cursor) -> Iterator[tuple[Cursor, Record, np.ndarray | None]]:
        """Records with their token ids, in order; a batch is tokenized while the one before is written."""
        pending: deque[tuple[list[tuple[Cursor, Record]], Future]] = deque()
        reader = Reader(self._files, text_key=self._settings.text_key, start=start)
        with ThreadPoolExecutor(max_workers=2) as executor:
            batch: list[tuple[Cursor, Record]] = []
            size = 0

            def submit() -> None:
                texts = [record.text for _, record in batch if record.text is not None]
                pending.append((batch, executor.submit(self._tokenizer.encode, texts)))

            for item in reader:
                batch.append(item)
                size += len(item[1].text or "") + 64
                if size >= BATCH_BYTES:
                    submit()
                    batch, size = [], 0
                    if len(pending) > 1:
                        yield from self._results(*pending.popleft())
                    self._bar.update(reader.bytes_read - self._bar.n)
            submit()
            while pending:
                yield from self._results(*pending.popleft())

    def _results(
        self, batch: list[tuple[Cursor, Record]], future: Future
    ) -> Iterator[tuple[Cursor, Record, np.ndarray | None]]:
        ids = iter(future.result())
        for cursor, record in batch:
            yield cursor, record, None if record.text is None else next(ids)

    def _commit(self, writer: _PartWriter, number: int, cursor: Cursor) -> _Part:
        part = writer.finish(cursor)
        if self._settings.dedup:
            np.asarray(writer.digests, dtype=np.uint64).tofile(self._digests_path(number))
        write_whole(self._part_path(number), json.dumps(dataclasses.asdict(part)))
        return part

    def _finish(self, parts: list[_Part]) -> Manifest:
        assert self._tokenizer.eos_token_id is not None
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=self._fingerprint,
            sources=self._sources,
            vocab_size=self._tokenizer.vocab_size,
            bos_token_id=self._tokenizer.bos_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
            opening=list(self._tokenizer.opening),
            dtype=_dtype_of(self._tokenizer)[1],
            skipped={},
            examples=[example for part in parts for example in part.examples][:20],
            splits={name: TokenSet.sum([part.splits[name] for part in parts]) for name in SPLITS},
            tokenizer_digest=tokenizer_digest(self._tokenizer.tokenizer.to_str()),
        )
        for part in parts:
            for reason, count in part.skipped.items():
                manifest.skipped[reason] = manifest.skipped.get(reason, 0) + count
        wanted = SPLITS if self._settings.validation_fraction > 0 else SPLITS[:1]
        for name in wanted:
            if not manifest.splits[name].documents:
                reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
                raise UsageError(
                    f"{self._key}: no documents for {name} in {len(self._files)} files"
                    f"{f' ({reasons})' if reasons else ''}; give more text, or change the share that is held out"
                )
        config = next(part.index_config for part in parts if part.index_config)
        for name in SPLITS:
            if manifest.splits[name].documents:
                _write_index(self._folder / name, manifest.splits[name], config)
            else:
                del manifest.splits[name]
        manifest.write(self._folder)
        return self._publish(manifest)

    def _publish(self, manifest: Manifest) -> Manifest:
        """Give the finished folder its name."""
        for name in ("writing", "parts"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        (self._folder / "fingerprint").unlink(missing_ok=True)
        if self._out.exists():
            self._out.rmdir()  # empty, as was checked
        self._folder.rename(self._out)
        return manifest


class _PartWriter:
    """Writes the documents of one part by litdata."""

    def __init__(self, folder: Path, number: int, settings: Settings, tokenizer: TextTokenizer) -> None:
        self._folder, self._number = folder, number
        self._dtype = _dtype_of(tokenizer)[0]
        self._writing = folder / "writing"
        shutil.rmtree(self._writing, ignore_errors=True)
        self._caches = {
            name: Cache(str(self._writing / name), chunk_bytes=settings.chunk_bytes, item_loader=TokensLoader())
            for name in SPLITS
        }
        self._sets = {name: TokenSet() for name in SPLITS}
        self._skipped: dict[str, int] = {}
        self._examples: list[str] = []
        self._read = 0
        self.digests: list[int] = []
        """Hashes of the documents that were kept, where repeats are left out."""
        self.num_bytes = 0

    def skip(self, reason: str, where: str | None) -> None:
        self._read += 1
        self._skipped[reason] = self._skipped.get(reason, 0) + 1
        if where is not None and len(self._examples) < 20:
            self._examples.append(f"{where}: {reason}")

    def add(self, split: str, text: str, ids: np.ndarray) -> None:
        data, totals = text.encode("utf-8"), self._sets[split]
        self._caches[split][totals.documents] = torch.from_numpy(ids).to(self._dtype)
        totals.add(
            tokens=len(ids),
            num_bytes=len(data),
            gzip_bytes=len(gzip.compress(data, compresslevel=9)) if split == "validation" else 0,
            max_token_id=int(ids.max()),
        )
        self._read += 1
        self.num_bytes += len(data)

    def finish(self, cursor: Cursor) -> _Part:
        config: dict[str, Any] = {}
        for name, cache in self._caches.items():
            totals = self._sets[name]
            if not totals.documents:
                continue
            cache.done()
            cache.merge(1)
            index = json.loads((self._writing / name / INDEX).read_text())
            config = index["config"]
            for number, chunk in enumerate(index["chunks"]):
                written = self._writing / name / chunk["filename"]
                target = self._folder / name / f"chunk-{self._number:06}-{number:04}.bin"
                totals.chunks.append(
                    Chunk(
                        filename=target.name,
                        documents=chunk["chunk_size"],
                        tokens=chunk["dim"],
                        sha256=checksum(written),
                    )
                )
                os.replace(written, target)
            counted = sum(chunk.documents for chunk in totals.chunks), sum(chunk.tokens for chunk in totals.chunks)
            assert counted == (totals.documents, totals.tokens), f"litdata wrote {counted} documents and tokens"
        return _Part(list(cursor), self._read, self._sets, self._skipped, self._examples, config)


def _digest(text: str) -> int:
    """A hash of 64 bits: decides what is held out and what is a repeat."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest())


def _dtype_of(tokenizer: TextTokenizer) -> tuple[torch.dtype, str]:
    return (torch.uint16, "uint16") if tokenizer.vocab_size <= 2**16 else (torch.int32, "int32")


def _write_index(folder: Path, tokens: TokenSet, config: dict[str, Any]) -> None:
    """Litdata's index of a folder of token chunks, so that its own loaders read them too."""
    chunks = [
        {
            "chunk_bytes": (folder / chunk.filename).stat().st_size,
            "chunk_size": chunk.documents,
            "dim": chunk.tokens,
            "filename": chunk.filename,
        }
        for chunk in tokens.chunks
    ]
    write_whole(folder / INDEX, json.dumps({"chunks": chunks, "config": config, "updated_at": "0"}))
