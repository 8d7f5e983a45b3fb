"""Format of checkpoints, and functions that read and write them.

A checkpoint is a Lightning checkpoint with an additional entry `ropepp_lit` of plain dicts, lists, strings and tensors,
so that `torch.load(weights_only=True)` can read it:

| key                 | value                                                                                   |
|---------------------|-----------------------------------------------------------------------------------------|
| `format_version`    | 1                                                                                       |
| `architecture`      | `decoder` (geometry), `positions` and `frequencies` (each `class_path`, `init_args`)    |
| `context_length`    | context length of the model in tokens, or None                                          |
| `optimizer`         | class name of the optimizer's configuration, `AdamW` or `Muon`; None without a state    |
| `recipe`            | complete recipe of the run, or None if it was not started by the command                |
| `origin`            | source of the initial weights, or None for random weights                               |
| `tokens_seen`       | number of training tokens of all ranks                                                  |
| `skipped_steps`     | number of steps skipped because of NaN or infinite loss or gradients, or absent         |
| `train_loss`        | sums of the training loss since it was last logged, or absent: `nats` and `tokens`;     |
|                     | in preference tuning `tokens` counts pairs, and `rewards` is included                   |
| `validation`        | results of the latest validation, by set                                                |
| `tokenizer`         | tokenizer.json, or None                                                                 |
| `bos_token_id`      | BOS token id, or None                                                                   |
| `eos_token_id`      | EOS token id, which ends a document, or None                                            |
| `opening`           | token ids before every text; absent or None means `bos_token_id`                        |
| `held_out`          | checksum of each validation set's documents, by set, or absent                          |
| `tokenizer_config`  | tokenizer_config.json of Hugging Face with the data's chat template, or absent          |
| `generation_config` | generation_config.json of Hugging Face with the data's end-of-turn tokens, or absent    |
| `adapter`           | adapters and their base (:mod:`ropepp_lit.hf.adapters`), or absent                      |
| `reference`         | log-probabilities by the reference model of preference tuning                           |
|                     | (:class:`ropepp_lit.train.pair_training.Reference`), or absent                          |
| `card`              | license and base model from a Hugging Face folder's README.md, or absent                |
"""

from __future__ import annotations

import importlib
import inspect
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ropepp_lit.checkpoint_values import check_entry, check_weights
from ropepp_lit.errors import UsageError
from ropepp_lit.files import nearest_file, sync, write_errors
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, PositionScheme
from ropepp_lit.sharded import (
    SHARDED_METADATA,
    check_pickled,
    check_shards,
    is_sharded,
    load_sharded_state,
    read_pickled,
    read_sharded_rest,
    tensor_shapes,
)

T = TypeVar("T")

KEY = "ropepp_lit"
FORMAT_VERSION = 1
_STATE_DICT = "state_dict."
"""Prefix of the names of weights in a folder of shards."""

WEIGHTS_PREFIX = "decoder."
"""Prefix of the decoder's parameter names in the LightningModule."""


def read_checkpoint(path: str | Path, *, shapes_only: bool = False, checksums: bool = False) -> dict[str, Any]:
    """Read a checkpoint without executing code from it; tensors are memory-mapped.

    Args:
        path: A .ckpt file, or a .ckpt folder of shards.
        shapes_only: For a folder of shards, return tensors on the meta device instead of reading the weights.
        checksums: Verify a file's checksums, which reads all of it (0.2 s per GB). Shards are always verified when they
            are read.

    Raises:
        UsageError: no such file, not a checkpoint of ropepp-lit, or damaged.
    """
    path = Path(path)
    if is_sharded(path):
        if checksums:
            check_pickled(path / SHARDED_METADATA)
        return _check_entry(path, _read_sharded(path, shapes_only), are_shapes=shapes_only)
    if path.is_dir():
        newest = [last for last in (path / "last.ckpt", path / "checkpoints" / "last.ckpt") if last.exists()]
        remedy = f"name {newest[0]}" if newest else "name a .ckpt file, or a folder in Hugging Face's format"
        raise UsageError(f"{path}: a folder, not a checkpoint; {remedy}")
    if not path.is_file():
        near = nearest_file(path)
        raise UsageError(f"{path}: no such checkpoint; name a .ckpt file, or a folder in Hugging Face's format{near}")
    checkpoint = _check_entry(path, read_pickled(path))
    if checksums:
        check_pickled(path)
    return checkpoint


