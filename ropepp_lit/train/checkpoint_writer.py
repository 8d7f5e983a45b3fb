"""Writing a checkpoint: under a hidden name first, in the background or not, and renamed when it is on the disk."""

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
    """Writes the checkpoints of a run, one at a time.

    The collectives of a sharded write use a gloo group of their own, so they cannot mix with those of training.

    Args:
        in_background: Write from a copy of the state in CPU memory, by a thread, while training goes on.
        keep: Number of newest checkpoints to keep. 0 keeps all.
        report: Called on rank 0, perhaps by the thread, when a checkpoint has its name: path, bytes, and the seconds
            since its save began.
    """

    def __init__(
        self, *, in_background: bool, keep: int, report: Callable[[Path, int, float], None] | None = None
    ) -> None:
        self.in_background, self.keep, self._report = in_background, keep, report
        self._group: Any = None
        self._executor: ThreadPoolExecutor | None = None
        self._write: Future[None] | None = None
        self._path = Path()
        self._has_noticed = False
        self._begun_at: int | None = None
        self._saved: set[int] = set()

    def begin(self, step: int) -> None:
        """The run begins or goes on at this step: checkpoints of later ones that are there already are damaged."""
        self._begun_at = step

    def open(self) -> None:
        """Create the process group and the thread. Every rank must call it."""
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        if self._executor is None and self.in_background:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def close(self) -> None:
        """Wait for the write and end the thread. Every rank must call it."""
        self.wait()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    @property
    def has_failed(self) -> bool:
        """Whether the current write has failed on this rank; does not wait."""
        return self._write is not None and self._write.done() and self._write.exception() is not None

    def save(self, checkpoint: dict[str, Any], path: Path, *, is_sharded: bool, live: list[Tensor]) -> None:
        """Save a checkpoint, after the write before it has ended. Every rank must call it.

        Args:
            checkpoint: Lightning's, with the shards of this rank, or on rank 0 the whole state.
            path: Its name, `step=N.ckpt`; a folder for shards.
            is_sharded: Whether each rank writes its shards.
            live: Tensors of `checkpoint` that training changes; a background write copies them.

        Raises:
            UsageError: this write, or in the background the one before, failed on any rank.
        """
        self.wait()
        self._path, began = path, time.monotonic()
        if _is_rank_zero():
            with suppress(OSError):  # what fails here fails again in the write, which reports it on all ranks
                path.parent.mkdir(parents=True, exist_ok=True)
                remove(_partial(path))
        if is_sharded and self._group is not None:
            dist.barrier(self._group)  # no rank writes into the folder before rank 0 has removed an old one
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
                    self._report(path, size_of(path), time.monotonic() - began)

        if self._executor is None:
            self._do(task)
        else:
            self._write = self._executor.submit(task)

    def add_validation(self, path: Path, figures: dict[str, dict[str, float]]) -> None:
        """Put the results of a validation into a checkpoint that was saved before it. Every rank must call it.

        Args:
            path: Its name, `step=N.ckpt`.
            figures: By validation set.

        Raises:
            UsageError: the write failed on any rank, or in the background the one before.
        """
        self.wait()
        self._path = path

        def task() -> None:
            if _is_rank_zero() and path.exists():
                file = path / SHARDED_METADATA if path.is_dir() else path
                checkpoint = read_pickled(file)
                checkpoint[KEY]["validation"] = figures
                with whole_file(file) as partial:
                    save_file(checkpoint, partial)
                point_last_at(path)  # a hard link or a copy is still without them
                _flush(path.parent)

        self._do(task)

    def _do(self, task: Callable[[], None]) -> None:
        """Write while training waits."""
        self._write = Future()
        try:
            task()
            self._write.set_result(None)
        except (Exception, CheckpointException) as error:  # torch's is a BaseException
            self._write.set_exception(error)
        self.wait()

    def _shards(self, checkpoint: dict[str, Any]) -> Callable[[], object]:
        """Take the shards out of a checkpoint; returns what writes them, or waits until they are written."""
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
            UsageError: it failed on any rank; on the other ranks than 0 SystemExit, as one line is enough.
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
            sys.exit(0)  # with another code the launcher would kill rank 0 before it has printed the line
        remove(_partial(self._path))
        raise UsageError(
            f"{self._path}: cannot be written: {reason}; when that is fixed, continue by --ckpt_path auto"
        ) from error

    def _publish(self, path: Path) -> None:
        """Rename what is whole, point the link at it, and only then delete old checkpoints."""
        _flush(_partial(path))
        _make_way(path)
        os.replace(_partial(path), path)
        notice = point_last_at(path)
        if notice is not None and not self._has_noticed:
            self._has_noticed = True
            print(f"Notice: {notice}.", file=sys.stderr)
        _flush(path.parent)
        newest = step_of(path) or 0
        self._saved.add(newest)
        begun_at = newest if self._begun_at is None else self._begun_at
        # Others are damaged: they are not counted, or whole ones would be deleted in their place.
        steps = sorted(step for step in saved_steps(path.parent) if step <= begun_at or step in self._saved)
        for old in steps[: -self.keep] if self.keep else []:
            remove(path.with_name(f"step={old}.ckpt"))


