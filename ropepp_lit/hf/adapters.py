"""Checkpoints of adapters: how their base is known again, the model that both make, and peft's own format.

Such a checkpoint stores the weights that were trained beside a frozen base (:mod:`ropepp_lit.nn.lora`), and in its
entry `ropepp_lit` under `adapter`:

| key           | value                                                            |
|---------------|------------------------------------------------------------------|
| `lora`        | settings of :class:`~ropepp_lit.nn.lora.LoRA`                    |
| `base`        | the base, as the run was given it: a path, or a name on the Hub  |
| `fingerprint` | of the base, by :func:`fingerprint`                              |
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
"""Of each tensor in a fingerprint."""

_FINGERPRINT = "fingerprint"
"""Key of an opened checkpoint whose weights are those of a base and adapters together."""


def fingerprint(checkpoint: dict[str, Any]) -> str:
    """What tells a base from another: SHA-256 over the names, shapes and dtypes of all tensors and 64 elements of each.

    The elements are evenly spaced, the first and the last among them, so that little is read of a file. The base's
    path, format and settings do not matter: a Hugging Face folder and its import are the same. That of a model which
    was merged is made of the fingerprints of its base and of its adapters, because sums may be rounded differently
    elsewhere.

    Args:
        checkpoint: Of :func:`~ropepp_lit.hf.folder.open_checkpoint`, with weights.
    """
    if _FINGERPRINT in checkpoint:
        return checkpoint[_FINGERPRINT]
    digest = hashlib.sha256()
    for name, value in sorted(decoder_weights(checkpoint).items()):
        if name == "lm_head.weight" and checkpoint[KEY]["architecture"]["decoder"].get("tie_word_embeddings"):
            continue  # not in every format
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        elements = value.detach().flatten()
        count = min(len(elements), _ELEMENTS)
        places = torch.arange(count) * (len(elements) - 1) // max(count - 1, 1)
        digest.update(elements[places].view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def is_adapter(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint stores adapters alone."""
    return checkpoint[KEY].get("adapter") is not None


def settings_of(checkpoint: dict[str, Any], path: str | Path) -> LoRA:
    """The settings of a checkpoint's adapters.

    Raises:
        UsageError: they are damaged, or of a later version.
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
    """Raise UsageError where adapters were trained on another base.

    Args:
        checkpoint: With the adapters.
        path: Of it.
        base: As :func:`~ropepp_lit.hf.folder.open_checkpoint` returns it.
        base_path: Of it.
    """
    if checkpoint[KEY]["adapter"].get("fingerprint") != fingerprint(base):
        raise UsageError(
            f"{path}: its adapters were trained on another base than {base_path}; name the one that they belong to"
        )


def merge(
    checkpoint: dict[str, Any], path: str | Path, base: dict[str, Any], *, shapes_only: bool = False
) -> dict[str, Any]:
    """A checkpoint of the whole model that adapters and their base make; without state of the optimizer.

    Each weight is merged in float32, by peft, and rounded to the base's dtype.

    Args:
        checkpoint: With the adapters.
        path: Of it.
        base: As :func:`~ropepp_lit.hf.folder.open_checkpoint` returns it.
        shapes_only: Leave the base's weights as they are, which may be without content.

    Raises:
        UsageError: the adapters do not fit the base, or contain NaN; peft is not installed.
    """
    lora, ours, weights = settings_of(checkpoint, path), checkpoint[KEY], decoder_weights(base)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in decoder_weights(checkpoint).items():
        layer, part = _split(name)
        weight = weights.get(f"{layer}.weight")
        if weight is None or (part == "weight" and weight.shape != value.shape):
            raise UsageError(f"{path}: its tensor {name} belongs to no weight of its base")
        layers.setdefault(layer, {})[part] = value
    if not layers:
        raise UsageError(f"{path}: damaged: it stores no adapters")
    for layer, parts in layers.items() if not shapes_only else ():
        weight = weights[f"{layer}.weight"]
        try:
            weights[f"{layer}.weight"] = merge_layer(lora, weight, parts, head_dim=_head_dim(ours))
        except (RuntimeError, KeyError, ValueError) as error:  # shapes that do not fit; peft's of NaN
            raise UsageError(f"{path}: its adapters of {layer} cannot be merged ({error})") from error
    if ours["architecture"]["decoder"].get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    merged = {
        "state_dict": {WEIGHTS_PREFIX + name: value for name, value in weights.items()},
        "global_step": checkpoint["global_step"],
        KEY: {**{key: value for key, value in ours.items() if key != "adapter"}, "optimizer": None},
    }
    if not shapes_only:
        digest = hashlib.sha256(f"{fingerprint(base)} {fingerprint(checkpoint)}".encode()).hexdigest()
        merged[_FINGERPRINT] = f"sha256:{digest}"
    return merged


def _head_dim(entry: dict[str, Any]) -> int:
    return entry["architecture"]["decoder"]["head_dim"]


def _split(name: str) -> tuple[str, str]:
    """A layer, and which of its tensors this is, such as `lora_A.weight`, `imaginary` or `weight`."""
    layer, dot, part = name.partition(".lora_")
    return (layer, f"lora_{part}") if dot else (name.rpartition(".")[0], name.rpartition(".")[2])


def merge_layer(lora: LoRA, weight: Tensor, parts: dict[str, Tensor], *, head_dim: int) -> Tensor:
    """The weight of a linear layer with its adapters, computed in float32 and rounded to its own dtype.

    Args:
        lora: Settings of the adapters.
        weight: [out, in], of the base.
        parts: The layer's trained tensors by name, as checkpoints call them: `lora_A.weight`, `imaginary`, …; emptied.
        head_dim: D, for `imaginary`.

    Raises:
        ValueError: the tensors are not those of these settings.
        RuntimeError: shapes that do not fit.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    merged = parts.pop("weight", weight).to(dtype, copy=True)
    imaginary = parts.pop("imaginary", None)
    if parts:
        config = lora.peft_config()
        from peft import inject_adapter_in_model

        config.target_modules = {"layer"}
        holder: Any = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")})
        inject_adapter_in_model(config, holder)
        layer = holder["layer"]
        needed = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector.weight"] if lora.dora else [])]
        if sorted(parts) != needed:
            raise ValueError(f"it stores {', '.join(sorted(parts))} and not {', '.join(needed)}")
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
    """Write adapters in peft's own format, which `PeftModel.from_pretrained` loads over the exported base.

    Args:
        checkpoint: Of :func:`~ropepp_lit.checkpoint.read_checkpoint`.
        path: Of it.
        out: The folder; must not exist, or be empty.

    Raises:
        UsageError: the checkpoint stores a whole model, or more than adapters; the folder cannot be written.
    """
    if not is_adapter(checkpoint):
        raise UsageError(f"adapter: {path} stores a whole model; write it as a folder by: ropepp-lit export {path} OUT")
    lora, base = settings_of(checkpoint, path), checkpoint[KEY]["adapter"]["base"]
    if lora.train_fully:
        raise UsageError(
            f"adapter: {path} trained {', '.join(lora.train_fully)} fully, which is no part of peft's format for LoRA; "
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
