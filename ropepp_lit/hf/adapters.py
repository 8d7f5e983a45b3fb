"""Checkpoints of adapters: verification of the base model, merging, and export to peft's format.

An adapter checkpoint stores only the weights that were trained with a frozen base model (:mod:`ropepp_lit.nn.lora`).
Its entry `ropepp_lit` has a dict `adapter`:

| key           | value                                                                         |
|---------------|-------------------------------------------------------------------------------|
| `lora`        | settings of :class:`~ropepp_lit.nn.lora.LoRA`                                 |
| `base`        | base model as specified in the run: a path, or a repository of the Hub        |
| `fingerprint` | fingerprint of the base model, see :func:`fingerprint`                        |
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ropepp_lit.checkpoint import KEY, WEIGHTS_PREFIX, decoder_weights
from ropepp_lit.errors import UsageError
from ropepp_lit.files import whole_folder
from ropepp_lit.hf.layouts import CONFIG, is_hub_name
from ropepp_lit.json_files import fits
from ropepp_lit.nn.lora import LoRA

_ELEMENTS = 64
"""Number of elements of each tensor in a fingerprint."""

_FINGERPRINT = "fingerprint"
"""Key of the fingerprint in a merged checkpoint in memory."""


def fingerprint(checkpoint: dict[str, Any]) -> str:
    """Return a SHA-256 over the names, shapes and dtypes of all tensors, and 64 elements of each.

    The elements are evenly spaced and include the first and the last, so that only a small part of a file is read. The
    fingerprint does not depend on path, format and settings: a Hugging Face folder and its import have the same one.
    The fingerprint of a merged model is computed from those of its base and of its adapters, because the rounding of
    the merged weights can differ between machines.

    Args:
        checkpoint: Checkpoint with weights, from :func:`~ropepp_lit.hf.folder.open_checkpoint`.
    """
    if _FINGERPRINT in checkpoint:
        return checkpoint[_FINGERPRINT]
    digest = hashlib.sha256()
    for name, value in sorted(decoder_weights(checkpoint).items()):
        if name == "lm_head.weight" and checkpoint[KEY]["architecture"]["decoder"].get("tie_word_embeddings"):
            continue  # not stored in every format
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        elements = value.detach().flatten()
        count = min(len(elements), _ELEMENTS)
        indices = torch.arange(count) * (len(elements) - 1) // max(count - 1, 1)
        digest.update(elements[indices].view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def is_adapter(checkpoint: dict[str, Any]) -> bool:
    """Return whether a checkpoint stores only adapters."""
    return checkpoint[KEY].get("adapter") is not None


def settings_of(checkpoint: dict[str, Any], path: str | Path) -> LoRA:
    """Return the settings of a checkpoint's adapters.

    Raises:
        UsageError: The settings are damaged, or were written by a later version.
    """
    try:
        settings = checkpoint[KEY]["adapter"]["lora"]
        hints = get_type_hints(LoRA.__init__)
        if wrong := [name for name, value in settings.items() if name in hints and not fits(value, hints[name])]:
            raise TypeError(wrong[0])
        return LoRA(**settings)
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: damaged: its entry 'adapter' is not one that this version knows") from error


def check_base(checkpoint: dict[str, Any], path: str | Path, base: dict[str, Any], base_path: str | Path) -> None:
    """Raise UsageError if adapters were trained on another base.

    Args:
        checkpoint: Checkpoint with the adapters.
        path: Path of the checkpoint, for messages.
        base: Base model, from :func:`~ropepp_lit.hf.folder.open_checkpoint`.
        base_path: Path of the base model, for messages.
    """
    if checkpoint[KEY]["adapter"].get("fingerprint") != fingerprint(base):
        raise UsageError(
            f"{path}: its adapters were trained on another base than {base_path}; name the base that was trained on"
        )


def merge(
    checkpoint: dict[str, Any], path: str | Path, base: dict[str, Any], *, shapes_only: bool = False
) -> dict[str, Any]:
    """Merge adapters with their base into a checkpoint of the full model, without optimizer state.

    Each weight is merged in float32 by peft, and rounded to the dtype of the base.

    Args:
        checkpoint: Checkpoint with the adapters.
        path: Path of the checkpoint, for messages.
        base: Base model, from :func:`~ropepp_lit.hf.folder.open_checkpoint`.
        shapes_only: Whether to skip merging and keep the weights of the base, which may be meta tensors.

    Raises:
        UsageError: The adapters do not fit the base or contain NaN, or peft is not installed.
    """
    lora, adapter_entry, weights = settings_of(checkpoint, path), checkpoint[KEY], decoder_weights(base)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in decoder_weights(checkpoint).items():
        layer, part = _split(name)
        weight = weights.get(f"{layer}.weight")
        if weight is None or (part == "weight" and weight.shape != value.shape):
            raise UsageError(f"{path}: its tensor {name} does not match any weight of the base")
        layers.setdefault(layer, {})[part] = value
    if not layers:
        raise UsageError(f"{path}: damaged: it stores no adapters")
    for layer, parts in layers.items() if not shapes_only else ():
        weight = weights[f"{layer}.weight"]
        try:
            weights[f"{layer}.weight"] = merge_layer(lora, weight, parts, head_dim=_head_dim(adapter_entry))
        except (RuntimeError, KeyError, ValueError) as error:  # wrong shapes, or NaN (from peft)
            raise UsageError(f"{path}: its adapters of {layer} cannot be merged ({error})") from error
    if adapter_entry["architecture"]["decoder"].get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    merged = {
        "state_dict": {WEIGHTS_PREFIX + name: value for name, value in weights.items()},
        "global_step": checkpoint["global_step"],
        KEY: {**{key: value for key, value in adapter_entry.items() if key != "adapter"}, "optimizer": None},
    }
    if not shapes_only:
        digest = hashlib.sha256(f"{fingerprint(base)} {fingerprint(checkpoint)}".encode()).hexdigest()
        merged[_FINGERPRINT] = f"sha256:{digest}"
    return merged


def _head_dim(entry: dict[str, Any]) -> int:
    return entry["architecture"]["decoder"]["head_dim"]


def _split(name: str) -> tuple[str, str]:
    """Split a name into the layer and its tensor, such as `lora_A.weight`, `imaginary` or `weight`."""
    layer, dot, part = name.partition(".lora_")
    return (layer, f"lora_{part}") if dot else (name.rpartition(".")[0], name.rpartition(".")[2])


def merge_layer(lora: LoRA, weight: Tensor, parts: dict[str, Tensor], *, head_dim: int) -> Tensor:
    """Merge the adapters of a linear layer into its weight, in float32, and round the result to the weight's dtype.

    Args:
        lora: Settings of the adapters.
        weight: Weight of the base, [out, in].
        parts: Trained tensors of the layer by their names in checkpoints (`lora_A.weight`, `imaginary`, …); modified.
        head_dim: Head size, for `imaginary`.

    Raises:
        ValueError: The tensors do not match the settings.
        RuntimeError: The shapes do not match.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    merged = parts.pop("weight", weight).to(dtype, copy=True)
    imaginary = parts.pop("imaginary", None)
    if parts:
        config = lora.peft_config()
        from peft import inject_adapter_in_model

        config.target_modules = {"layer"}
        module_dict: Any = nn.ModuleDict(
            {"layer": nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")}
        )
        inject_adapter_in_model(config, module_dict)
        layer = module_dict["layer"]
        required = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector.weight"] if lora.dora else [])]
        if sorted(parts) != required:
            raise ValueError(f"it stores {', '.join(sorted(parts))} instead of {', '.join(required)}")
        layer.base_layer.weight = nn.Parameter(merged)
        for part, value in parts.items():
            module = getattr(layer, part.partition(".")[0])["default"]
            if module.weight.shape != value.shape:
                raise ValueError(f"{part} has the shape {tuple(value.shape)} instead of {tuple(module.weight.shape)}")
            module.weight = nn.Parameter(value.to(dtype))
        with torch.no_grad():
            layer.merge(safe_merge=True)
        merged = layer.base_layer.weight.data
    if imaginary is not None:
        columns = merged.unflatten(-1, (-1, 2, head_dim))[..., 1, :]  # a view
        columns += imaginary.to(dtype).unflatten(-1, (-1, head_dim))
    return merged.to(weight.dtype)


def write_peft(checkpoint: dict[str, Any], path: str | Path, out: Path) -> None:
    """Write adapters in peft's format, for `PeftModel.from_pretrained` with the exported base.

    Args:
        checkpoint: Checkpoint from :func:`~ropepp_lit.checkpoint.read_checkpoint`.
        path: Path of the checkpoint, for messages.
        out: Output folder; must not exist, or be empty.

    Raises:
        UsageError: The checkpoint stores a full model or fully trained weights, or the folder cannot be written.
    """
    if not is_adapter(checkpoint):
        raise UsageError(f"adapter: {path} stores a full model; write it as a folder by: ropepp-lit export {path} OUT")
    lora, base = settings_of(checkpoint, path), checkpoint[KEY]["adapter"]["base"]
    if lora.train_fully:
        raise UsageError(
            f"adapter: {path} trained {', '.join(lora.train_fully)} fully, which peft's LoRA format does not support; "
            f"write the merged model by: ropepp-lit export {path} OUT"
        )
    config = lora.peft_config()
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    if is_hub_name(base) or (Path(base) / CONFIG).is_file():
        config.base_model_name_or_path = base
    tensors = {
        f"base_model.model.{name.removesuffix('.weight') if 'magnitude' in name else name}": value.contiguous()
        for name, value in decoder_weights(checkpoint).items()
    }
    with whole_folder(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
