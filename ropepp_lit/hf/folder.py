"""Opens models of any supported format as checkpoints; weights of Hugging Face folders are memory-mapped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ropepp_lit.checkpoint import (
    KEY,
    check_depth,
    compute_dtype,
    decoder_weights,
    describe_architecture,
    make_checkpoint,
    read_checkpoint,
)
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.adapters import check_base, is_adapter, merge
from ropepp_lit.hf.config import Architecture, family_of, read_config
from ropepp_lit.hf.layouts import (
    CONFIG,
    find_folder,
    is_hub_name,
    origin_of,
    read_json,
    read_tensors,
    refuse_url,
)
from ropepp_lit.hf.rotary import Rotary
from ropepp_lit.nn import Decoder
from ropepp_lit.text import tokenizer_files
from ropepp_lit.text.tokenizer import TextTokenizer

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """Return the local path of a model; repositories of the Hugging Face Hub are downloaded.

    Args:
        source: A .ckpt file or folder, a Hugging Face folder, or `ORGANIZATION/MODEL` on the Hub, with an optional
            `@REVISION`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UsageError: The model cannot be downloaded, a revision is given for a local path, or the source is a URL.
    """
    if revision is not None or is_hub_name(source):
        return find_folder(source, revision=revision)
    refuse_url(source)
    return Path(source)


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    base: str | None = None,
    shapes_only: bool = False,
    checksums: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Open a model of any supported format; all commands and recipes use this function.

    Adapters are merged with their base (:func:`ropepp_lit.hf.adapters.merge`).

    Args:
        source: See :func:`locate`.
        revision: See :func:`locate`.
        base: Path of the base of adapters; None means the path stored by the run.
        shapes_only: See :func:`~ropepp_lit.checkpoint.read_checkpoint`; adapters are then not merged.
        checksums: See :func:`~ropepp_lit.checkpoint.read_checkpoint`.
        options: Options of :func:`read_folder`, only for Hugging Face folders.

    Raises:
        UsageError: The source cannot be read, or stores adapters that were trained on another base.
    """
    path = locate(source, revision=revision)
    if (path / CONFIG).is_file():
        _refuse_base(source, base)
        return read_folder(path, **options)
    if options:
        raise UsageError(
            f"source: {source} is not a Hugging Face folder; rope_theta, scaling, factor, "
            "original_max_position_embeddings and ignore apply only to such folders"
        )
    checkpoint = read_checkpoint(path, shapes_only=shapes_only, checksums=checksums)
    if not is_adapter(checkpoint):
        _refuse_base(source, base)
        return checkpoint
    weights = open_base(checkpoint, source, base=base, shapes_only=shapes_only)
    return merge(checkpoint, source, weights, shapes_only=shapes_only)


def open_base(
    checkpoint: dict[str, Any], source: str | Path, *, base: str | None = None, shapes_only: bool = False
) -> dict[str, Any]:
    """Open the base of adapters.

    Args:
        checkpoint: Checkpoint with the adapters.
        source: Path of the checkpoint, for messages.
        base: Path of the base; None means the path stored by the run.
        shapes_only: Whether to skip the weights, and the comparison of the fingerprint.

    Raises:
        UsageError: The base cannot be read, or is not the one that the adapters were trained on.
    """
    path = base or checkpoint[KEY]["adapter"].get("base")
    try:
        opened = open_checkpoint(str(path), shapes_only=shapes_only)
    except UsageError as error:
        if base is not None:
            raise
        raise UsageError(
            f"{source}: the base of its adapters cannot be read ({error}); if it was moved, merge both by: "
            f"ropepp-lit export {source} OUT --base PATH (in a recipe, set model.init_from)"
        ) from error
    if not shapes_only:
        check_base(checkpoint, source, opened, str(path))
    return opened


def _refuse_base(source: str | Path, base: str | None) -> None:
    if base is not None:
        raise UsageError(f"base: {source} stores a full model; a base applies only to adapters")