def point_last_at(path: Path) -> str | None:
    """Make `last.ckpt` the newest checkpoint: a symbolic link; hard links or a copy where the file system has none.

    Hard links take no space, and stay valid when `keep` deletes the step.

    Returns:
        What the user must know about it.
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
            notice = f"{last} is a copy of the newest checkpoint and takes its space again, as there are no links here"
            try:
                remove(partial)
                _copy_tree(path, partial, shutil.copyfile)
                _flush(partial)
            except OSError as error:
                remove(partial)
                remove(last)
                return f"{last} is not there ({error.strerror}); name {path}, or continue by --ckpt_path auto"
    if last.is_dir() and not last.is_symlink():
        remove(last)
    os.replace(partial, last)
    return notice


def _copy_tree(path: Path, copy: Path, copy_file: Callable[..., object]) -> None:
    """Copy a file, or a folder of files."""
    if not path.is_dir():
        copy_file(path, copy)
        return
    copy.mkdir()
    for part in path.iterdir():
        _copy_tree(part, copy / part.name, copy_file)


def step_of(path: Path) -> int | None:
    """The step that is in a checkpoint's name."""
    match = re.fullmatch(r"step=(\d+)\.ckpt", path.name)
    return int(match[1]) if match else None


def size_of(path: Path) -> int:
    """Bytes of a checkpoint, a file or a folder of shards."""
    return sum(part.stat().st_size for part in (path.rglob("*") if path.is_dir() else [path]) if part.is_file())


def saved_steps(folder: Path) -> list[int]:
    """Steps whose checkpoints are whole, in any order."""
    steps = (step_of(path) for path in folder.glob("step=*.ckpt"))
    return [step for step in steps if step is not None]


def remove_partial(folder: Path) -> None:
    """Delete what killed runs left unfinished."""
    for path in folder.glob(".*.partial"):
        remove(path)


def _partial(path: Path) -> Path:
    """The hidden name under which a checkpoint or link is written."""
    return path.with_name(f".{path.name}.partial")


def _make_way(path: Path) -> None:
    """Delete a folder of shards of the same name, which was damaged; the file system replaces a file by itself.

    A folder with anything else in it stays, and cannot be replaced.
    """
    if path.is_dir() and all(part.name in _SHARD_NAMES or part.suffix == ".distcp" for part in path.iterdir()):
        shutil.rmtree(path)


def _is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _copy(checkpoint: dict[str, Any], live: list[Tensor]) -> dict[str, Any]:
    """A checkpoint that training cannot change, on the CPU; tensors gathered for it alone are not copied again."""
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
    """Why a write failed, in a line."""
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
    """Fsync a file, or a partial folder with its files, before anything that follows."""
    for part in path.iterdir() if path.is_dir() and path.name.endswith(".partial") else ():
        _flush(part)
    flush(path)
