"""Folders of shards, torch's distributed checkpoints, read without running anything that they name.

torch reads such a folder by plain `pickle`: its table of contents (`.metadata`), and each value that is no tensor, such
as a learning rate. A folder from elsewhere could run code by either. Here the table may name torch's own types alone,
and values are read by `weights_only`.
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
"""In a folder of shards, Lightning's file of all that is no weight and no optimizer state."""


def is_sharded(path: str | Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (Path(path) / SHARDED_METADATA).is_file()


def read_pickled(path: Path) -> Any:
    """Read a file that torch wrote, with `weights_only`; tensors stay on the disk until they are used.

    Raises:
        UsageError: the file cannot be read, is damaged, or contains more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises many kinds for what is not its format
        refuse_pointer(path)
        raise UsageError(f"{path}: not a readable checkpoint: the file is damaged, or is something else") from error


def check_pickled(path: Path) -> None:
    """Compare a file that torch wrote with the CRC-32 of each of its parts, which torch's own reader leaves out.

    Raises:
        UsageError: a part is damaged.
    """
    with path.open("rb") as file:
        part = _damaged_part(file)
    if part is not None:
        raise UsageError(f"{path}: not a readable checkpoint: the checksum of {part} in it is wrong: it is damaged")


def _damaged_part(file: IO[bytes]) -> str | None:
    """The first part of an archive of torch whose checksum is wrong."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except Exception as error:  # what zipfile raises depends on which bytes are wrong
        return f"a part ({error})"


def load_sharded_state(path: str | Path, state: dict[str, Any], *, is_distributed: bool) -> None:
    """Read weights and optimizer states from a folder of shards. Nothing but tensors and plain values is unpickled.

    Args:
        path: The folder.
        state: Nested dictionaries as they were saved. Tensors are changed in place, other values are replaced.
        is_distributed: Whether all ranks call this together; then an error of one is raised on all.

    Raises:
        UsageError: a shard is damaged or missing, or does not have such a value.
    """
    with _damage(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is meant
        distributed_checkpoint.load(state, storage_reader=_Reader(path), planner=_Planner(), no_dist=not is_distributed)


def read_sharded_rest(path: Path) -> dict[str, Any]:
    """What a folder of shards stores beside weights and optimizer states.

    Raises:
        UsageError: the file is missing or damaged.
    """
    rest = read_pickled(path / SHARDED_METADATA)
    if not isinstance(rest, dict):
        raise UsageError(f"{path / SHARDED_METADATA}: not a readable checkpoint: the file is something else")
    return rest


def tensor_shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor of a folder of shards, by name.

    Raises:
        UsageError: the table of contents is missing or damaged, or names what has no place in it.
    """
    with _damage(path):
        return {
            name: (stored.size, stored.properties.dtype)
            for name, stored in _Reader(path).read_metadata().state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }


def check_shards(path: Path) -> None:
    """Raise UsageError where a shard is missing or shorter than the table of contents says."""
    ends: dict[str, int] = {}
    with _damage(path):
        for stored in _Reader(path).read_metadata().storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        if not (path / name).is_file() or (path / name).stat().st_size < end:
            raise UsageError(f"{path}: not a readable checkpoint: the shard {name} is damaged or missing")


@contextmanager
def _damage(path: str | Path) -> Iterator[None]:
    """Report what goes wrong while a folder of shards is read."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        raise UsageError(f"{path}: not a readable checkpoint: a shard is damaged or missing") from error


class _Reader(FileSystemReader):
    """torch's reader of distributed checkpoints, whose pickled table of contents may contain its own types alone."""

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        """The table of contents.

        Raises:
            pickle.UnpicklingError: it is damaged, or names anything that is no part of such a table.
            UsageError: it names a file outside the folder.
        """
        folder = Path(self.path)
        if not (folder / ".metadata").is_file():  # a named pipe would never end
            raise pickle.UnpicklingError("no table of contents")
        table = _Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
        if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
            raise pickle.UnpicklingError("not a table of contents")
        stored_bytes: dict[str, int] = {}
        for index, stored in table.storage_data.items():
            if not isinstance(index, MetadataIndex) or not isinstance(stored, _StorageInfo):
                raise pickle.UnpicklingError("not a table of contents")
            inside(folder, stored.relative_path, source=folder / ".metadata")
            if stored.offset < 0 or stored.length < 0:
                raise pickle.UnpicklingError(f"{index.fqn} is outside of its file")
            stored_bytes[index.fqn] = stored_bytes.get(index.fqn, 0) + stored.length
        places = sorted((x.relative_path, x.offset, x.length) for x in table.storage_data.values())
        for (path, start, length), (other, next_start, _) in itertools.pairwise(places):
            if path == other and start + length > next_start:
                raise pickle.UnpicklingError(f"two values are stored at byte {next_start} of {path}")
        for name, kind in table.state_dict_metadata.items():
            if isinstance(kind, TensorStorageMetadata):  # so that no memory is taken for what is not there
                numbers = math.prod(operator.index(size) for size in kind.size)
                if min(kind.size, default=0) < 0 or numbers * kind.properties.dtype.itemsize > stored_bytes.get(
                    name, 0
                ):
                    raise pickle.UnpicklingError(f"{name} is larger than what is stored of it")
                if not _is_covered(kind):
                    raise pickle.UnpicklingError(f"the parts of {name} are not the whole of it")
        table.storage_meta = StorageMeta(load_id=self.load_id)
        return table

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        """A value in a shard, an archive of torch by itself; what is damaged is found here, where it is read anyway.

        Raises:
            zipfile.BadZipFile: its checksum is wrong.
        """
        part = io.BytesIO(super()._slice_file(file, sinfo).read())  # read once; torch's view cannot seek from its end
        if damaged := _damaged_part(part):
            raise zipfile.BadZipFile(damaged)
        part.seek(0)
        return part


def _is_covered(stored: TensorStorageMetadata) -> bool:
    """Whether the parts of a tensor are within it, have places of their own, and as many numbers together."""
    total = 0
    for chunk in stored.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(stored.size):
            return False
        places = zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        if not all(offset >= 0 and size >= 0 and offset + size <= most for offset, size, most in places):
            return False
        total += math.prod(chunk.sizes)
    parts = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks}
    return len(parts) == len(stored.chunks) and total == math.prod(stored.size)


class _Planner(DefaultLoadPlanner):
    """torch's plan of what is read, which unpickles plain values alone; torch's own would run what a shard names."""

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads; a tensor is read as nothing else."""
        plan = super().create_local_plan()
        for item in plan.items:
            wants_tensor = isinstance(self.state_dict[item.dest_index.fqn], Tensor)
            if wants_tensor != (item.type == LoadItemType.TENSOR):
                raise pickle.UnpicklingError(f"{item.dest_index.fqn} is stored as another kind of value")
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value that is no tensor, such as a learning rate."""
        plain = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Unpickler(pickle._Unpickler):
    """pickle's reader in Python: that in C takes as much memory as a damaged byte says."""

    # A table has no arrays of bytes, for which this one would do so too.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        """What a table of contents may name, by the exact pair; anything else is refused and not imported."""
        if (module, name) in _TABLE_TYPES:
            return _TABLE_TYPES[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def _enum_member(kind: Any, name: str) -> Any:
    """A member of an enumeration, which early releases of Python 3.11 pickle as a call of `getattr`."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"an attribute of {kind} has no place in a checkpoint")
    return kind[name]


def _layout(name: str) -> torch.layout:
    """A layout by its name, such as `torch.strided`."""
    layout = vars(torch).get(str(name).removeprefix("torch."))
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError(f"{name} is not a layout of tensors")
    return layout


_TABLE_TYPES: dict[tuple[str, str], Any] = {
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
    # The folder that the checkpoint was written to; pure paths have no method that touches a file.
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
    **{(module, "WindowsPath"): PureWindowsPath for module in ("pathlib", "pathlib._local")},
    ("builtins", "getattr"): _enum_member,
}
"""What torch 2.11 to 2.14 pickles into `.metadata`, beside the dtypes of torch."""
