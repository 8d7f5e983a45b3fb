"""File layouts of weights in Hugging Face folders: download, reading, and rejection of unsupported ones.

:data:`LAYOUTS` lists the supported layouts: :func:`find_folder` downloads and :func:`read_tensors` reads them.
:data:`READABLE` describes them for help and messages.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.files import inside, nearest_file, read_text, refuse_pointer
from ropepp_lit.json_files import parse_json
from ropepp_lit.sharded import check_pickled

CONFIG = "config.json"

SETTINGS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "README.md")
"""Patterns of files that are downloaded in addition to the weights."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Supported dtypes of weights."""


class Layout(NamedTuple):
    """File names of weights in a format."""

    pattern: str
    """Glob pattern of files with weights."""

    single: str
    """Standard name of a single file, which is preferred if there are multiple files."""

    indexes: str
    """Glob pattern of the index, a JSON file that maps tensors to files."""

    read: Callable[[Path], dict[str, Tensor]]
    """Function that reads a file."""


REFUSED = {
    "adapter_model.*": "stores an adapter without its base model; merge it by peft's merge_and_unload() first",
    "consolidated*": "is in the original format of Meta or Mistral; use the repository's safetensors, or convert it by "
    "transformers' convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py",
    "*.gguf": "is GGUF; load it by transformers (from_pretrained(FOLDER, gguf_file=NAME)) and save_pretrained",
    "*.h5": "is TensorFlow's; load it by transformers 4 (from_tf=True) and save_pretrained",
    "*.msgpack": "is Flax's; load it by transformers 4 (from_flax=True) and save_pretrained",
    "*.ckpt": "is not a file of a Hugging Face folder; pass the path of the .ckpt file",
    "*.pt": "is not a file of a Hugging Face folder; save the model by transformers' save_pretrained",
    "*.pth": "is not a file of a Hugging Face folder; save the model by transformers' save_pretrained",
}
"""Reasons and remedies for unsupported files of weights, by glob pattern."""

NO_WEIGHTS = ("training_args.*", "optimizer*", "scheduler*", "random_states*", "rng_state*")
"""Glob patterns of training files, which are not weights."""

READABLE = (
    "model.safetensors (one file of any name, or multiple files, with or without an index) or pytorch_model.bin (the "
    "same; in torch's current or legacy format, loaded with weights_only)"
)

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_NUMBERED = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.\w+")


