"""Sharded checkpoints (torch.distributed.checkpoint), read without executing code from them.

torch unpickles the metadata file (`.metadata`) of such a folder and each value that is not a tensor, such as a learning
rate. Either could execute code if the folder is untrusted. Here the metadata may contain only torch's own types, and
values are read with `weights_only`.
"""

from __future__ import annotations

import io
import itertools
import math
import operator
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, ReadItem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType

from ropepp_lit.errors import UsageError
from ropepp_lit.files import inside, refuse_pointer

SHARDED_METADATA = "meta.pt"
"""Lightning's file in a sharded checkpoint with everything but weights and optimizer states."""


def is_sharded(path: str | Path) -> bool:
    """Return whether a checkpoint is a folder of shards."""
    return (Path(path) / SHARDED_METADATA).is_file()


def read_pickled(path: Path) -> Any:
    """Read a file written by torch.save, with `weights_only`; tensors are memory-mapped.

    Raises:
        UsageError: the file cannot be read, is damaged, or contains more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises many kinds of exceptions for invalid files
        refuse_pointer(path)
        raise UsageError(f"{path}: not a readable checkpoint: the file is damaged, or is something else") from error


def check_pickled(path: Path) -> None:
    """Verify the CRC-32 of each record of a file written by torch.save, which torch.load does not.

    Raises:
        UsageError: a record is damaged.
    """
    with path.open("rb") as file:
        part = _damaged_part(file)
    if part is not None:
        raise UsageError(f"{path}: not a readable checkpoint: the checksum of {part} in it is wrong: it is damaged")


def _damaged_part(file: IO[bytes]) -> str | None:
    """Return the first record of a torch archive with a wrong checksum, or None."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except Exception as error:  # the kind of exception depends on which bytes are wrong
        return f"a part ({error})"


def load_sharded_state(path: str | Path, state: dict[str, Any], *, is_distributed: bool) -> None:
    """Read weights and optimizer states from a folder of shards. Only tensors and plain values are unpickled.

    Args:
        path: The folder.
        state: Nested dictionaries as they were saved. Tensors are modified in place, other values are replaced.
        is_distributed: Whether all ranks call this together; an error of one rank is then raised on all.

    Raises:
        UsageError: a shard is damaged or missing, or does not contain a value.
    """
    with _damage(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is intended
        distributed_checkpoint.load(state, storage_reader=_Reader(path), planner=_Planner(), no_dist=not is_distributed)


def read_sharded_rest(path: Path) -> dict[str, Any]:
    """Read everything but weights and optimizer states from a folder of shards.

    Raises:
        UsageError: the file is missing or damaged.
    """
    rest = read_pickled(path / SHARDED_METADATA)
    if not isinstance(rest, dict):
        raise UsageError(f"{path / SHARDED_METADATA}: not a readable checkpoint: the file is something else")
    return rest


def tensor_shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor in a folder of shards, by name.

    Raises:
        UsageError: the metadata file is missing or damaged, or contains types that are not allowed.
    """
    with _damage(path):
        return {
            name: (stored.size, stored.properties.dtype)
            for name, stored in _Reader(path).read_metadata().state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }


def check_shards(path: Path) -> None:
    """Raise UsageError if a shard is missing or shorter than the metadata states."""
    ends: dict[str, int] = {}
    with _damage(path):
        for stored in _Reader(path).read_metadata().storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        if not (path / name).is_file() or (path / name).stat().st_size < end:
            raise UsageError(f"{path}: not a readable checkpoint: the shard {name} is damaged or missing")


@contextmanager
def _damage(path: str | Path) -> Iterator[None]:
    """Convert exceptions raised while a folder of shards is read to UsageError."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        raise UsageError(f"{path}: not a readable checkpoint: a shard is damaged or missing") from error


class _Reader(FileSystemReader):
    """torch's reader of distributed checkpoints, restricted to its own types in the pickled metadata."""

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        """Read and validate the metadata file.

        Raises:
            pickle.UnpicklingError: it is damaged, or contains types that are not allowed.
            UsageError: it names a file outside the folder.
        """
        folder = Path(self.path)
        if not (folder / ".metadata").is_file():  # reading a named pipe would block
            raise pickle.UnpicklingError("no metadata file")
        table = _Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
        if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
            raise pickle.UnpicklingError("not a metadata file")
        stored_bytes: dict[str, int] = {}
        for index, stored in table.storage_data.items():
            if not isinstance(index, MetadataIndex) or not isinstance(stored, _StorageInfo):
                raise pickle.UnpicklingError("not a metadata file")
            inside(folder, stored.relative_path, source=folder / ".metadata")
            if stored.offset < 0 or stored.length < 0:
                raise pickle.UnpicklingError(f"{index.fqn} is outside of its file")
            stored_bytes[index.fqn] = stored_bytes.get(index.fqn, 0) + stored.length
        ranges = sorted((x.relative_path, x.offset, x.length) for x in table.storage_data.values())
        for (path, start, length), (other, next_start, _) in itertools.pairwise(ranges):
            if path == other and start + length > next_start:
                raise pickle.UnpicklingError(f"two values are stored at byte {next_start} of {path}")
        for name, kind in table.state_dict_metadata.items():
            if isinstance(kind, TensorStorageMetadata):  # so that no memory is allocated for data that does not exist
                num_bytes = math.prod(operator.index(size) for size in kind.size) * kind.properties.dtype.itemsize
                if min(kind.size, default=0) < 0 or num_bytes > stored_bytes.get(name, 0):
                    raise pickle.UnpicklingError(f"{name} is larger than its stored data")
                if not _is_covered(kind):
                    raise pickle.UnpicklingError(f"the chunks of {name} do not cover it")
        table.storage_meta = StorageMeta(load_id=self.load_id)
        return table

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        """Read a value in a shard, which is an archive of torch itself, and verify its checksum.

        Raises:
            zipfile.BadZipFile: its checksum is wrong.
        """
        # Read into memory, since torch's view of the file cannot seek from its end.
        part = io.BytesIO(super()._slice_file(file, sinfo).read())
        if damaged := _damaged_part(part):
            raise zipfile.BadZipFile(damaged)
        part.seek(0)
        return part


def _is_covered(stored: TensorStorageMetadata) -> bool:
    """Return whether the chunks of a tensor are within it, are distinct, and have as many elements in total."""
    total = 0
    for chunk in stored.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(stored.size):
            return False
        dims = zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        if not all(offset >= 0 and size >= 0 and offset + size <= full_size for offset, size, full_size in dims):
            return False
        total += math.prod(chunk.sizes)
    distinct = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks}
    return len(distinct) == len(stored.chunks) and total == math.prod(stored.size)


