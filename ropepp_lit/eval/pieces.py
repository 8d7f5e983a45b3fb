"""Pieces of an evaluation: measured by one or more processes, and cached in a folder.

A piece is a unit (:mod:`ropepp_lit.eval.tasks`) of one model. The name of its file is a digest of everything that the
result depends on. A process that measures a piece holds a file lock, which the operating system releases when the
process ends, even if it is killed.
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
from ropepp_lit.eval.tasks import EvaluationSettings, Unit, check_units, derived, measure_unit
from ropepp_lit.eval.tasks.base import Answer
from ropepp_lit.eval.texts import Texts
from ropepp_lit.files import has_locks, locked, whole_file, write_whole
from ropepp_lit.json_files import CHECKSUM, json_line, read_json, sealed, typed, unsealed
from ropepp_lit.terminal import progress_bar
from ropepp_lit.text.tokenizer import TextTokenizer

VERSION = 3
"""Version of the cached results; those of other versions are measured again."""

WAIT_SECONDS = 1.0
"""Polling interval for pieces that other processes measure."""


@dataclass
class CachedResult:
    """Content of the file of a piece."""

    key: dict[str, Any]
    """Everything that the result depends on."""
    seconds: float
    measurements: list[Any]
    """Measurements (:class:`~ropepp_lit.eval.results.Measurement`), as objects or dicts."""
    answers: list[Any]
    """Answers (:class:`~ropepp_lit.eval.tasks.base.Answer`), as objects or dicts."""


class Piece(NamedTuple):
    """A unit of a model, and the path of its cached result."""

    unit: Unit
    key: dict[str, Any]
    path: Path
    num_tokens: int

    def read(self) -> CachedResult:
        """Read the cached result.

        Raises:
            UsageError: The file is damaged, or belongs to another piece.
        """
        try:
            stored = read_json(self.path)
            result = typed(CachedResult, unsealed(stored))
            if json.dumps(result.key) != json.dumps(self.key):
                raise ValueError("of another piece")
            if CHECKSUM in stored:  # written by us, possibly with values of any type from a user's task
                result.measurements = [Measurement(**values) for values in result.measurements]
                result.answers = [Answer(**values) for values in result.answers]
            else:
                result.measurements = [checked(typed(Measurement, values)) for values in result.measurements]
                result.answers = [typed(Answer, values) for values in result.answers]
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self.path}: damaged ({error}); delete it to measure it again") from error
        return result


class Work:
    """All pieces of an evaluation.

    Args:
        models: Models without weights.
        load: Function that loads a model with its weights, by its index in `models`.
        settings: EvaluationSettings of the evaluation.
        sets: Documents by set.
        folder: Folder of the evaluation; results are cached in its subfolder `parts`.
        dtype: Name of the dtype of the computation, for the keys.
        device: Device of the computation.

    Raises:
        UsageError: See :func:`~ropepp_lit.eval.tasks.check_units`.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        load: Callable[[int], Model],
        settings: EvaluationSettings,
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
            check_units(model, units, request, device=device)
            self.pieces.append([self._piece(model, unit) for unit in units])
        self._parts.mkdir(parents=True, exist_ok=True)
        self._delete_damaged()
        self._has_locks = has_locks(self._parts / ".lock")
        if not self._has_locks:
            print(f"{folder}: its file system does not support locks, so only one process can evaluate into it")

    def _delete_damaged(self) -> None:
        for piece in itertools.chain.from_iterable(self.pieces):
            if piece.path.is_file():
                try:
                    piece.read()
                except UsageError:
                    print(f"{piece.path}: damaged; it is measured again")
                    piece.path.unlink(missing_ok=True)  # another process may have deleted it

    def measure(self) -> None:
        """Measure all missing pieces, except those that other processes measure, and wait for these."""
        waits = False
        while True:
            counts = [self._measure_missing(number) for number in range(len(self.models))]
            measured, busy = (sum(column) for column in zip(*counts, strict=True))
            if not busy:
                return
            if not measured:
                if not waits:
                    print(f"Waiting for {busy} pieces of work that other processes measure", flush=True)
                waits = True
                time.sleep(WAIT_SECONDS)

    def results(self, number: int) -> tuple[list[Measurement], float]:
        """Return a model's measurements with those derived from them, and the time of the measurement in seconds."""
        results = [piece.read() for piece in self.pieces[number]]
        measurements = [measurement for result in results for measurement in result.measurements]
        documents = self._documents(self.models[number].tokenizer)
        measurements += list(derived(measurements, self.settings, self.sets, documents))
        return measurements, sum(result.seconds for result in results)

    def images(self, number: int) -> Iterator[tuple[Unit, bytes]]:
        """Yield a model's attention maps."""
        for piece in self.pieces[number]:
            if (path := piece.path.with_suffix(".png")).is_file():
                yield piece.unit, path.read_bytes()

    def write_answers(self) -> None:
        """Write the models' answers to answers.jsonl, one line for each example; no file if there are none."""
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
        """Hold the lock for writing the report."""
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
        """Return the token ids of all documents; cached for the last tokenizer, because most models share one."""
        identity = repr((tokenizer.json, tokenizer.opening, tokenizer.closing))
        if self._encoded is None or self._encoded[0] != identity:
            self._encoded = identity, [tokenizer.encode_whole(text) for text in self._texts]
        return self._encoded[1]

    def _measure_missing(self, number: int) -> tuple[int, int]:
        """Measure a model's missing pieces; return their number, and that of pieces that other processes measure."""
        missing = [piece for piece in self.pieces[number] if not piece.path.is_file()]
        total = sum(piece.num_tokens for piece in missing)
        model: Model | None = None
        measured = busy = 0
        with contextlib.ExitStack() as stack:
            for piece in missing:
                with self._locked(piece) as has_lock:
                    if not has_lock or piece.path.is_file():  # another process measures it, or has finished it
                        busy += not has_lock
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
    def _locked(self, piece: Piece) -> Iterator[bool]:
        """Hold a piece's lock; yield False if another process holds it."""
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
            if piece.path.is_file():  # a process that has opened the lock file before sees this file too
                with contextlib.suppress(OSError):  # Windows cannot delete open files
                    path.unlink()
        finally:
            lock.release()

    def _measure_piece(self, model: Model, piece: Piece, bar: tqdm) -> None:
        bar.set_postfix_str(str(piece.unit))
        before, started = bar.n, time.monotonic()
        result = measure_unit(
            model, piece.unit, self.settings, texts=self._texts, documents=self._documents(model.tokenizer),
            progress=bar.update,
        )  # fmt: skip
        seconds = time.monotonic() - started
        cached = sealed(dataclasses.asdict(CachedResult(piece.key, seconds, result.measurements, result.answers)))
        for image in result.images:
            write_whole(piece.path.with_suffix(".png"), image)
        write_whole(piece.path, json.dumps(cached))
        bar.update(before + piece.num_tokens - bar.n)
