"""Free space for checkpoints: compared with the size of the next one before that is needed.

A quota is not seen: the operating system reports the free space of the file system, not what a user may take of it.
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
from ropepp_lit.train.setup import DTYPES


def checkpoint_bytes(decoder: Decoder, optimizer: OptimizerConfig, *, lora: LoRA | None, precision: str) -> int:
    """Bytes of a checkpoint's weights and optimizer state, all shards together.

    The states of an optimizer class of the user's own are not counted, as nothing is known of them.

    Args:
        decoder: On the meta device, without adapters.
        optimizer: Of the recipe.
        lora: What trains, and is stored; None means all.
        precision: Lightning's name, such as `bf16-mixed`.
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
    """Free bytes of the file system of a folder that may not exist yet; None where they are not known."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def check_first(folder: Path, size: int) -> None:
    """Raise UsageError where the first checkpoint of a run does not fit.

    Args:
        folder: Where it will be saved.
        size: Its bytes.
    """
    free = free_bytes(folder)
    if free is not None and free < size:
        raise UsageError(
            f"{folder}: a checkpoint takes {in_bytes(size)}, and {in_bytes(free)} are free; make room, or choose "
            "another --trainer.default_root_dir"
        )


class DiskSpace:
    """Tells in time that there will be no room for a checkpoint: once, and again when there had been room between.

    Args:
        keep: Number of newest checkpoints that are kept; 0 means all.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._is_low = False

    def look(self, folder: Path, *, size: int, saved: int, step: int, run_log: RunLog) -> None:
        """Compare what is free with what the next two checkpoints take; after each save, on rank 0.

        An old checkpoint is deleted only when a new one is whole, so room for one more than `keep` is needed.

        Args:
            folder: Of the checkpoints.
            size: Bytes of the newest.
            saved: Number of checkpoints in the folder.
            step: Of the newest.
            run_log: Of the run.
        """
        free = free_bytes(folder)
        if free is None:
            return
        makes_room = bool(self._keep) and saved >= self._keep  # the next one lets an old one be deleted
        was_low, self._is_low = self._is_low, free < (size if makes_room else 2 * size)
        if not self._is_low or was_low:
            return
        problem = "the next checkpoint does not fit" if free < size else "the checkpoint after the next does not fit"
        print(
            f"Notice: {folder}: {problem}: it takes {in_bytes(size)}, and {in_bytes(free)} are free; make room.",
            file=sys.stderr,
            flush=True,
        )
        run_log.write("warning", step=step, reason=problem, bytes=size, free_bytes=free)
