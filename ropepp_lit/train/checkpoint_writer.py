"""Writing of checkpoints: under a hidden name, renamed once on the disk; optionally in a background thread."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from ropepp_lit.checkpoint import KEY, save_file
from ropepp_lit.errors import UsageError
from ropepp_lit.files import flush, whole_file, write_failure
from ropepp_lit.sharded import SHARDED_METADATA, read_pickled

LAST = "last.ckpt"
_SHARD_NAMES = {SHARDED_METADATA, f".{SHARDED_METADATA}.partial", ".metadata"}


class CheckpointWriter:
    """Writer of a run's checkpoints, one at a time.

    The collectives of a sharded write use a separate gloo group, so they cannot interleave with those of training.

    Args:
        in_background: Write in a thread, from a copy of the state in CPU memory, while training continues.
        keep: Number of newest checkpoints to keep. 0 keeps all.
        report: Called on rank 0, possibly in the thread, after a checkpoint is complete, with its path, its size in
            bytes and the seconds since the save started.
    """

    def __init__(
        self, *, in_background: bool, keep: int, report: Callable[[Path, int, float], None] | None = None
    ) -> None:
        self.in_background, self.keep, self._report = in_background, keep, report
        self._group: Any = None
        self._executor: ThreadPoolExecutor | None = None
        self._write: Future[None] | None = None
        self._path = Path()
        self._notice_printed = False
        self._first_step: int | None = None
        self._saved: set[int] = set()

    def set_first_step(self, step: int) -> None:
        """Set the step at which the run starts or resumes: existing checkpoints of later steps are damaged."""
        self._first_step = step

    def open(self) -> None:
        """Create the process group and the thread. Every rank must call it."""
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        if self._executor is None and self.in_background:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def close(self) -> None:
        """Wait for the current write, and end the thread. Every rank must call it."""
        self.wait()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    @property
    def has_failed(self) -> bool:
        """Whether the current write has failed on this rank; does not wait."""
        return self._write is not None and self._write.done() and self._write.exception() is not None

    def save(self, checkpoint: dict[str, Any], path: Path, *, is_sharded: bool, live: list[Tensor]) -> None:
        """Save a checkpoint, after waiting for the previous write. Every rank must call it.

        Args:
            checkpoint: Lightning's checkpoint, with the shards of this rank, or the full state on rank 0.
            path: Path of the checkpoint, `step=N.ckpt`; a folder if sharded.
            is_sharded: Whether each rank writes its shards.
            live: Tensors of `checkpoint` that training modifies; a background write copies them.

        Raises:
            UsageError: the write failed on any rank; for background writes, the previous one.
        """
        self.wait()
        self._path, started = path, time.monotonic()
        if _is_rank_zero():
            with suppress(OSError):  # it fails again in the write, which reports the error on all ranks
                path.parent.mkdir(parents=True, exist_ok=True)
                remove(_partial(path))
        if is_sharded and self._group is not None:
            dist.barrier(self._group)  # rank 0 has removed an old folder before any rank writes into it
        write = self._shards(checkpoint) if is_sharded else None
        if self.in_background and _is_rank_zero():
            checkpoint = _copy(checkpoint, live)

        def task() -> None:
            if write is not None:
                write()
            if _is_rank_zero():
                save_file(checkpoint, _partial(path) / SHARDED_METADATA if is_sharded else _partial(path))
                self._publish(path)
                if self._report is not None:
                    self._report(path, size_of(path), time.monotonic() - started)

        if self._executor is None:
            self._run(task)
        else:
            self._write = self._executor.submit(task)

    def add_validation(self, path: Path, metrics: dict[str, dict[str, float]]) -> None:
        """Add the results of a validation to an existing checkpoint. Every rank must call it.

        Args:
            path: Path of the checkpoint, `step=N.ckpt`.
            metrics: Metrics by validation set.

        Raises:
            UsageError: this write or a previous background write failed on any rank.
        """
        self.wait()
        self._path = path

        def task() -> None:
            if _is_rank_zero() and path.exists():
                file = path / SHARDED_METADATA if path.is_dir() else path
                checkpoint = read_pickled(file)
                checkpoint[KEY]["validation"] = metrics
                with whole_file(file) as partial:
                    save_file(checkpoint, partial)
                point_last_at(path)  # needed if it is a hard link or a copy
                _flush(path.parent)

        self._run(task)

    def _run(self, task: Callable[[], None]) -> None:
        """Run a write synchronously."""
        self._write = Future()
        try:
            task()
            self._write.set_result(None)
        except (Exception, CheckpointException) as error:  # torch's is a BaseException
            self._write.set_exception(error)
        self.wait()

    def _shards(self, checkpoint: dict[str, Any]) -> Callable[[], object]:
        """Remove the shards from a checkpoint; returns a function that writes them, or waits for their async write."""
        state = {"state_dict": checkpoint.pop("state_dict")}
        for index, optimizer in enumerate(checkpoint.pop("optimizer_states")):
            state[f"optimizer_{index}"] = optimizer
        options: dict[str, Any] = {"checkpoint_id": _partial(self._path), "process_group": self._group}
        if not self.in_background:
            return lambda: distributed_checkpoint.save(state, **options)
        write = distributed_checkpoint.async_save(state, **options)  # returns once the shards are copied
        assert isinstance(write, Future)
        return write.result

    def wait(self) -> None:
        """Wait until the current write has ended on all ranks. Every rank must call it.

        Raises:
            UsageError: it failed on any rank. Raised on rank 0; the other ranks exit silently with SystemExit.
        """
        if self._write is None:
            return
        error, self._write = self._write.exception(), None
        reasons = [None if error is None else _reason(error)]
        if self._group is not None:
            mine, reasons = reasons[0], [None] * dist.get_world_size()
            dist.all_gather_object(reasons, mine, group=self._group)
        reason = next(filter(None, reasons), None)
        if reason is None:
            return
        if not _is_rank_zero():
            sys.exit(0)  # with another code the launcher could kill rank 0 before it prints the error
        remove(_partial(self._path))
        raise UsageError(
            f"{self._path}: cannot be written: {reason}; when that is fixed, continue by --ckpt_path auto"
        ) from error

    def _publish(self, path: Path) -> None:
        """Rename a complete checkpoint, update the link, and then delete old checkpoints."""
        _flush(_partial(path))
        _remove_damaged_shards(path)
        os.replace(_partial(path), path)
        notice = point_last_at(path)
        if notice is not None and not self._notice_printed:
            self._notice_printed = True
            print(f"Notice: {notice}.", file=sys.stderr)
        _flush(path.parent)
        newest = step_of(path) or 0
        self._saved.add(newest)
        first = newest if self._first_step is None else self._first_step
        # Later checkpoints that this run has not saved are damaged; counting them would delete valid ones.
        steps = sorted(step for step in saved_steps(path.parent) if step <= first or step in self._saved)
        for old in steps[: -self.keep] if self.keep else []:
            remove(checkpoint_path(path.parent, old))


def point_last_at(path: Path) -> str | None:
    """Point `last.ckpt` at a checkpoint: by a symbolic link, or hard links or a copy if the file system has no links.

    Hard links take no space, and remain valid when `keep` deletes the step.

    Returns:
        A notice to print, or None.
    """
    last = path.with_name(LAST)
    partial, notice = _partial(last), None
    remove(partial)
    try:
        partial.symlink_to(path.name)
    except (OSError, NotImplementedError):
        try:
            _copy_tree(path, partial, os.link)
        except (OSError, NotImplementedError):
            notice = f"{last} is a copy of the newest checkpoint and uses as much space; the file system has no links"
            try:
                remove(partial)
                _copy_tree(path, partial, shutil.copyfile)
                _flush(partial)
            except OSError as error:
                remove(partial)
                remove(last)
                return f"{last} cannot be written ({error.strerror}); use {path}, or continue by --ckpt_path auto"
    if last.is_dir() and not last.is_symlink():
        remove(last)
    os.replace(partial, last)
    return notice


def _copy_tree(path: Path, copy: Path, copy_file: Callable[..., object]) -> None:
    """Copy a file or a folder."""
    if not path.is_dir():
        copy_file(path, copy)
        return
    copy.mkdir()
    for part in path.iterdir():
        _copy_tree(part, copy / part.name, copy_file)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step in a folder of checkpoints."""
    return folder / f"step={step}.ckpt"


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint's path, the inverse of :func:`checkpoint_path`; None for other names."""
    match = re.fullmatch(r"step=(\d+)\.ckpt", path.name)
    return int(match[1]) if match else None