def read_folder(
    folder: Path,
    *,
    variant: str | None = None,
    rotary: Rotary = Rotary(),  # noqa: B008
    ignore: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Read a Hugging Face folder as a checkpoint, without running code of the folder.

    Args:
        folder: Folder with config.json, and weights in a layout of :mod:`ropepp_lit.hf.layouts`.
        variant: See :func:`~ropepp_lit.hf.config.read_config`.
        rotary: See :func:`~ropepp_lit.hf.config.read_config`.
        ignore: See :func:`~ropepp_lit.hf.config.read_config`.

    Raises:
        UsageError: Something is missing, damaged or not supported.
    """
    path = folder / CONFIG
    config = read_json(path)
    family = family_of(config, str(path))
    tensors = family.rewrite(read_tensors(folder), config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    architecture = read_config(config, shapes, name=str(path), variant=variant, rotary=rotary, ignore=ignore)
    _check_tensors(folder, tensors, architecture)
    return make_checkpoint(
        tensors,
        architecture=describe_architecture(architecture.decoder, architecture.scheme, architecture.frequencies),
        context_length=architecture.context_length,
        **_read_tokenizer(folder),
        origin=origin_of(folder),
        card=_read_card(folder),
    )


def _read_tokenizer(folder: Path) -> dict[str, Any]:
    """Return the checkpoint entries of the folder's tokenizer and generation settings; see :mod:`.checkpoint`."""
    generation = folder / GENERATION
    entry: dict[str, Any] = {
        "generation_config": json.dumps(read_json(generation)) if generation.is_file() else None,
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


def _read_card(folder: Path) -> dict[str, Any]:
    """Return the license and the base model from the front matter of the folder's README.md."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.match(r"\ufeff?\s*---\n(.*?)\n---", text, flags=re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        front = None
    keys = ("license", "license_name", "license_link", "base_model")
    card = {key: front[key] for key in keys if front.get(key)} if isinstance(front, dict) else {}
    name, is_from_hub, _ = origin_of(folder).partition("@")
    return card | ({"base_model": name} if is_from_hub else {})


def _check_tensors(folder: Path, tensors: dict[str, Tensor], architecture: Architecture) -> None:
    """Check names and shapes, add tied weights and drop redundant ones; only the decoder's weights remain."""
    try:
        check_depth(architecture.decoder, tensors)
    except UsageError as error:
        raise UsageError(f"{folder / CONFIG}: {error}") from error
    with torch.device("meta"):
        decoder = Decoder(architecture.decoder, architecture.scheme, architecture.frequencies)
    expected = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # stored by old versions; recomputed from base and scaling
    if architecture.decoder.tie_word_embeddings:
        embedding, output = (tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        if embedding is not None:
            if output is not None and not _equal(output, embedding):
                raise UsageError(
                    f"{folder / CONFIG}: tie_word_embeddings is true, but lm_head.weight differs from the embedding"
                )
            tensors["lm_head.weight"] = embedding
    for name, shape in expected.items():
        if name not in tensors:
            raise UsageError(f"{folder}: the tensor {name} is missing")
        actual = tuple(tensors[name].shape)
        if actual != shape:
            raise UsageError(f"{folder}: {name} has the shape {actual}, but by {CONFIG} it must be {shape}")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise UsageError(f"{folder}: the decoder has no tensor {extra[0]} ({len(extra)} unexpected tensors)")


def _equal(first: Tensor, second: Tensor) -> bool:
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.shape == second.shape and torch.equal(first.to(dtype), second.to(dtype))


def weights_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the decoder's weights by their names in transformers' Llama, without a tied output layer."""
    weights = decoder_weights(checkpoint)
    if checkpoint[KEY]["architecture"]["decoder"]["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    return weights


def describe_dtypes(checkpoint: dict[str, Any]) -> str | None:
    """Describe the dtypes of a checkpoint's weights, the compute dtype first; None if there is only one."""
    computed = compute_dtype(checkpoint)
    others: dict[str, list[str]] = {}
    weights = weights_of(checkpoint)
    for name, value in weights.items():
        if value.dtype != computed:
            others.setdefault(str(value.dtype).removeprefix("torch."), []).append(name)
    if not others:
        return None
    described = ", ".join(f"{dtype} ({len(names)}, such as {names[0]})" for dtype, names in others.items())
    return f"the weights are {str(computed).removeprefix('torch.')}, with tensors in {described}"
