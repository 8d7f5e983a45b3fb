"""From text to token shards: in parts that a kill leaves whole, and under their final name only when all is done.

While it works, a folder beside the target (`.NAME.partial`) has the target's layout. A part's chunks are written into
`writing/`, moved into the splits' folders, and then counted by `parts/N.json`, which also has the place where the next
part begins. A part without its count is written again, to the same bytes.

Parts are cut where the documents say so: behind one whose hash is high for its length (on average every
:data:`CUT_BYTES`), and where :data:`PART_BYTES` are reached since the last cut. So the shards depend on the documents
alone and not on how they are stored, and a process that begins anywhere in the stream (`--part`, :mod:`.shares`) cuts
as one that read everything, from the first document on that is cut by its hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ropepp_lit.data.encoders import Format, TextEncoder, encoded, make_encoder
from ropepp_lit.data.part_writer import SPLITS, Part, PartWriter, write_index
from ropepp_lit.data.report import conversation_lines, shown
from ropepp_lit.data.shards import FORMAT_VERSION, MANIFEST, TOKENIZER, Manifest, TokenSet
from ropepp_lit.data.shares import Share, add_counts, check_splits, write_share
from ropepp_lit.data.trained_tokens import can_be_trained_on
from ropepp_lit.errors import UsageError
from ropepp_lit.files import write_whole
from ropepp_lit.json_files import read_json, sealed, unsealed
from ropepp_lit.terminal import progress_bar
from ropepp_lit.text.formats import Record
from ropepp_lit.text.identity import tokenizer_digest
from ropepp_lit.text.sources import START, Cursor, Found, Reader
from ropepp_lit.text.tokenizer import BOS, EOS, TextTokenizer, load_tokenizer, train_tokenizer

PART_BYTES = 128 * 2**20
"""Bytes of text in a part at most, but for its last document: what a kill costs."""

CUT_BYTES = 2 * PART_BYTES
"""Bytes of text, on average, between two documents behind which a part ends by their hash."""

TRAINING_BYTES = 256 * 2**20
"""Bytes of text that a tokenizer is trained on at most, from the beginning of the stream."""

IDENTITY = "identity.json"
"""In the folder of an unfinished preparation: what it is made from."""


@dataclass(kw_only=True)
class Settings:
    """What the shards depend on beside the sources: options of :func:`ropepp_lit.commands.prepare.prepare`."""

    tokenizer: str | None = None
    train_tokenizer: int | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    special_tokens: bool = False
    text_key: str = "text"
    split: str | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    validation_fraction: float = 0.0
    limit: int | None = None
    dedup: bool = False
    on_error: str = "stop"
    chunk_bytes: int = 64 * 2**20
    """`--chunk_size` in bytes."""
    format: Format = "text"
    chat_template: str | None = None
    """The Jinja template in the file of `--chat_template`."""
    train_on: str = "assistant"

    def encoder(self, tokenizer: TextTokenizer) -> TextEncoder:
        """What makes tokens of records."""
        return make_encoder(
            self.format,
            tokenizer,
            text_key=self.text_key,
            special_tokens=self.special_tokens,
            template=self.chat_template,
            train_on=self.train_on,
        )


class Preparation:
    """One preparation, from its first part or from where an earlier one was stopped."""

    def __init__(
        self,
        sources: list[str],
        found: Found,
        settings: Settings,
        identity: dict[str, Any],
        fingerprint: str,
        out: Path,
        key: str,
        share: Share | None,
        show_progress: bool,
        tell: Callable[[str], None] | None,
    ) -> None:
        self._sources, self._files, self._left_out = sources, found.files, found.left_out
        self._settings, self._identity, self._fingerprint, self._out = settings, identity, fingerprint, out
        self._key, self._share, self._show_progress = key, share, show_progress
        self._tell = tell
        self._range = 0, len(self._files)
        if share is not None:
            self._range = share.range_of([file.num_bytes for file in self._files])
        self._folder = out.with_name(f".{out.name}.partial")

    def run(self) -> Manifest:
        """Make what is not made yet, and give the folder its name."""
        if (self._folder / MANIFEST).is_file():  # stopped when all was written
            manifest = Manifest.read(self._folder)
            if manifest.fingerprint == self._fingerprint:
                return self._publish(manifest)
        self._begin()
        self._tokenizer = self._find_tokenizer()
        self._encoder = self._settings.encoder(self._tokenizer)
        parts = self._finished_parts()
        self._seen: set[int] = set()
        self._has_shown = False
        if self._settings.dedup:
            for number in range(len(parts)):
                self._seen.update(np.fromfile(self._digests_path(number), dtype=np.uint64).tolist())
        total = sum(file.num_bytes for file in self._files[: self._range[1]]) or None
        with progress_bar("Tokenizing", unit="bytes", total=total, scale=True, show=self._show_progress) as self._bar:
            self._started = time.monotonic()
            self._write_parts(parts)
        return self._finish(parts)

    def _begin(self) -> None:
        """Make the folder to work in, unless there is one that these sources and settings began.

        Raises:
            UsageError: others began one, and parts of it are finished.
        """
        mark = self._folder / IDENTITY
        try:
            before = unsealed(read_json(mark))
        except (OSError, ValueError):
            before = {}
        if before.get("fingerprint") == self._fingerprint:
            return
        if finished := len(list(self._folder.glob("parts/*.json"))):
            names = {**before.get("identity", {}), **self._identity}
            changed = [name for name in names if before.get("identity", {}).get(name) != self._identity.get(name)]
            size = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            raise UsageError(
                f"out: {self._folder} has {finished} finished parts ({size / 1e6:,.1f} MB) of another preparation, "
                f"with other {', '.join(changed) or 'parts'}; go on with it by its own options, or remove that folder "
                "to begin anew"
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ("parts", *SPLITS):
            (self._folder / name).mkdir(parents=True)
        write_whole(mark, json.dumps(sealed({"fingerprint": self._fingerprint, "identity": self._identity})))

    def _find_tokenizer(self) -> TextTokenizer:
        settings = self._settings
        if settings.train_tokenizer is None:
            assert settings.tokenizer is not None
            tokenizer = load_tokenizer(settings.tokenizer, bos_token=settings.bos_token, eos_token=settings.eos_token)
            write_whole(self._folder / TOKENIZER, tokenizer.json)
            if settings.special_tokens:
                tokenizer = dataclasses.replace(tokenizer, is_bytes=False)  # not by the look-up of bytes
                tokenizer.tokenizer.encode_special_tokens = False
            return tokenizer
        path = self._folder / TOKENIZER
        if path.is_file():
            return load_tokenizer(str(path), bos_token=BOS, eos_token=EOS)
        with progress_bar("Training the tokenizer", unit="documents", show=self._show_progress) as bar:
            tokenizer = train_tokenizer(self._training_texts(bar), vocab_size=settings.train_tokenizer)
        write_whole(path, tokenizer.json)
        return tokenizer

    def _training_texts(self, bar: tqdm) -> Iterator[str]:
        """Documents that are not held out."""
        left = TRAINING_BYTES
        for _, record in self._reader(START):
            if record.text is not None and not self._held_out(record.text.encode("utf-8")):
                left -= len(record.text)
                bar.update()
                yield record.text
                if left < 0:
                    return

    def _reader(self, start: Cursor, columns: tuple[str, ...] = ()) -> Reader:
        settings = self._settings
        return Reader(self._files, text_key=settings.text_key, split=settings.split, columns=columns, start=start)

    def _finished_parts(self) -> list[Part]:
        parts: list[Part] = []
        while (path := self._part_path(len(parts))).is_file():
            parts.append(Part.read(path))
        return parts

    def _part_path(self, number: int) -> Path:
        return self._folder / "parts" / f"{number:06}.json"

    def _digests_path(self, number: int) -> Path:
        return self._part_path(number).with_suffix(".digests")

    def _first_cursor(self) -> Cursor | None:
        """Where the share begins: behind the first document of its files that is cut by its hash."""
        first, last = self._range
        if first == 0:
            return START if last else None
        for cursor, record in self._reader(Cursor(first, 0), self._encoder.columns):
            if cursor.file >= last:
                break
            text = self._encoder.render(record).text
            if text is not None and _is_cut(text.encode("utf-8")):
                return cursor
        return None

    @property
    def _dtype(self) -> str:
        fits = self._tokenizer.vocab_size <= 2**16 and not self._encoder.marks_trained_tokens
        return "uint16" if fits else "int32"

    def _write_parts(self, parts: list[Part]) -> None:
        start = Cursor(*parts[-1].cursor) if parts else self._first_cursor()
        if start is None or (parts and parts[-1].is_last):
            return
        limit, read, tokens = self._settings.limit, sum(part.documents_read for part in parts), 0
        writer: PartWriter | None = None
        cursor = start
        reader = self._reader(start, self._encoder.columns)
        for cursor, record, ids in encoded(reader, self._encoder, self._advance):
            if limit is not None and read >= limit:
                break
            if writer is None:
                writer = PartWriter(
                    self._folder,
                    len(parts),
                    dtype=self._dtype,
                    marks_trained_tokens=self._encoder.marks_trained_tokens,
                    chunk_bytes=self._settings.chunk_bytes,
                )
            read += 1
            tokens += 0 if ids is None else len(ids)
            data = (record.text or "").encode("utf-8")
            self._add(writer, record, data, ids)
            if read % 50 == 0:
                rate = tokens / (time.monotonic() - self._started)
                self._bar.set_postfix_str(f"{read:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            is_cut = _is_cut(data)
            if is_cut or writer.num_bytes >= PART_BYTES:
                is_last = is_cut and cursor.file >= self._range[1]
                parts.append(self._commit(writer, len(parts), cursor, is_last))
                writer = None
                if is_last:
                    break
        if writer is not None:
            parts.append(self._commit(writer, len(parts), cursor, is_last=False))

    def _advance(self, bytes_read: int) -> None:
        self._bar.update(bytes_read - self._bar.n)

    def _add(self, writer: PartWriter, record: Record, data: bytes, ids: np.ndarray | None) -> None:
        settings = self._settings
        if record.text is None or ids is None:
            if record.problem != "empty" and settings.on_error == "stop":
                raise stop(record, self._key)
            writer.skip(record.problem or "", record.where)
        elif len(ids) < settings.min_tokens:
            writer.skip("shorter than min_tokens", None)
        elif settings.max_tokens is not None and len(ids) > settings.max_tokens:
            writer.skip("longer than max_tokens", None)
        elif self._encoder.marks_trained_tokens and not can_be_trained_on(ids):
            writer.skip("no trained token", record.where)
        elif settings.dedup and (digest := _digest(data)) in self._seen:
            writer.skip("repeats an earlier one", None)
        else:
            if settings.dedup:
                self._seen.add(digest)
                writer.digests.append(digest)
            writer.add("validation" if self._held_out(data) else "train", data, ids, record.notices)
            if self._encoder.marks_trained_tokens and self._tell is not None and not self._has_shown:
                self._has_shown = True
                with tqdm.external_write_mode():
                    self._tell(f"{record.where}, with what is trained marked:\n\n{shown(ids, self._tokenizer)}\n")

    def _held_out(self, data: bytes) -> bool:
        share = self._settings.validation_fraction
        return share > 0 and _digest(data) < share * 2**64

    def _commit(self, writer: PartWriter, number: int, cursor: Cursor, is_last: bool) -> Part:
        part = writer.finish(cursor, is_last=is_last)
        if self._settings.dedup:
            np.asarray(writer.digests, dtype=np.uint64).tofile(self._digests_path(number))
        part.write(self._part_path(number))
        return part

    def _finish(self, parts: list[Part]) -> Manifest:
        assert self._tokenizer.eos_token_id is not None
        left_out = self._left_out if self._share is None or self._share.number == 1 else []
        examples = [f"{name}: {reason}" for name, reason in left_out[:5]]
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=self._fingerprint,
            sources=self._sources,
            vocab_size=self._tokenizer.vocab_size,
            bos_token_id=self._tokenizer.bos_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
            opening=list(self._tokenizer.opening),
            dtype=self._dtype,
            skipped={},
            examples=[*examples, *(example for part in parts for example in part.examples)][:20],
            splits={name: TokenSet.sum([part.splits[name] for part in parts]) for name in SPLITS},
            tokenizer_digest=tokenizer_digest(self._tokenizer.json),
            marks_trained_tokens=self._encoder.marks_trained_tokens,
            holds_pairs=self._encoder.makes_pairs,
            chat_template=self._encoder.chat_template,
            end_of_turn=list(self._encoder.end_of_turn),
        )
        add_counts(manifest.skipped, ({reason: 1} for _, reason in left_out))
        add_counts(manifest.skipped, (part.skipped for part in parts))
        add_counts(manifest.notices, (part.notices for part in parts))
        if self._share is None:
            check_splits(manifest, self._settings.validation_fraction, self._key, len(self._files))
        config: dict[str, Any] = next((part.index_config for part in parts if part.index_config), {})
        for name in SPLITS:
            if manifest.splits[name].documents:
                write_index(self._folder / name, manifest.splits[name], config)
            else:
                del manifest.splits[name]
        if self._share is not None:
            write_share(self._folder, self._share, self._identity, parts=len(parts), index_config=config)
        if manifest.marks_trained_tokens and self._tell is not None:
            self._tell("\n".join(conversation_lines(manifest, self._folder)))
        manifest.write(self._folder)
        return self._publish(manifest)

    def _publish(self, manifest: Manifest) -> Manifest:
        """Give the finished folder its name."""
        for name in ("writing", "parts"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        (self._folder / IDENTITY).unlink(missing_ok=True)
        if self._out.exists():
            self._out.rmdir()  # empty, as was checked
        self._folder.rename(self._out)
        return manifest


def stop(record: Record, key: str) -> UsageError:
    """The error for a record without a text; `key` is what the user calls the sources."""
    option = "--data.on_error" if key.startswith("data.") else "--on_error"
    remedy = f"{record.remedy}, or leave such documents out and count them by {option} skip"
    return UsageError(f"{record.where}: {record.problem}; {remedy}")


def _is_cut(data: bytes) -> bool:
    """Whether a part ends behind a document, by its text in UTF-8 alone; the more often the longer it is."""
    return bool(data) and zlib.crc32(data) >= 2**32 * (1 - len(data) / CUT_BYTES)


def _digest(data: bytes) -> int:
    """A hash of 64 bits of a text in UTF-8: decides what is held out and what is a repeat."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
