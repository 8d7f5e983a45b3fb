"""A run's curves: figures to its loggers, one value for each step also where a run goes on from an older step."""

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
_OF_A_VALIDATION = ("val/", "sample")
"""What begins the names of figures that a validation logs."""


def loss_figures(prefix: str, loss: float, bytes_per_token: float | None) -> dict[str, Any]:
    """Loss in nats per token, its perplexity, and bits per byte where the bytes are known."""
    values = {f"{prefix}loss": loss, f"{prefix}perplexity": math.exp(min(loss, 700.0))}
    if bytes_per_token is not None:
        values[f"{prefix}bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return values


def figures_of(
    metric: TokenLoss, prefix: str, values: Sequence[float], bytes_per_token: float | None
) -> dict[str, Any]:
    """What a metric of the loss computed: see :func:`loss_figures`; of pairs of answers the loss, and their rewards.

    Args:
        metric: Of the loss.
        prefix: Of the figures' names.
        values: The loss, and those that the metric's `others` name.
        bytes_per_token: Of the text.
    """
    loss, *others = values
    if not metric.others:
        return loss_figures(prefix, loss, bytes_per_token)
    return {f"{prefix}{name}": value for name, value in zip(("loss", *metric.others), (loss, *others), strict=True)}


def log_figures(trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
    """Log numbers to the loggers, the progress bar and `trainer.callback_metrics`.

    Not by Lightning's `log`: it keeps numbers on the device and reads them back after every batch that follows.
    TensorBoard gets integers in float64, as float32 holds none beyond 2²⁴ exactly.

    Args:
        trainer: Of the run.
        values: By name.
        step: Optimizer steps taken.
    """
    for logger in trainer.loggers:
        others = values
        if isinstance(logger, TensorBoardLogger):
            others = {name: value for name, value in values.items() if not isinstance(value, int)}
            if trainer.is_global_zero:
                for name in values.keys() - others.keys():
                    logger.experiment.add_scalar(name, values[name], step, new_style=True, double_precision=True)
        logger.log_metrics(others, step)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    trainer.progress_bar_metrics.update({k: v for k, v in values.items() if k in _IN_PROGRESS_BAR})


@rank_zero_only
def flush(loggers: list[Logger]) -> None:
    """Write what was logged to the disk, so that a checkpoint is never ahead of the curves."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
        else:
            logger.save()


@rank_zero_only
def go_on_from(loggers: list[Logger], step: int, *, run_folder: Path, validates: bool) -> None:
    """Take out of TensorBoard's and CSV files what a run logged after the step that it now goes on from.

    Args:
        loggers: Before they have opened their files.
        step: Of the checkpoint; 0 where a run begins, perhaps again after it was killed before its first checkpoint:
            then only files in its own folder are changed.
        run_folder: Loggers without a version go on with their newest version in this folder.
        validates: Whether the validation of that step is still to come: then its figures are taken out too.

    Raises:
        OSError: a file cannot be written, for example because the disk is full.
    """

    def is_kept(at: int, name: str) -> bool:
        return at < step or (at == step and not (validates and name.startswith(_OF_A_VALIDATION)))

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
    """Rewrite a file of TensorBoard's events without some of them; a record that a kill cut off is left out."""
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
    """Bytes that a RecordWriter appends to."""

    def write(self, data: bytes) -> None:
        self.extend(data)


def _rows(path: Path, is_kept: Any) -> Iterator[dict[str, Any]]:
    """The rows of a CSVLogger's file that are kept, without empty fields."""
    if not os.path.isfile(path):
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            at = int(row["step"])
            kept = {name: value for name, value in row.items() if value and name != "step" and is_kept(at, name)}
            if kept:
                yield {**kept, "step": row["step"]}