class _Planner(DefaultLoadPlanner):
    """torch's load planner, restricted to unpickling plain values; torch's own would execute code from a shard."""

    def create_local_plan(self) -> LoadPlan:
        """Return the plan of this rank, and check that tensors are stored as tensors."""
        plan = super().create_local_plan()
        for item in plan.items:
            is_tensor = isinstance(self.state_dict[item.dest_index.fqn], Tensor)
            if is_tensor != (item.type == LoadItemType.TENSOR):
                raise pickle.UnpicklingError(f"{item.dest_index.fqn} is stored as another kind of value")
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is not a tensor, such as a learning rate."""
        plain = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Unpickler(pickle._Unpickler):
    """pickle's Python implementation: the one in C allocates as much memory as a damaged length states."""

    # Metadata contain no byte arrays, for which this implementation would do so too.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed type by its exact module and name; anything else is refused and not imported."""
        if (module, name) in _METADATA_TYPES:
            return _METADATA_TYPES[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def _enum_member(kind: Any, name: str) -> Any:
    """Return a member of an enumeration, which early releases of Python 3.11 pickle as a call of `getattr`."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"an attribute of {kind} has no place in a checkpoint")
    return kind[name]


def _layout(name: str) -> torch.layout:
    """Return a layout by its name, such as `torch.strided`."""
    layout = vars(torch).get(str(name).removeprefix("torch."))
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError(f"{name} is not a layout of tensors")
    return layout


_METADATA_TYPES: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata._MEM_FORMAT_ENCODING,
            _StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("collections", "OrderedDict"): OrderedDict,
    # Folder that the checkpoint was written to; pure paths have no methods that access files.
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
    **{(module, "WindowsPath"): PureWindowsPath for module in ("pathlib", "pathlib._local")},
    ("builtins", "getattr"): _enum_member,
}
"""Types that torch 2.11 to 2.14 pickles into `.metadata`, in addition to torch's dtypes."""
