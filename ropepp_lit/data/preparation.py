"""Convert text to token shards in segments, so that an interrupted preparation can resume.

During the preparation, a folder next to the target (`.NAME.partial`) has the target's layout; it gets its final name
when everything is complete. The chunks of a segment are written into `writing/`, moved into the splits' folders, and
then recorded in `parts/N.json`, which also stores the position where the next segment begins. A segment without this
record is written again, with the same bytes.

A segment ends after a document whose hash is high relative to its length (on average every :data:`CUT_BYTES`), or when
:data:`SEGMENT_BYTES` are reached since the last cut. So the shards depend only on the documents, not on how they are
stored. A process that starts at any position of the stream (`--part`, :mod:`.parts`) makes the same cuts as one that
reads everything, from the first cut by hash on.
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

from ropepp_lit.data.encoders import Format, TextEncoder, encode_records, make_encoder
from ropepp_lit.data.manifest import FORMAT_VERSION, MANIFEST, TOKENIZER, Manifest, TokenSet
from ropepp_lit.data.parts import Part, add_counts, check_splits, write_part
from ropepp_lit.data.report import conversation_lines, highlight_trained
from ropepp_lit.data.segment_writer import SPLITS, Segment, SegmentWriter, write_index
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.data.trained_tokens import can_be_trained_on
from ropepp_lit.errors import UsageError
from ropepp_lit.files import write_whole
from ropepp_lit.json_files import read_json, sealed, unsealed
from ropepp_lit.terminal import progress_bar
from ropepp_lit.text.formats import Record
from ropepp_lit.text.identity import tokenizer_digest
from ropepp_lit.text.sources import START, Cursor, Inputs, Reader
from ropepp_lit.text.tokenizer import BOS, EOS, TextTokenizer, load_tokenizer, train_tokenizer

SEGMENT_BYTES = 128 * 2**20
"""Maximum bytes of text in a segment, excluding its last document. At most one segment is lost by a kill."""

CUT_BYTES = 2 * SEGMENT_BYTES
"""Average bytes of text between two cuts by hash."""

TRAINING_BYTES = 256 * 2**20
"""Maximum bytes of text for training a tokenizer, from the beginning of the stream."""

IDENTITY = "identity.json"
"""File in the folder of an unfinished preparation that identifies its inputs and settings."""


@dataclass(kw_only=True)
class PrepareSettings:
    """Options of a preparation that affect the shards, see :func:`ropepp_lit.commands.prepare.prepare`."""

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
    """Content of the file `--chat_template` (Jinja)."""
    train_on: str = "assistant"

    def encoder(self, tokenizer: TextTokenizer) -> TextEncoder:
        """Create the encoder that tokenizes records."""
        return make_encoder(
            self.format,
            tokenizer,
            text_key=self.text_key,
            special_tokens=self.special_tokens,
            template=self.chat_template,
            train_on=self.train_on,
        )


class Preparation:
    """A preparation, from its first segment or resumed where an earlier run was interrupted.

    Args:
        sources: Names of the sources as given by the user.
        inputs: Inputs that the sources resolve to.
        settings: Options that affect the shards.
        identity: Values that identify inputs and settings.
        fingerprint: Hash of `identity`.
        out: Folder of the shards.
        key: Name of the option with the sources, for messages.
        part: Part of the shards to prepare; None means all.
        show_progress: Whether to show progress bars.
        report: Called with information about conversations, for printing.
    """

    def __init__(
        self,
        sources: list[str],
        inputs: Inputs,
        settings: PrepareSettings,
        identity: dict[str, Any],
        fingerprint: str,
        out: Path,
        key: str,
        part: Part | None,
        show_progress: bool,
        report: Callable[[str], None] | None,
    ) -> None:
        self._sources, self._files, self._ignored = sources, inputs.files, inputs.ignored
        self._settings, self._identity, self._fingerprint, self._out = settings, identity, fingerprint, out
        self._key, self._part, self._show_progress = key, part, show_progress
        self._report = report
        self._range = 0, len(self._files)
        if part is not None:
            self._range = part.range_of([file.num_bytes for file in self._files])
        self._folder = out.with_name(f".{out.name}.partial")

    def run(self) -> Manifest:
        """Write the missing segments, and rename the folder to its final name."""
        if (self._folder / MANIFEST).is_file():  # interrupted after everything was written
            manifest = Manifest.read(self._folder)
            if manifest.fingerprint == self._fingerprint:
                return self._publish(manifest)
        self._create_folder()
        self._tokenizer = self._load_or_train_tokenizer()
        self._encoder = self._settings.encoder(self._tokenizer)
        segments = self._finished_segments()
        self._seen: set[int] = set()
        self._has_shown_example = False
        if self._settings.dedup:
            for number, segment in enumerate(segments):
                self._seen.update(segment.read_digests(self._digests_path(number)))
        total = sum(file.num_bytes for file in self._files[: self._range[1]]) or None
        with progress_bar("Tokenizing", unit="bytes", total=total, scale=True, show=self._show_progress) as self._bar:
            self._started = time.monotonic()
            self._write_segments(segments)
        return self._finish(segments)

    def _create_folder(self) -> None:
        """Create the working folder, unless one of the same inputs and settings exists.

        Raises:
            UsageError: The folder has finished segments of another preparation.
        """
        path = self._folder / IDENTITY
        try:
            existing = unsealed(read_json(path), required=True)
        except (OSError, ValueError):
            existing = {}
        if existing.get("fingerprint") == self._fingerprint:
            return
        if finished := len(list(self._folder.glob("parts/*.json"))):
            names = {**existing.get("identity", {}), **self._identity}
            changed = [name for name in names if existing.get("identity", {}).get(name) != self._identity.get(name)]
            size = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            raise UsageError(
                f"out: {self._folder} has {finished} finished segments ({size / 1e6:,.1f} MB) of another preparation, "
                f"which differs in {', '.join(changed) or 'part'}; continue it with its own options, or remove that "
                "folder to start over"
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ("parts", *SPLITS):
            (self._folder / name).mkdir(parents=True)
        write_whole(path, json.dumps(sealed({"fingerprint": self._fingerprint, "identity": self._identity})))

    def _load_or_train_tokenizer(self) -> TextTokenizer:
        settings = self._settings
        if settings.train_tokenizer is None:
            assert settings.tokenizer is not None
            tokenizer = load_tokenizer(settings.tokenizer, bos_token=settings.bos_token, eos_token=settings.eos_token)
            write_whole(self._folder / TOKENIZER, tokenizer.json)
            if settings.special_tokens:
                tokenizer = dataclasses.replace(
                    tokenizer, is_bytes=False
                )  # the look-up of bytes does not parse special tokens
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
        """Iterate over the documents that are not held out, up to :data:`TRAINING_BYTES`."""
        remaining = TRAINING_BYTES
        for _, record in self._reader(START):
            if record.text is not None and not self._held_out(record.text.encode("utf-8")):
                remaining -= len(record.text)
                bar.update()
                yield record.text
                if remaining < 0:
                    return

    def _reader(self, start: Cursor, columns: tuple[str, ...] = ()) -> Reader:
        settings = self._settings
        return Reader(self._files, text_key=settings.text_key, split=settings.split, columns=columns, start=start)

    def _finished_segments(self) -> list[Segment]:
        segments: list[Segment] = []
        while (path := self._segment_path(len(segments))).is_file():
            segments.append(Segment.read(path))
        return segments

    def _segment_path(self, number: int) -> Path:
        return self._folder / "parts" / f"{number:06}.json"

    def _digests_path(self, number: int) -> Path:
        return self._segment_path(number).with_suffix(".digests")

    def _first_cursor(self) -> Cursor | None:
        """Return where the part begins: after the first cut by hash in its files; None if there is none."""
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

    def _write_segments(self, segments: list[Segment]) -> None:
        start = Cursor(*segments[-1].cursor) if segments else self._first_cursor()
        if start is None or (segments and segments[-1].is_last):
            return
        limit, read, tokens = self._settings.limit, sum(segment.documents_read for segment in segments), 0
        writer: SegmentWriter | None = None
        cursor = start
        reader = self._reader(start, self._encoder.columns)
        for cursor, record, ids in encode_records(reader, self._encoder, self._advance):
            if limit is not None and read >= limit:
                break
            if writer is None:
                writer = SegmentWriter(
                    self._folder,
                    len(segments),
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
            if is_cut or writer.num_bytes >= SEGMENT_BYTES:
                is_last = is_cut and cursor.file >= self._range[1]
                segments.append(self._commit(writer, len(segments), cursor, is_last))
                writer = None
                if is_last:
                    break
        if writer is not None:
            segments.append(self._commit(writer, len(segments), cursor, is_last=False))

    def _advance(self, bytes_read: int) -> None:
        self._bar.update(bytes_read - self._bar.n)

    def _add(self, writer: SegmentWriter, record: Record, data: bytes, ids: np.ndarray | None) -> None:
        settings = self._settings
        if record.text is None or ids is None:
            if record.problem != "empty" and settings.on_error == "stop":
                raise record_error(record, self._key)
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
            if self._encoder.marks_trained_tokens and self._report is not None and not self._has_shown_example:
                self._has_shown_example = True
                with tqdm.external_write_mode():
                    text = highlight_trained(ids, self._tokenizer)
                    self._report(f"{record.where}, with the trained tokens marked:\n\n{text}\n")

    def _held_out(self, data: bytes) -> bool:
        fraction = self._settings.validation_fraction
        return fraction > 0 and _digest(data) < fraction * 2**64

    def _commit(self, writer: SegmentWriter, number: int, cursor: Cursor, is_last: bool) -> Segment:
        segment = writer.finish(cursor, is_last=is_last)
        if self._settings.dedup:
            segment.write_digests(self._digests_path(number), writer.digests)
        segment.write(self._segment_path(number))
        return segment

    def _finish(self, segments: list[Segment]) -> Manifest:
        """Write the manifest and litdata's indices, and publish the folder."""
        assert self._tokenizer.eos_token_id is not None
        ignored = self._ignored if self._part is None or self._part.number == 1 else []
        examples = [f"{name}: {reason}" for name, reason in ignored[:5]]
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
            examples=[*examples, *(example for segment in segments for example in segment.examples)][:20],
            splits={name: TokenSet.sum([segment.splits[name] for segment in segments]) for name in SPLITS},
            tokenizer_digest=tokenizer_digest(self._tokenizer.json),
            marks_trained_tokens=self._encoder.marks_trained_tokens,
            holds_pairs=self._encoder.makes_pairs,
            chat_template=self._encoder.chat_template,
            end_of_turn=list(self._encoder.end_of_turn),
        )
        add_counts(manifest.skipped, ({reason: 1} for _, reason in ignored))
        add_counts(manifest.skipped, (segment.skipped for segment in segments))
        add_counts(manifest.notices, (segment.notices for segment in segments))
        if self._part is None:
            check_splits(manifest, self._settings.validation_fraction, self._key, len(self._files))
        config: dict[str, Any] = next((segment.index_config for segment in segments if segment.index_config), {})
        for name in SPLITS:
            if manifest.splits[name].documents:
                write_index(self._folder / name, manifest.splits[name], config)
            else:
                del manifest.splits[name]
                continue
            TokenShards(self._folder, manifest, name)  # raises where a chunk of an earlier process is missing or cut
        if self._part is not None:
            write_part(self._folder, self._part, self._identity, num_segments=len(segments), index_config=config)
        if manifest.marks_trained_tokens and self._report is not None:
            self._report("\n".join(conversation_lines(manifest, self._folder)))
        manifest.write(self._folder)
        return self._publish(manifest)

    def _publish(self, manifest: Manifest) -> Manifest:
        """Rename the finished folder to its final name."""
        for name in ("writing", "parts"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        (self._folder / IDENTITY).unlink(missing_ok=True)
        if self._out.exists():
            self._out.rmdir()  # known to be empty
        self._folder.rename(self._out)
        return manifest


def record_error(record: Record, key: str) -> UsageError:
    """Create the error for a record that cannot be read; `key` is the option with the sources."""
    option = "--data.on_error" if key.startswith("data.") else "--on_error"
    remedy = f"{record.remedy}, or skip and count such documents by {option} skip"
    return UsageError(f"{record.where}: {record.problem}; {remedy}")


def _is_cut(data: bytes) -> bool:
    """Return whether a segment ends after a document, decided by its UTF-8 text; more likely for longer texts."""
    return bool(data) and zlib.crc32(data) >= 2**32 * (1 - len(data) / CUT_BYTES)


def _digest(data: bytes) -> int:
    """Return a 64-bit hash of a UTF-8 text, which selects held-out documents and detects duplicates."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