def refuse_url(source: str | Path) -> None:
    """Raise UsageError if a source is a URL, which Path would corrupt by merging its slashes."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(source)):
        raise UsageError(f"{source}: a URL; copy the model to this machine first, or name it ORGANIZATION/MODEL")


def find_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """Return a local folder, or download a repository of the Hugging Face Hub (or use the cache).

    Args:
        source: A folder, or `ORGANIZATION/MODEL` with an optional `@REVISION`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UsageError: There is no such folder, or it cannot be downloaded.
    """
    refuse_url(source)
    folder = Path(source)
    if folder.exists():
        if revision is not None:
            raise UsageError(f"revision: {source} is a local folder; a revision applies only to the Hub")
        return _check_config(folder)
    match = _NAME.fullmatch(str(source))
    if match is None or (match[2] and revision):
        raise UsageError(
            f"source: {source}: no such folder; name one in Hugging Face's format, or ORGANIZATION/MODEL on the Hub"
            f"{nearest_file(folder)}"
        )
    for layout in LAYOUTS:
        folder = _fetch(match[1], match[2] or revision, layout.pattern)
        if _has_layout(folder, layout):
            break
    return _check_config(folder)


def _check_config(folder: Path) -> Path:
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise UsageError(f"source: {folder}: {REFUSED['adapter_model.*']}")
    raise UsageError(f"source: {folder}: no {CONFIG} there; name a folder in Hugging Face's format")


def is_hub_name(source: str | Path) -> bool:
    """Return whether a source can only be the name of a repository on the Hub."""
    return not Path(source).exists() and not str(source).endswith(".ckpt") and bool(_NAME.fullmatch(str(source)))


def _fetch(name: str, revision: str | None, pattern: str) -> Path:
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*SETTINGS, pattern],
                ignore_patterns=["*/*", *REFUSED],
            )
        )
    except Exception as error:  # from httpx or huggingface_hub
        reason = f"it cannot be downloaded from the Hugging Face Hub ({type(error).__name__}); check the connection"
        if isinstance(error, RevisionNotFoundError):
            reason = f"the Hugging Face Hub has no revision {revision} of this model"
        elif isinstance(error, GatedRepoError):
            reason = "the model is gated; accept the conditions on its page and run: hf auth login"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "it is not on the Hugging Face Hub, or private; check the name, or run: hf auth login"
        raise UsageError(f"source: {name}: no such local folder, and {reason}") from error


def origin_of(folder: Path) -> str:
    """Return the origin of a folder: `ORGANIZATION/MODEL@COMMIT` in the Hub's cache, otherwise the folder's name."""
    folder = folder.absolute()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return folder.resolve().name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: The file is missing, or is not a JSON object.
    """
    refuse_pointer(path)
    try:
        values = parse_json(read_text(path).removeprefix("\ufeff"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name a folder in Hugging Face's format") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: not a JSON object")
    return values


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, by name; memory-mapped, except from files in torch's legacy format.

    Raises:
        UsageError: The layout is not supported, or a file is missing, damaged, quantized or outside the folder.
    """
    for layout in LAYOUTS:
        if not _has_layout(folder, layout):
            continue
        if (folder / layout.single).is_file():
            return _read(folder / layout.single, layout)
        if index := _find_index(folder, layout):
            return _read_indexed(folder, index, layout)
        tensors: dict[str, Tensor] = {}
        for file in _complete_set(folder, _candidates(folder, layout)):
            tensors |= _read(file, layout)
        return tensors
    for pattern, reason in REFUSED.items():
        for file in sorted(folder.glob(pattern)):
            raise UsageError(f"{file}: {reason}")
    raise UsageError(f"{folder}: no weights in a supported layout: {READABLE}")


def _has_layout(folder: Path, layout: Layout) -> bool:
    return bool(_candidates(folder, layout)) or any(folder.glob(layout.indexes))


def _candidates(folder: Path, layout: Layout) -> list[Path]:
    """Return the files that may store the model's weights in a layout."""
    return sorted(
        file
        for file in folder.glob(layout.pattern)
        if file.is_file() and not any(file.match(pattern) for pattern in (*REFUSED, *NO_WEIGHTS))
    )


def _find_index(folder: Path, layout: Layout) -> Path | None:
    standard = folder / f"{layout.single}.index.json"
    indexes = [standard] if standard.is_file() else sorted(folder.glob(layout.indexes))
    if len(indexes) > 1:
        raise UsageError(f"{folder}: multiple indexes ({', '.join(file.name for file in indexes)}); keep only one")
    return indexes[0] if indexes else None


def _complete_set(folder: Path, files: list[Path]) -> list[Path]:
    """Check that files without an index are one model: a single file, or all shards of a numbered set."""
    parts = [_NUMBERED.fullmatch(file.name) for file in files]
    if parts == [None]:
        return files
    sets = {(part[1], int(part[3])) for part in parts if part}
    if not all(parts) or len(sets) != 1:
        names = ", ".join(file.name for file in files)
        raise UsageError(f"{folder}: multiple files of weights without an index ({names}); keep only one model")
    ((stem, count),) = sets
    missing = sorted(set(range(1, count + 1)) - {int(part[2]) for part in parts if part})
    if missing:
        raise UsageError(f"{folder}: file {missing[0]} of {count} of {stem} is missing; download the folder again")
    return files


def _read_indexed(folder: Path, index: Path, layout: Layout) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index}: it has no weight_map; download the file again")
    files = {name: inside(folder, name, source=index) for name in weight_map.values()}
    tensors: dict[str, Tensor] = {}
    for path in sorted(files.values()):
        if not path.is_file():
            raise UsageError(f"{path}: missing, but listed in {index.name}; download the folder again")
        tensors |= _read(path, layout)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise UsageError(f"{index}: it lists {missing[0]}, which none of the files has")
    return tensors


def _read(path: Path, layout: Layout) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(64)
    refuse_pointer(path, start)
    if not start:
        raise UsageError(f"{path}: empty; download the file again")
    tensors = layout.read(path)
    for name, value in tensors.items():
        if value.dtype not in DTYPES and not name.endswith("rotary_emb.inv_freq"):
            dtype = str(value.dtype).removeprefix("torch.")
            raise UsageError(
                f"{path}: {name} is {dtype}; quantized weights are not supported, use the model's unquantized weights"
            )
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged or not safetensors ({str(error).splitlines()[0]})") from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """Read a file with `weights_only`; torch's legacy format, which is not a zip archive, is read into memory."""
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    try:
        if is_archive and not zipfile.is_zipfile(path):
            raise EOFError
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise UsageError(
                f"{path}: stores objects other than weights ({foreign[1]}), which are not loaded; if you trust the "
                "file, convert it to safetensors"
            ) from error
        raise UsageError(f"{path}: damaged or not a PyTorch file; download it again") from error
    except MemoryError:
        raise
    except Exception as error:  # torch raises various exceptions for files in other formats
        raise UsageError(f"{path}: damaged or truncated; download it again") from error
    if is_archive:
        check_pickled(path)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UsageError(f"{path}: not a dict of tensors; save the model by save_pretrained")
    return {str(name): value.detach() for name, value in tensors.items()}


LAYOUTS = (
    Layout("*.safetensors", "model.safetensors", "*.safetensors.index.json", _read_safetensors),
    Layout("*.bin", "pytorch_model.bin", "*.bin.index.json", _read_pickled),
)
"""Supported layouts, in order of preference."""
