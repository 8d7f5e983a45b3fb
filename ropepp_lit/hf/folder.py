"""Hugging Face folders as checkpoints of ours: weights stay on the disk until they are used."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ropepp_lit.checkpoint import KEY, decoder_weights, describe_architecture, make_checkpoint, read_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.config import Architecture, Rotary, read_config
from ropepp_lit.nn import Decoder
from ropepp_lit.text import tokenizer_files
from ropepp_lit.text.tokenizer import TextTokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def find_folder(source: str) -> Path:
    """A folder on this machine, or one fetched from the Hugging Face Hub (or found in its cache) by its name.

    Args:
        source: A folder, or ORGANIZATION/MODEL.

    Raises:
        UsageError: neither is to be had.
    """
    if (Path(source) / CONFIG).is_file():
        return Path(source)
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UsageError(f"source: {source}: no {CONFIG} there; name a folder in Hugging Face's format")
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # httpx's, and the Hub's own
        raise UsageError(
            f"source: {source}: neither here nor to be had from the Hugging Face Hub ({type(error).__name__}); "
            "check the name and the connection"
        ) from error


def open_checkpoint(path: str | Path, *, shapes_only: bool = False, **options: Any) -> dict[str, Any]:
    """A checkpoint of ours, or a Hugging Face folder read as one.

    Args:
        path: A .ckpt file or folder, or a folder with a config.json.
        shapes_only: See :func:`~ropepp_lit.checkpoint.read_checkpoint`.
        options: Those of :func:`read_folder`.
    """
    if (Path(path) / CONFIG).is_file():
        return read_folder(Path(path), **options)
    return read_checkpoint(path, shapes_only=shapes_only)


def read_folder(
    folder: Path,
    *,
    variant: str | None = None,
    rotary: Rotary = Rotary(),  # noqa: B008
    ignore: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Read a Hugging Face folder as a checkpoint of ours. No code of the folder is run.

    Args:
        folder: With config.json and safetensors (one file or several with an index) or, read by `weights_only`,
            pytorch_model.bin.
        variant: See :func:`~ropepp_lit.hf.config.read_config`.
        rotary: See there.
        ignore: See there.

    Raises:
        UsageError: something is missing, damaged or not supported; nothing is dropped in silence.
    """
    path = folder / CONFIG
    config = _read_json(path)
    tensors = _read_tensors(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    architecture = read_config(config, shapes, name=str(path), variant=variant, rotary=rotary, ignore=ignore)
    _check_tensors(folder, tensors, architecture)
    return make_checkpoint(
        tensors,
        architecture=describe_architecture(architecture.decoder, architecture.scheme, architecture.frequencies),
        context_length=architecture.context_length,
        **_read_tokenizer(folder),
        origin=folder.resolve().name,
    )


def _read_tokenizer(folder: Path) -> dict[str, Any]:
    """Entries of a checkpoint on the folder's tokenizer and its settings of generation; see :mod:`.checkpoint`."""
    generation = folder / GENERATION
    entry: dict[str, Any] = {
        "generation_config": json.dumps(_read_json(generation)) if generation.is_file() else None,
        "tokenizer_config": None,
    }
    loaded = tokenizer_files.load(folder)
    if loaded is None:
        return entry
    tokenizer = TextTokenizer.from_files(loaded)
    return entry | {
        "tokenizer": tokenizer.json,
        "tokenizer_config": None if tokenizer.settings is None else json.dumps(tokenizer.settings),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "opening": list(tokenizer.opening),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name a folder in Hugging Face's format") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: not a JSON object")
    return values


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by name, memory-mapped."""
    index = folder / "model.safetensors.index.json"
    pickled = folder / "pytorch_model.bin"
    if (folder / "model.safetensors").is_file():
        return _read_safetensors(folder / "model.safetensors")
    if index.is_file():
        tensors: dict[str, Tensor] = {}
        places = _read_json(index).get("weight_map", {})
        for name in sorted(set(places.values())):
            if not (folder / name).is_file():
                raise UsageError(f"{folder / name}: missing, and {index.name} names it")
            tensors |= _read_safetensors(folder / name)
        missing = sorted(set(places) - set(tensors))
        if missing:
            raise UsageError(f"{index}: names {missing[0]}, which is in none of the files")
        return tensors
    if pickled.is_file():
        try:
            return torch.load(pickled, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise UsageError(f"{pickled}: damaged, or holds more than weights, which is not run") from error
    raise UsageError(f"{folder}: holds neither model.safetensors, nor an index of several, nor pytorch_model.bin")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged or not safetensors ({str(error).splitlines()[0]})") from error


def _check_tensors(folder: Path, tensors: dict[str, Tensor], architecture: Architecture) -> None:
    """Leave exactly the decoder's parameters, or say what does not fit."""
    with torch.device("meta"):
        decoder = Decoder(architecture.decoder, architecture.scheme, architecture.frequencies)
    wanted = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # old folders carry what the base and scaling say
    if architecture.decoder.tie_word_embeddings:
        embedding, output = (tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        if embedding is not None:
            if output is not None and not torch.equal(output, embedding):
                raise UsageError(
                    f"{folder / CONFIG}: tie_word_embeddings is true, and lm_head.weight is another matrix"
                )
            tensors["lm_head.weight"] = embedding
    for name, shape in wanted.items():
        if name not in tensors:
            raise UsageError(f"{folder}: the tensor {name} is missing")
        found = tuple(tensors[name].shape)
        if found != shape:
            raise UsageError(f"{folder}: {name} has the shape {found}, and {CONFIG} wants {shape}")
    extra = sorted(set(tensors) - set(wanted))
    if extra:
        raise UsageError(f"{folder}: the tensor {extra[0]} has no place in the decoder ({len(extra)} have none)")


def weights_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The decoder's parameters by their names in Hugging Face's Llama; a tied output layer once, as the embedding."""
    weights = decoder_weights(checkpoint)
    if checkpoint[KEY]["architecture"]["decoder"]["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    return weights
