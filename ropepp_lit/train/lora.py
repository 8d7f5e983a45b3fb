"""LoRA in a training run: checks of its options, the weights its checkpoints store, and their base model."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ropepp_lit.checkpoint import KEY, WEIGHTS_PREFIX
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.adapters import fingerprint, is_adapter, settings_of
from ropepp_lit.hf.folder import open_base, open_checkpoint
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, PositionScheme
from ropepp_lit.nn.lora import LoRA, inject, trained_names
from ropepp_lit.train.optimizer import Muon, OptimizerConfig


class Adapters:
    """Additions of LoRA to a run; does nothing without LoRA.

    Args:
        lora: LoRA settings; None means that all weights train.
    """

    def __init__(self, lora: LoRA | None) -> None:
        self.lora = lora
        self.base_fingerprint: str | None = None
        """Fingerprint of the base weights; set by the command before the run."""
        self._seed = torch.initial_seed()

    def seed_dropout(self, rank: int, batch_idx: int) -> None:
        """Seed the dropout of a micro-batch by rank and index only, so that a resumed run is exact.

        Args:
            rank: Rank of the process.
            batch_idx: Index of the micro-batch in the run.
        """
        if self.lora is not None and self.lora.dropout:
            digest = hashlib.sha256(f"{self._seed} {rank} {batch_idx}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def save(self, module: nn.Module, checkpoint: dict[str, Any], *, base: str | None) -> None:
        """Reduce a LightningModule's checkpoint to the trained weights, and add the entry that identifies the base."""
        if self.lora is not None:
            checkpoint["state_dict"] = trained_weights(module, checkpoint["state_dict"])
            checkpoint[KEY]["adapter"] = adapter_entry(self.lora, str(base), self.base_fingerprint)

    def load(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Rename the weights of a checkpoint to those of a LightningModule."""
        if self.lora is not None and "state_dict" in checkpoint:
            checkpoint["state_dict"] = own_weights(module, checkpoint["state_dict"])


def check_options(
    lora: LoRA,
    decoder: Decoder,
    *,
    optimizer: OptimizerConfig,
    precision: str,
    mlp_chunk_tokens: int | None,
    attention_head_groups: int,
    init_optimizer: bool,
    shards_checkpoint: bool,
) -> None:
    """Check that LoRA supports the other options.

    Args:
        lora: LoRA settings.
        decoder: Decoder without adapters; may be on the meta device.
        optimizer: Optimizer of the recipe.
        precision: Precision of the trainer, such as `bf16-mixed`.
        mlp_chunk_tokens: Option of :class:`~ropepp_lit.train.causal_lm.CausalLM`.
        attention_head_groups: Likewise.
        init_optimizer: Likewise.
        shards_checkpoint: Whether checkpoints are folders of shards.

    Raises:
        UsageError: LoRA does not support one of them, or peft is not installed.
    """
    lora.check(decoder.scheme)
    lora.peft_config()  # raises if peft is not installed
    if isinstance(optimizer, Muon):
        raise UsageError(
            "model.optimizer: Muon orthogonalizes whole matrices, and those of LoRA are factors of one; use AdamW"
        )
    if precision in ("bf16-true", "16-true"):
        raise UsageError(
            f"trainer.precision: {precision} would round the adapters; use 32-true with model.lora.base_dtype "
            "bfloat16, or bf16-mixed"
        )
    if attention_head_groups > 1:
        raise UsageError(
            "model.attention_head_groups: splits the weights of whole layers, which does not work with model.lora; set "
            "it to 1"
        )
    if lora.dropout and mlp_chunk_tokens is not None:
        raise UsageError(
            "model.lora.dropout: mlp_chunk_tokens would compute other random numbers again; leave out one of them"
        )
    if init_optimizer:
        raise UsageError(
            "model.init_optimizer: the state of model.init_from belongs to all of its weights, which model.lora "
            "freezes; leave it out"
        )
    if shards_checkpoint:
        raise UsageError(
            "trainer.strategy.save_distributed_checkpoint: adapters are saved in one file; leave it false with "
            "model.lora"
        )


def trained_shapes(decoder: Decoder, lora: LoRA | None) -> dict[str, torch.Size]:
    """Return the shapes of the weights that a run's checkpoints store, by name.

    Args:
        decoder: Decoder without adapters.
        lora: LoRA settings; None means that all weights train.
    """
    if lora is None:
        return {name: value.shape for name, value in decoder.state_dict().items()}
    with torch.device("meta"):
        adapted = Decoder(decoder.config, decoder.scheme, decoder.frequencies)
        inject(adapted, lora)
    parameters = dict(adapted.named_parameters())
    return {name: parameters[own].shape for name, own in trained_names(adapted).items()}


def continue_adapters(
    checkpoint: dict[str, Any], path: str, lora: LoRA | None, init_from: str | None
) -> tuple[str | None, str | None]:
    """Check that a run with these settings can continue from a checkpoint, and that the base of its adapters matches.

    Args:
        checkpoint: Result of :func:`~ropepp_lit.checkpoint.read_checkpoint`.
        path: Path of the checkpoint.
        lora: LoRA settings of the recipe.
        init_from: `init_from` of the recipe: with adapters, the path of the base if it has moved.

    Returns:
        The path of the base (`init_from`, or else as stored in the checkpoint) and its fingerprint; `init_from` and
        None for a full model.

    Raises:
        UsageError: the recipe trains other weights than the checkpoint stores, or the base does not match or cannot be
            read.
    """
    if not is_adapter(checkpoint):
        if lora is not None:
            raise UsageError(
                f"ckpt_path: {path} stores a full model, and model.lora trains adapters; initialize from its weights "
                f"by --model.init_from {path}, or leave model.lora out"
            )
        return init_from, None
    stored = settings_of(checkpoint, path)
    if lora is None:
        raise UsageError(
            f"ckpt_path: {path} stores adapters, and the recipe has no model.lora; use the recipe.yaml of its run, or "
            f"train the merged model by --model.init_from {path}"
        )
    changes = [
        f"{key} {old} → {new}"
        for (key, old), new in zip(stored.to_dict().items(), lora.to_dict().values(), strict=True)
        if old != new and key not in ("dropout", "base_dtype")
    ]
    if changes:
        raise UsageError(f"model.lora: {path} stores other adapters ({', '.join(changes)}); use the same settings")
    open_base(checkpoint, path, base=init_from)
    entry = checkpoint[KEY]["adapter"]
    return init_from or entry["base"], entry["fingerprint"]


def adapter_entry(lora: LoRA, base: str, digest: str | None) -> dict[str, Any]:
    """Return the entry `adapter` of a checkpoint, see :mod:`ropepp_lit.hf.adapters`.

    Args:
        lora: LoRA settings.
        base: Path of the base as in the recipe.
        digest: Fingerprint of the base; None computes it.
    """
    if digest is None:
        digest = fingerprint(open_checkpoint(base))
    return {"lora": lora.to_dict(), "base": base, "fingerprint": digest}


def trained_weights(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return the trained weights of a LightningModule, by their names in a checkpoint.

    Args:
        module: LightningModule with adapters.
        state: All of its weights; empty on ranks that store none.
    """
    return {name: state[own] for name, own in trained_names(module).items()} if state else {}


def own_weights(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of a checkpoint by their names in a LightningModule: the inverse of :func:`trained_weights`.

    Raises:
        UsageError: the checkpoint does not store exactly the weights that train.
    """
    names = trained_names(module)
    if others := names.keys() ^ state.keys():
        raise UsageError(
            f"ckpt_path: stores other adapters than model.lora trains; {min(others).removeprefix(WEIGHTS_PREFIX)} is "
            "in only one of them"
        )
    return {own: state[name] for name, own in names.items()}


def fake_with_adapters(config: DecoderConfig, scheme: PositionScheme, frequencies: Frequencies, lora: LoRA) -> Decoder:
    """Build a decoder with adapters whose tensors are fake; call it in an active fake tensor mode.

    peft casts the tensors it creates, which fake tensors do not support, so fake tensors replace them afterwards.
    """
    with unset_fake_temporarily(), torch.device("meta"):
        decoder = Decoder(config, scheme, frequencies)
        inject(decoder, lora)
    for module in decoder.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    return decoder
