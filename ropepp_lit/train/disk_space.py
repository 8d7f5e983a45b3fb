"""Checks that the disk has space for the next checkpoints.

Quotas are not considered: the operating system reports the free space of the file system, not that of a user.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder
from ropepp_lit.nn.lora import LoRA, inject
from ropepp_lit.sizes import in_bytes
from ropepp_lit.train.optimizer import AdamW, Muon, OptimizerConfig, split_parameters
from ropepp_lit.train.run_log import RunLog
from ropepp_lit.train.step_setup import DTYPES


def checkpoint_bytes(decoder: Decoder, optimizer: OptimizerConfig, *, lora: LoRA | None, precision: str) -> int:
    """Return the bytes of a checkpoint's weights and optimizer state, summed over shards.

    The state of a custom optimizer class is unknown and not counted.

    Args:
        decoder: Decoder on the meta device, without adapters.
        optimizer: Optimizer of the recipe.
        lora: LoRA settings; None means that all weights train and are stored.
        precision: Precision as named by Lightning, such as `bf16-mixed`.
    """
    if lora is not None:
        with torch.device("meta"):
            decoder = Decoder(decoder.config, decoder.scheme, decoder.frequencies)
            inject(decoder, lora)
    matrices, others = (
        sum(parameter.numel() for parameter in part) for part in split_parameters(decoder, output_layer_is_matrix=False)
    )
    frozen = 0 if lora is not None else sum(buffer.numel() for buffer in decoder.buffers())
    states = {Muon: matrices + 2 * others, AdamW: 2 * (matrices + others)}.get(type(optimizer), 0)
    name, _, kind = precision.partition("-")
    itemsize = DTYPES[name].itemsize if kind == "true" and name in DTYPES else 4
    return (matrices + others + frozen + states) * itemsize


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes of the file system of a folder, which need not exist; None if unknown."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def check_first(folder: Path, size: int) -> None:
    """Raise UsageError if the first checkpoint of a run does not fit.

    Args:
        folder: Folder of the run's checkpoints.
        size: Bytes of the checkpoint.
    """
    free = free_bytes(folder)
    if free is not None and free < size:
        raise UsageError(
            f"{folder}: a checkpoint takes {in_bytes(size)}, and {in_bytes(free)} are free; make room, or choose "
            "another --trainer.default_root_dir"
        )


class DiskSpace:
    """Warning about low disk space, printed once and again if space became low again.

    Args:
        keep: Number of newest checkpoints that are kept; 0 means all.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._is_low = False

    def check(self, folder: Path, *, size: int, saved: int, step: int, run_log: RunLog) -> None:
        """Compare the free space with the size of the next two checkpoints. Called after each save, on rank 0.

        An old checkpoint is deleted only after a new one is complete, so space for `keep` + 1 is required.

        Args:
            folder: Folder of the checkpoints.
            size: Bytes of the newest checkpoint.
            saved: Number of checkpoints in the folder.
            step: Step of the newest checkpoint.
            run_log: Log of the run.
        """
        free = free_bytes(folder)
        if free is None:
            return
        frees_space = bool(self._keep) and saved >= self._keep  # after the next one, an old one is deleted
        was_low, self._is_low = self._is_low, free < (size if frees_space else 2 * size)
        if not self._is_low or was_low:
            return
        problem = "the next checkpoint does not fit" if free < size else "the checkpoint after the next does not fit"
        print(
            f"Notice: {folder}: {problem}: it takes {in_bytes(size)}, and {in_bytes(free)} are free; make room.",
            file=sys.stderr,
            flush=True,
        )
        run_log.write("warning", step=step, reason=problem, bytes=size, free_bytes=free)