def _check_entry(path: Path, checkpoint: Any, *, are_shapes: bool = False) -> dict[str, Any]:
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict):
        raise UsageError(f"{path}: not a checkpoint of ropepp-lit (it has no entry {KEY!r})")
    ours = checkpoint[KEY]
    format_version = ours.get("format_version")
    if format_version != FORMAT_VERSION:
        raise UsageError(
            f"{path}: format_version {format_version}, and this version of ropepp-lit reads {FORMAT_VERSION}"
        )
    try:
        if type(step := checkpoint.get("global_step")) is not int or step < 0:
            raise ValueError(f"its global_step is {str(step)[:80]!r}")
        check_entry(ours)
        check_weights(checkpoint.get("state_dict"), are_shapes=are_shapes)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: damaged: {error}") from error
    return checkpoint


def load_shards(path: str | Path, weights: dict[str, Tensor], *, is_distributed: bool) -> None:
    """Read weights from a folder of shards into tensors.

    Args:
        path: The folder.
        weights: Tensors by their names in the checkpoint, modified in place; for a DTensor, this rank's shard is read.
        is_distributed: Whether all ranks call this together; an error of one rank is then raised on all.

    Raises:
        UsageError: a shard is damaged or missing, or does not contain a tensor.
    """
    state = {_STATE_DICT + name: value for name, value in weights.items()}
    load_sharded_state(path, state, is_distributed=is_distributed)


def _read_sharded(path: Path, shapes_only: bool) -> dict[str, Any]:
    """Read a folder of shards with the full weights in memory; optimizer states are not read."""
    checkpoint = read_sharded_rest(path)
    check_shards(path)
    device = "meta" if shapes_only else "cpu"
    tensors = {
        name.removeprefix(_STATE_DICT): torch.empty(size, dtype=dtype, device=device)
        for name, (size, dtype) in tensor_shapes(path).items()
        if name.startswith(_STATE_DICT)
    }
    if not shapes_only:
        load_shards(path, tensors, is_distributed=False)
    checkpoint["state_dict"] = tensors
    return checkpoint


