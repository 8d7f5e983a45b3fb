"""What our checkpoints hold beside Lightning's state, and how they are read.

A checkpoint is Lightning's, plus one entry `ropepp_lit` of plain dicts, lists, strings and tensors, so that
`torch.load(weights_only=True)` reads it:

| key                 | value                                                                                   |
|---------------------|-----------------------------------------------------------------------------------------|
| `format_version`    | 1                                                                                       |
| `architecture`      | `decoder` (geometry), `positions` and `frequencies` (each `class_path`, `init_args`)    |
| `context_length`    | tokens that the model was made to read at once, or None                                 |
| `optimizer`         | class name of the optimizer's settings: `AdamW` or `Muon`; None where there is no state |
| `recipe`            | the whole recipe of the run, or None where it was not started by the command            |
| `origin`            | what the weights began from, or None where they were random                             |
| `tokens_seen`       | tokens that all ranks have read since the run began                                     |
| `skipped_steps`     | steps that were skipped as their loss or gradients were NaN or infinite, or absent      |
| `train_loss`        | sums of the training loss since it was last logged, or absent: `nats` and `tokens`;     |
|                     | of pairs of answers `tokens` are pairs, and `rewards` is there too                      |
| `validation`        | what the newest validation found, by set                                                |
| `tokenizer`         | the tokenizer's JSON, or None                                                           |
| `bos_token_id`      | the token that is named as the beginning of texts, or None                              |
| `eos_token_id`      | what ends a document, or None                                                           |
| `opening`           | token ids before every text; absent or None means `bos_token_id`                        |
| `held_out`          | a checksum of each validation set's documents, by set, or absent                        |
| `tokenizer_config`  | the tokenizer's settings in Hugging Face's JSON, or absent; the data's chat template    |
| `generation_config` | Hugging Face's settings of generation in JSON, or absent; with the data's ends of turns |
| `adapter`           | what was trained beside which base (:mod:`ropepp_lit.hf.adapters`), or absent           |
| `reference`         | log-probabilities by the model that preference tuning began with                        |
|                     | (:class:`ropepp_lit.train.pair_training.Reference`), or absent                          |
| `card`              | licence and base model that a Hugging Face folder's README.md states, or absent         |
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
"""What stands before the names of weights in a folder of shards."""

WEIGHTS_PREFIX = "decoder."
"""What the LightningModule puts before the decoder's parameter names."""