def size_of(path: Path) -> int:
    """Return the bytes of a checkpoint, a file or a folder of shards."""
    return sum(part.stat().st_size for part in (path.rglob("*") if path.is_dir() else [path]) if part.is_file())


def saved_steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, in any order."""
    steps = (step_of(path) for path in folder.glob("step=*.ckpt"))
    return [step for step in steps if step is not None]


def remove_partial(folder: Path) -> None:
    """Delete partial files of killed runs."""
    for path in folder.glob(".*.partial"):
        remove(path)


def _partial(path: Path) -> Path:
    """Return the hidden path under which a checkpoint or link is written."""
    return path.with_name(f".{path.name}.partial")


def _remove_damaged_shards(path: Path) -> None:
    """Delete a damaged folder of shards so that `os.replace` can replace it, which handles files by itself.

    A folder that contains other files is kept, and cannot be replaced.
    """
    if path.is_dir() and all(part.name in _SHARD_NAMES or part.suffix == ".distcp" for part in path.iterdir()):
        shutil.rmtree(path)


def _is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _copy(checkpoint: dict[str, Any], live: list[Tensor]) -> dict[str, Any]:
    """Copy a checkpoint to the CPU so that training cannot modify it; CPU tensors not in `live` are not copied."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in live}
    copies: dict[Any, Tensor] = {}  # tied weights stay tied

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in storages:
            return tensor
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in copies:
            copies[key] = tensor.to("cpu", copy=True)
        return copies[key]

    return apply_to_collection(checkpoint, Tensor, copy)


def _reason(error: BaseException) -> str:
    """Return a one-line reason for a failed write."""
    if isinstance(error, CheckpointException):
        error = next((failure for failure, _ in error.failures.values()), error)
    return write_failure(error) or f"{type(error).__name__}: {error}"


def remove(path: Path) -> None:
    """Delete a file or folder, or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Call fsync on a file, or on a partial folder and its files."""
    for part in path.iterdir() if path.is_dir() and path.name.endswith(".partial") else ():
        _flush(part)
    flush(path)