def make_checkpoint(weights: dict[str, Tensor], **entry: Any) -> dict[str, Any]:
    """Return a checkpoint that contains weights only, in the form of :func:`read_checkpoint`.

    Args:
        weights: Tensors by the decoder's parameter names.
        entry: Values of the entry `ropepp_lit`; the default is None, and 0 for `tokens_seen`.
    """
    empty: dict[str, Any] = dict.fromkeys(("optimizer", "recipe", "tokenizer", "bos_token_id", "eos_token_id"))
    empty |= dict.fromkeys(("context_length", "origin"))
    return {
        "state_dict": {WEIGHTS_PREFIX + name: value for name, value in weights.items()},
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        KEY: {"format_version": FORMAT_VERSION, **empty, "tokens_seen": 0, "validation": {}, **entry},
    }


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint file atomically.

    Raises:
        UsageError: the file exists or cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path}: already exists; name another file")
    partial = path.with_name(f".{path.name}.partial")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(checkpoint, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def save_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint to a file tensor by tensor, without a copy in memory, and fsync it.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # torch's archive writer fails a second time when it closes a file that it could not write. The first error
            # is the cause: a full disk, or Ctrl-C.
            cause = error.__context__
            raise cause if isinstance(cause, OSError | KeyboardInterrupt) else error from None
        file.flush()
        sync(file.fileno())


def decoder_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the decoder's tensors by the decoder's parameter names."""
    return {
        name.removeprefix(WEIGHTS_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX)
    }


def compute_dtype(checkpoint: dict[str, Any]) -> torch.dtype:
    """Return the compute dtype of a checkpoint's decoder: that of most elements of the matrices in its blocks.

    Hugging Face folders may store norms or the output layer in a wider dtype; a product needs one dtype.

    Raises:
        UsageError: there are no matrices.
    """
    counts: dict[torch.dtype, int] = {}
    for name, value in decoder_weights(checkpoint).items():
        if ".layers." in name and value.dim() > 1:
            counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    if not counts:
        raise UsageError("the checkpoint has no weights of layers")
    return max(counts, key=lambda dtype: (counts[dtype], dtype.itemsize))


def check_depth(config: DecoderConfig, weights: dict[str, Tensor]) -> None:
    """Check that there are weights for all layers, before a decoder is built; a file may state any number of layers.

    Args:
        config: Geometry stated in a file.
        weights: Tensors by the decoder's parameter names.

    Raises:
        UsageError: a layer has no weights.
    """
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    missing = next((layer for layer in range(config.num_hidden_layers) if str(layer) not in layers), None)
    if missing is not None:
        raise UsageError(
            f"num_hidden_layers is {config.num_hidden_layers:,}, and there is no weight of layer {missing}"
        )


def geometry_of(checkpoint: dict[str, Any]) -> DecoderConfig:
    """Return the geometry of a checkpoint's decoder.

    Raises:
        UsageError: it has a field that this version does not know, or an invalid size.
    """
    try:
        return DecoderConfig(**checkpoint[KEY]["architecture"]["decoder"])
    except TypeError as error:
        raise UsageError(f"the checkpoint's decoder is not one that this version knows ({error})") from error


def load_decoder(
    checkpoint: dict[str, Any],
    *,
    trust: str | None = None,
    dtype: torch.dtype | None = None,
    keep_dtypes: bool = False,
) -> Decoder:
    """Build a checkpoint's decoder, with its weights, on the CPU.

    Args:
        checkpoint: Result of :func:`read_checkpoint`.
        trust: `module.Class` of a custom position scheme or frequencies that may be imported.
        dtype: Dtype of the parameters; None means :func:`compute_dtype`.
        keep_dtypes: Keep the dtype in which each parameter is stored instead.

    Raises:
        UsageError: the checkpoint requires a custom class that is not trusted or cannot be imported, or its weights do
            not match its architecture.
    """
    architecture, config = checkpoint[KEY]["architecture"], geometry_of(checkpoint)
    check_depth(config, decoder_weights(checkpoint))
    scheme = instantiate(architecture["positions"], PositionScheme, trust=trust)
    frequencies = instantiate(architecture["frequencies"], Frequencies, trust=trust)
    try:
        with torch.device("meta"):
            decoder = Decoder(config, scheme, frequencies)
    except (RuntimeError, OverflowError) as error:  # sizes overflow
        raise UsageError(f"the checkpoint's decoder is too large ({error})") from error
    try:
        decoder.load_state_dict(decoder_weights(checkpoint), assign=True)
    except RuntimeError as error:  # its first line only names the class
        problem = str(error).splitlines()[1:2] or [str(error)]
        raise UsageError(f"the checkpoint's weights do not fit its architecture: {problem[0].strip()}") from error
    if decoder.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    if not keep_dtypes:
        dtype = dtype or compute_dtype(checkpoint)
        for parameter in decoder.parameters():
            parameter.data = parameter.data.to(dtype)
    return decoder.eval()


def describe_architecture(config: DecoderConfig, scheme: PositionScheme, frequencies: Frequencies) -> dict[str, Any]:
    """Return the entry `architecture`, plain values from which :func:`load_decoder` builds the same decoder."""
    return {"decoder": config.to_dict(), "positions": describe(scheme), "frequencies": describe(frequencies)}


def describe(instance: object) -> dict[str, Any]:
    """Return `class_path` and `init_args` of an object whose attributes are named as its keyword-only arguments."""
    arguments: dict[str, None] = {}
    for kind in type(instance).__mro__[:-1]:
        if "__init__" in vars(kind):
            parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            arguments |= {p.name: None for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                break  # otherwise the remaining arguments are passed to the base class
    return {
        "class_path": f"{type(instance).__module__}.{type(instance).__qualname__}",
        "init_args": {name: getattr(instance, name) for name in arguments},
    }


def instantiate(description: dict[str, Any], base: type[T], *, trust: str | None = None) -> T:
    """Instantiate the object that :func:`describe` described.

    Args:
        description: `class_path` and `init_args`.
        base: Required base class.
        trust: `module.Class` that may be imported although it is not part of ropepp-lit.

    Raises:
        UsageError: the class is not trusted, cannot be imported, or does not accept the arguments.
    """
    class_path = description["class_path"]
    module, _, name = class_path.rpartition(".")
    if module.startswith("ropepp_lit.nn."):
        class_path = f"ropepp_lit.nn.{name}"  # public classes, whose modules may differ between versions
    elif class_path != trust:
        raise UsageError(
            f"the checkpoint was made with {class_path}, which is not part of ropepp-lit; "
            f"if you trust that code and it can be imported here, generate and evaluate take --trust {class_path}"
        )
    kind = import_class(class_path, base)
    try:
        return kind(**description["init_args"])
    except TypeError as error:
        raise UsageError(f"the checkpoint's {class_path} does not accept its arguments ({error})") from error


def import_class(class_path: str, base: type[T]) -> type[T]:
    """Import a class by its path `module.Class`.

    Args:
        class_path: The path.
        base: Required base class.

    Raises:
        UsageError: it cannot be imported, or is not a subclass of `base`.
    """
    module, _, name = class_path.rpartition(".")
    if not module or module.startswith("."):
        raise UsageError(f"{class_path!r} is not the name of a class with its module, such as my_file.MyClass")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{class_path}: cannot be imported ({error}); run in the folder of its file") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise UsageError(f"{class_path} is not a {base.__name__}")
    return kind
