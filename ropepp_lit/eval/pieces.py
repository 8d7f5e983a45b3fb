"""The pieces of an evaluation's work: measured by one process or several, kept in a folder, and found again.

A piece is a unit (:mod:`ropepp_lit.eval.tasks`) of a model. Its file's name is a digest of whatever decides its result.
A process that measures a piece holds a lock, which the system releases when the process ends, even by a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.report import ANSWERS
from ropepp_lit.eval.results import Measurement, checked
from ropepp_lit.eval.tasks import Settings, Unit, check, derived, measure
from ropepp_lit.eval.tasks.base import Answer
from ropepp_lit.eval.texts import Texts
from ropepp_lit.files import has_locks, locked, whole_file, write_whole
from ropepp_lit.json_files import CHECKSUM, json_line, read_json, sealed, typed, unsealed
from ropepp_lit.terminal import progress_bar
from ropepp_lit.text.tokenizer import TextTokenizer

VERSION = 3
"""Of what is kept; another one is measured again."""

WAIT_SECONDS = 1.0
"""Between looks at pieces that other processes measure."""


@dataclass
class Kept:
    """The result of a piece, as it is kept."""

    key: dict[str, Any]
    """What decides it."""
    seconds: float
    measurements: list[Any]
    """Each a :class:`~ropepp_lit.eval.results.Measurement`, or its values."""
    answers: list[Any]
    """Each an :class:`~ropepp_lit.eval.tasks.base.Answer`, or its values."""


class Piece(NamedTuple):
    """A unit of a model, and where its result is kept."""

    unit: Unit
    key: dict[str, Any]
    path: Path
    num_tokens: int

    def read(self) -> Kept:
        """What is kept.

        Raises:
            UsageError: it is damaged, or of another piece.
        """
        try:
            stored = read_json(self.path)
            kept = typed(Kept, unsealed(stored))
            if json.dumps(kept.key) != json.dumps(self.key):
                raise ValueError("of another piece")
            if CHECKSUM in stored:  # what tasks gave, which may be of a user's own
                kept.measurements = [Measurement(**found) for found in kept.measurements]
                kept.answers = [Answer(**answer) for answer in kept.answers]
            else:
                kept.measurements = [checked(typed(Measurement, found)) for found in kept.measurements]
                kept.answers = [typed(Answer, answer) for answer in kept.answers]
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self.path}: damaged ({error}); delete it to measure it again") from error
        return kept


class Work:
    """All pieces of an evaluation.

    Args:
        models: Without weights.
        load: Gives the model of a number with its weights.
        settings: What is measured.
        sets: Documents.
        folder: Of the evaluation; pieces are kept in its folder `parts`.
        dtype: In which is computed, for the keys.
        device: On which is computed.

    Raises:
        UsageError: see :func:`~ropepp_lit.eval.tasks.check`.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        load: Callable[[int], Model],
        settings: Settings,
        sets: Texts,
        folder: Path,
        dtype: str,
        device: torch.device,
    ) -> None:
        self.models, self.settings, self.sets, self.folder = models, settings, sets, folder
        self._load, self._dtype, self._parts = load, dtype, folder / "parts"
        self._texts = [text for documents in sets.values() for text in documents]
        self._texts_digest = hashlib.sha256("\0".join(self._texts).encode()).hexdigest()
        self._encoded: tuple[str, list[list[int]]] | None = None
        self.pieces = []
        for model in models:
            units = settings.units(model)
            request = settings.request(
                min(settings.lengths), texts=self._texts, documents=self._documents(model.tokenizer)
            )
            check(model, units, request, device=device)
            self.pieces.append([self._piece(model, unit) for unit in units])
        self._parts.mkdir(parents=True, exist_ok=True)
        self._leave_out_damaged()
        self._has_locks = has_locks(self._parts / ".lock")
        if not self._has_locks:
            print(f"{folder}: its file system has no locks, so one process alone can measure into it")

    def _leave_out_damaged(self) -> None:
        for piece in itertools.chain.from_iterable(self.pieces):
            if piece.path.is_file():
                try:
                    piece.read()
                except UsageError:
                    print(f"{piece.path}: damaged; it is measured again")
                    piece.path.unlink(missing_ok=True)  # another process may have done so

    def measure(self) -> None:
        """Measure what is missing and no other process measures, and wait until nothing is missing."""
        waits = False
        while True:
            counts = [self._measure_free(number) for number in range(len(self.models))]
            measured, busy = (sum(column) for column in zip(*counts, strict=True))
            if not busy:
                return
            if not measured:
                if not waits:
                    print(f"Waiting for {busy} pieces of work that other processes measure", flush=True)
                waits = True
                time.sleep(WAIT_SECONDS)

    def found(self, number: int) -> tuple[list[Measurement], float]:
        """A model's measurements, with what follows from them; and how many seconds they took."""
        kept = [piece.read() for piece in self.pieces[number]]
        found = [measurement for part in kept for measurement in part.measurements]
        documents = self._documents(self.models[number].tokenizer)
        return [*found, *derived(found, self.settings, self.sets, documents)], sum(part.seconds for part in kept)

    def images(self, number: int) -> Iterator[tuple[Unit, bytes]]:
        """A model's maps of attention."""
        for piece in self.pieces[number]:
            if (path := piece.path.with_suffix(".png")).is_file():
                yield piece.unit, path.read_bytes()

    def write_answers(self) -> None:
        """Write what the models wrote, a line for each example, into answers.jsonl; nothing where none wrote."""
        path = self.folder / ANSWERS
        with whole_file(path) as partial, partial.open("wb") as file:
            for model, pieces in zip(self.models, self.pieces, strict=True):
                for piece in pieces:
                    task, part, length, heads, noise_std = piece.unit.key
                    head = {"model": model.name, "path": model.path, "task": task, "part": part, "length": length,
                            "heads": heads, "noise_std": noise_std}  # fmt: skip
                    file.writelines(json_line({**head, **vars(answer)}) for answer in piece.read().answers)
        if not path.stat().st_size:
            path.unlink()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Write a report while no other process does."""
        with locked(self._parts / ".report.lock") if self._has_locks else contextlib.nullcontext():
            yield

    def _piece(self, model: Model, unit: Unit) -> Piece:
        settings = self.settings
        request = settings.request(unit.length, texts=self._texts, documents=self._documents(model.tokenizer))
        key = {
            "version": VERSION, "model": model.fingerprint, "unit": unit.key, "stride": settings.stride,
            "seed": settings.seed, "dtype": self._dtype, "limit": request.limit,
            "texts": self._texts_digest if unit.task.needs_text else None, "identity": unit.task.identity(request),
            "sources": unit.task.sources(),
        }  # fmt: skip
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        return Piece(unit, key, self._parts / f"{name}.json", unit.task.num_tokens(request))

    def _documents(self, tokenizer: TextTokenizer) -> list[list[int]]:
        """Token ids of all documents; those of the last tokenizer are remembered, which models mostly share."""
        identity = repr((tokenizer.json, tokenizer.opening, tokenizer.closing))
        if self._encoded is None or self._encoded[0] != identity:
            self._encoded = identity, [tokenizer.encode_whole(text) for text in self._texts]
        return self._encoded[1]

    def _measure_free(self, number: int) -> tuple[int, int]:
        """Measure the pieces of a model that nobody else measures; returns how many these were, and the others."""
        missing = [piece for piece in self.pieces[number] if not piece.path.is_file()]
        total = sum(piece.num_tokens for piece in missing)
        model: Model | None = None
        measured = busy = 0
        with contextlib.ExitStack() as stack:
            for piece in missing:
                with self._claimed(piece) as is_ours:
                    if not is_ours or piece.path.is_file():  # another process has it, or has kept it since
                        busy += not is_ours
                        total -= piece.num_tokens
                        continue
                    if model is None:
                        model = self._load(number)
                        bar = stack.enter_context(progress_bar(model.name, unit="tokens", scale=True))
                    bar.total = total
                    self._measure_piece(model, piece, bar)
                    measured += 1
        return measured, busy

    @contextlib.contextmanager
    def _claimed(self, piece: Piece) -> Iterator[bool]:
        """Hold a piece's lock; yields False where another process has it."""
        if not self._has_locks:
            yield True
            return
        path = piece.path.with_suffix(".lock")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
            if piece.path.is_file():  # whoever opened the lock's file before sees that the piece is kept
                with contextlib.suppress(OSError):  # Windows deletes no open files
                    path.unlink()
        finally:
            lock.release()

    def _measure_piece(self, model: Model, piece: Piece, bar: tqdm) -> None:
        bar.set_postfix_str(str(piece.unit))
        before, started = bar.n, time.monotonic()
        found = measure(
            model, piece.unit, self.settings, texts=self._texts, documents=self._documents(model.tokenizer),
            progress=bar.update,
        )  # fmt: skip
        seconds = time.monotonic() - started
        kept = sealed(dataclasses.asdict(Kept(piece.key, seconds, found.measurements, found.answers)))
        for image in found.images:
            write_whole(piece.path.with_suffix(".png"), image)
        write_whole(piece.path, json.dumps(kept))
        bar.update(before + piece.num_tokens - bar.n)