def read_checkpoint(path: str | Path, *, shapes_only: bool = False, checksums: bool = False) -> dict[str, Any]:
    """Read a checkpoint without running anything that it holds; tensors stay on disk until they are used.

    Args:
        path: A .ckpt file, or a .ckpt folder of shards.
        shapes_only: Of a folder of shards, leave the weights on the disk and give tensors without content.
        checksums: Compare a file with the checksums in it, for which all of it is read (0.2 s per GB). Shards are
            compared whenever they are read.

    Raises:
        UsageError: no such file, not a checkpoint of ours, or damaged.
    """
    path = Path(path)
    if is_sharded(path):
        if checksums:
            check_pickled(path / SHARDED_METADATA)
        return _check_entry(path, _read_sharded(path, shapes_only), are_shapes=shapes_only)
    if path.is_dir():
        newest = [found for found in (path / "last.ckpt", path / "checkpoints" / "last.ckpt") if found.exists()]
        what = f"name {newest[0]}" if newest else "name a .ckpt file, or a folder in Hugging Face's format"
        raise UsageError(f"{path}: a folder, not a checkpoint; {what}")
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
    found = ours.get("format_version")
    if found != FORMAT_VERSION:
        raise UsageError(f"{path}: format_version {found}, and this version of ropepp-lit reads {FORMAT_VERSION}")
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
        weights: Tensors by their names in the checkpoint, changed in place; of a DTensor this rank's part is read.
        is_distributed: Whether all ranks call this together; then an error of one is raised on all.

    Raises:
        UsageError: a shard is damaged or missing, or does not have such a tensor.
    """
    state = {_STATE_DICT + name: value for name, value in weights.items()}
    load_sharded_state(path, state, is_distributed=is_distributed)


def _read_sharded(path: Path, shapes_only: bool) -> dict[str, Any]:
    """What a folder of shards stores, weights assembled in memory; optimizer states are left on the disk."""
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
    """A checkpoint of weights alone, as :func:`read_checkpoint` would return it.

    Args:
        weights: By the decoder's own names.
        entry: Values of the entry `ropepp_lit`; those left out are None, `tokens_seen` is 0.
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
    """Write a checkpoint, which appears under its name only when it is complete.

    Raises:
        UsageError: there is a file of that name, or no room.
    """
    if path.exists():
        raise UsageError(f"{path}: there already; name another file")
    partial = path.with_name(f".{path.name}.partial")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(checkpoint, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def save_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint's tensors to a file one after the other, without a copy of the whole in memory, and fsync it.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # torch's archive writer fails again when it closes a file that it could not write. The cause comes before:
            # a full disk, or Ctrl-C.
            cause = error.__context__
            raise cause if isinstance(cause, OSError | KeyboardInterrupt) else error from None
        file.flush()
        sync(file.fileno())


def decoder_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The decoder's parameters by the decoder's own names."""
    return {
        name.removeprefix(WEIGHTS_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX)
    }


def compute_dtype(checkpoint: dict[str, Any]) -> torch.dtype:
    """The dtype in which a checkpoint's decoder computes: that of most elements of its blocks' matrices.

    Others' folders store norms or the output layer in a wider dtype than the rest; a product needs one dtype.

    Raises:
        UsageError: there are none.
    """
    counts: dict[torch.dtype, int] = {}
    for name, value in decoder_weights(checkpoint).items():
        if ".layers." in name and value.dim() > 1:
            counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    if not counts:
        raise UsageError("the checkpoint has no weights of layers")
    return max(counts, key=lambda dtype: (counts[dtype], dtype.itemsize))


def check_depth(config: DecoderConfig, weights: dict[str, Tensor]) -> None:
    """Find out before a decoder is built that there are no weights for its layers; a file may state any number.

    Args:
        config: Geometry that a file states.
        weights: By the decoder's own names.

    Raises:
        UsageError: a layer has none.
    """
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    missing = next((layer for layer in range(config.num_hidden_layers) if str(layer) not in layers), None)
    if missing is not None:
        raise UsageError(
            f"num_hidden_layers is {config.num_hidden_layers:,}, and there is no weight of layer {missing}"
        )


def geometry_of(checkpoint: dict[str, Any]) -> DecoderConfig:
    """The geometry of the decoder that a checkpoint holds.

    Raises:
        UsageError: it has a field that this version does not know, or a size that cannot be.
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
    """Build the decoder that a checkpoint holds, with its weights, on the CPU.

    Args:
        checkpoint: Of :func:`read_checkpoint`.
        trust: `module.Class` of a position scheme or frequencies that are not ours and may be imported.
        dtype: Of the parameters; empty means :func:`compute_dtype`.
        keep_dtypes: Leave each parameter in the dtype that it is stored in instead.

    Raises:
        UsageError: the checkpoint names a foreign class that is not trusted or cannot be imported.
    """
    architecture, config = checkpoint[KEY]["architecture"], geometry_of(checkpoint)
    check_depth(config, decoder_weights(checkpoint))
    scheme = instantiate(architecture["positions"], PositionScheme, trust=trust)
    frequencies = instantiate(architecture["frequencies"], Frequencies, trust=trust)
    try:
        with torch.device("meta"):
            decoder = Decoder(config, scheme, frequencies)
    except (RuntimeError, OverflowError) as error:  # beyond what can be counted
        raise UsageError(f"the checkpoint's decoder is too large ({error})") from error
    try:
        decoder.load_state_dict(decoder_weights(checkpoint), assign=True)
    except RuntimeError as error:  # its first line names the class alone
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
    """The entry `architecture`: plain values from which :func:`load_decoder` builds the same decoder."""
    return {"decoder": config.to_dict(), "positions": describe(scheme), "frequencies": describe(frequencies)}


def describe(instance: object) -> dict[str, Any]:
    """`class_path` and `init_args` of an object whose attributes bear the names of its keyword-only arguments."""
    arguments: dict[str, None] = {}
    for kind in type(instance).__mro__[:-1]:
        if "__init__" in vars(kind):
            parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            arguments |= {p.name: None for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                break  # else the rest goes on to the class it derives from
    return {
        "class_path": f"{type(instance).__module__}.{type(instance).__qualname__}",
        "init_args": {name: getattr(instance, name) for name in arguments},
    }


def instantiate(description: dict[str, Any], base: type[T], *, trust: str | None = None) -> T:
    """Make the object that :func:`describe` wrote down.

    Args:
        description: `class_path` and `init_args`.
        base: What it must be.
        trust: `module.Class` that may be imported although it is not ours.
    """
    class_path = description["class_path"]
    module, _, name = class_path.rpartition(".")
    if module.startswith("ropepp_lit.nn."):
        class_path = f"ropepp_lit.nn.{name}"  # its public classes, wherever a version of it keeps them
    elif class_path != trust:
        raise UsageError(
            f"the checkpoint was made with {class_path}, which is not part of ropepp-lit; "
            f"if you trust that code and it can be imported here, generate and evaluate take --trust {class_path}"
        )
    found = import_class(class_path, base)
    try:
        return found(**description["init_args"])
    except TypeError as error:
        raise UsageError(f"the checkpoint's {class_path} does not take its settings ({error})") from error


def import_class(class_path: str, base: type[T]) -> type[T]:
    """The class that `module.Class` names.

    Args:
        class_path: The name.
        base: What the class must derive from.

    Raises:
        UsageError: it cannot be imported, or is something else.
    """
    module, _, name = class_path.rpartition(".")
    if not module or module.startswith("."):
        raise UsageError(f"{class_path!r} is not the name of a class with its module, such as my_file.MyClass")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{class_path}: cannot be imported ({error}); run where its file is") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(f"{class_path} is not a {base.__name__}")
    return found
