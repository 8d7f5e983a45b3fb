"""Logging of metrics to the run's loggers, with one value per step even when a run resumes from an older step."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.summary.writer.record_writer import RecordWriter

from ropepp_lit.files import write_whole
from ropepp_lit.train.metrics import TokenLoss

_IN_PROGRESS_BAR = {
    "train/loss",
    "train/accuracy",
    "val/loss",
    "val/accuracy",
    "tokens_per_second",
    "lr",
    "gradient_norm",
}
_VALIDATION_PREFIXES = ("val/", "sample")
"""Prefixes of the names that a validation logs."""


def metric_values(
    metric: TokenLoss, prefix: str, values: Sequence[float], bytes_per_token: float | None
) -> dict[str, Any]:
    """Return the values of a loss metric by the names under which they are logged.

    For tokens these are the loss in nats per token, its perplexity, and bits per byte if `bytes_per_token` is given;
    for pairs of answers the loss and the rewards.

    Args:
        metric: Metric of the loss.
        prefix: Prefix of the names.
        values: The loss, followed by the values that the metric's `others` names.
        bytes_per_token: Mean number of bytes of the text per token.
    """
    loss, *others = values
    if metric.others:
        return {f"{prefix}{name}": value for name, value in zip(("loss", *metric.others), (loss, *others), strict=True)}
    named = {f"{prefix}loss": loss, f"{prefix}perplexity": math.exp(min(loss, 700.0))}
    if bytes_per_token is not None:
        named[f"{prefix}bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return named


def log_metrics(trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
    """Log numbers to the loggers, the progress bar and `trainer.callback_metrics`.

    This replaces Lightning's `log`, which keeps numbers on the device and reads them back after every later batch.
    TensorBoard gets integers in float64, because float32 does not represent all integers beyond 2²⁴.

    Args:
        trainer: Trainer of the run.
        values: Numbers by name.
        step: Optimizer steps taken.
    """
    for logger in trainer.loggers:
        floats = values
        if isinstance(logger, TensorBoardLogger):
            floats = {name: value for name, value in values.items() if not isinstance(value, int)}
            if trainer.is_global_zero:
                for name in values.keys() - floats.keys():
                    logger.experiment.add_scalar(name, values[name], step, new_style=True, double_precision=True)
        logger.log_metrics(floats, step)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    trainer.progress_bar_metrics.update({k: v for k, v in values.items() if k in _IN_PROGRESS_BAR})


@rank_zero_only
def flush(loggers: list[Logger]) -> None:
    """Flush the loggers to disk, so that a checkpoint is never ahead of the logs."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
        else:
            logger.save()


@rank_zero_only
def truncate_logs(loggers: list[Logger], step: int, *, run_folder: Path, validates: bool) -> None:
    """Remove from TensorBoard and CSV files what was logged after the step from which the run resumes.

    Args:
        loggers: Loggers that have not opened their files yet.
        step: Step of the checkpoint. 0 if the run starts from the beginning (perhaps again, after it was killed before
            its first checkpoint): then only files in its own folder are changed.
        run_folder: Folder of the run. Loggers without a version continue their newest version in it.
        validates: Whether the validation of that step is still due: then its metrics are removed too.

    Raises:
        OSError: a file cannot be written, for example because the disk is full.
    """

    def is_kept(at: int, name: str) -> bool:
        return at < step or (at == step and not (validates and name.startswith(_VALIDATION_PREFIXES)))

    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger | CSVLogger):
            continue
        is_ours = Path(logger.save_dir).resolve().is_relative_to(run_folder.resolve())
        if not step and not is_ours:
            continue
        if logger._version is None and is_ours:
            newest = logger._get_next_version() - 1
            logger._version = newest if newest >= 0 else None
        if isinstance(logger, TensorBoardLogger):
            for path in sorted(Path(logger.log_dir).glob("*.tfevents.*")):
                _filter_events(path, is_kept)
        else:
            rows = list(_rows(Path(logger.log_dir) / "metrics.csv", is_kept))
            if rows:
                writer = logger.experiment  # deletes the file
                writer.metrics[:0] = rows
                logger.save()


def _filter_events(path: Path, is_kept: Any) -> None:
    """Rewrite a TensorBoard event file with only the values to keep; an incomplete last record is dropped."""
    kept, is_changed = [], False
    for event in LegacyEventFileLoader(str(path)).Load():
        if event.HasField("summary"):
            values = [value for value in event.summary.value if is_kept(event.step, value.tag)]
            if len(values) < len(event.summary.value):
                is_changed = True
                del event.summary.value[:]
                event.summary.value.extend(values)
                if not values:
                    continue
        kept.append(event.SerializeToString())
    if not is_changed:
        return
    buffer = _Buffer()
    writer = RecordWriter(buffer)
    for record in kept:
        writer.write(record)
    write_whole(path, bytes(buffer))


class _Buffer(bytearray):
    """Byte buffer that a RecordWriter appends to."""

    def write(self, data: bytes) -> None:
        self.extend(data)


def _rows(path: Path, is_kept: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSVLogger's file to keep, without empty fields."""
    if not os.path.isfile(path):
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            at = int(row["step"])
            kept = {name: value for name, value in row.items() if value and name != "step" and is_kept(at, name)}
            if kept:
                yield {**kept, "step": row["step"]}
