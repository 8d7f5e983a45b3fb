"""A run with LoRA: what its checkpoints store, and which base they belong to."""

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
    """What LoRA adds to a run; without it nothing.

    Args:
        lora: What trains; None means all weights.
    """

    def __init__(self, lora: LoRA | None) -> None:
        self.lora = lora
        self.base_fingerprint: str | None = None
        """Of the weights that adapters are trained beside; the command sets it before the run."""
        self._seed = torch.initial_seed()

    def seed_dropout(self, rank: int, batch_idx: int) -> None:
        """Let the random numbers of a micro-batch depend on its number alone, so that a run continues exactly.

        Args:
            rank: Of the process.
            batch_idx: Number of the micro-batch in the run.
        """
        if self.lora is not None and self.lora.dropout:
            digest = hashlib.sha256(f"{self._seed} {rank} {batch_idx}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def save(self, module: nn.Module, checkpoint: dict[str, Any], *, base: str | None) -> None:
        """Leave in a checkpoint of a LightningModule what trains, and say which base it belongs to."""
        if self.lora is not None:
            checkpoint["state_dict"] = trained_weights(module, checkpoint["state_dict"])
            checkpoint[KEY]["adapter"] = adapter_entry(self.lora, str(base), self.base_fingerprint)

    def load(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Give what a checkpoint stores the names that it has in a LightningModule."""
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
    """Find options that LoRA does not work with.

    Args:
        lora: What trains.
        decoder: Without adapters; may be on the meta device.
        optimizer: Of the recipe.
        precision: Of the trainer, such as `bf16-mixed`.
        mlp_chunk_tokens: See :class:`~ropepp_lit.train.causal_lm.CausalLM`.
        attention_head_groups: See there.
        init_optimizer: See there.
        shards_checkpoint: Whether checkpoints are folders of shards.

    Raises:
        UsageError: it does not work with one of them.
    """
    lora.check(decoder.scheme)
    lora.peft_config()  # whether peft is installed
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
    """Shapes of what a run's checkpoints store, by name.

    Args:
        decoder: Without adapters.
        lora: What trains; None means all.
    """
    if lora is None:
        return {name: value.shape for name, value in decoder.state_dict().items()}
    with torch.device("meta"):
        other = Decoder(decoder.config, decoder.scheme, decoder.frequencies)
        inject(other, lora)
    parameters = dict(other.named_parameters())
    return {name: parameters[own].shape for name, own in trained_names(other).items()}


def continue_adapters(
    checkpoint: dict[str, Any], path: str, lora: LoRA | None, init_from: str | None
) -> tuple[str | None, str | None]:
    """Check that a run with these settings can continue from a checkpoint; the base must be the one of its adapters.

    Args:
        checkpoint: Of :func:`~ropepp_lit.checkpoint.read_checkpoint`.
        path: Of it.
        lora: Of the recipe.
        init_from: Of the recipe; with adapters the base, where it has moved.

    Returns:
        `init_from`, or where the checkpoint says that its base is; and the base's fingerprint. (None, None) for a
        whole model.

    Raises:
        UsageError: the recipe trains what the checkpoint does not store; the base is another one, or cannot be read.
    """
    if not is_adapter(checkpoint):
        if lora is not None:
            raise UsageError(
                f"ckpt_path: {path} stores a whole model, and model.lora trains adapters; begin from its weights by "
                f"--model.init_from {path}, or leave model.lora out"
            )
        return init_from, None
    stored = settings_of(checkpoint, path)
    if lora is None:
        raise UsageError(
            f"ckpt_path: {path} stores adapters, and the recipe has no model.lora; name the recipe.yaml of its run, or "
            f"train on what they make with their base by --model.init_from {path}"
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
    """The entry `adapter` of a checkpoint, see :mod:`ropepp_lit.hf.adapters`.

    Args:
        lora: Settings.
        base: As the recipe names it.
        digest: Its fingerprint; None computes it.
    """
    if digest is None:
        digest = fingerprint(open_checkpoint(base))
    return {"lora": lora.to_dict(), "base": base, "fingerprint": digest}


def trained_weights(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Of a LightningModule's weights those that train, by the names that a checkpoint has for them.

    Args:
        module: The LightningModule, with adapters.
        state: All of its weights; empty on ranks that store none.
    """
    return {name: state[own] for name, own in trained_names(module).items()} if state else {}


def own_weights(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`trained_weights`: what a checkpoint stores, by a LightningModule's own names.

    Raises:
        UsageError: the checkpoint does not store exactly what trains.
    """
    names = trained_names(module)
    if others := names.keys() ^ state.keys():
        raise UsageError(
            f"ckpt_path: stores other adapters than model.lora trains; {min(others).removeprefix(WEIGHTS_PREFIX)} is "
            "one of them alone"
        )
    return {own: state[name] for name, own in names.items()}


def fake_with_adapters(config: DecoderConfig, scheme: PositionScheme, frequencies: Frequencies, lora: LoRA) -> Decoder:
    """A decoder with adapters, of fake tensors; for a fake mode that is in force.

    peft converts what it makes, which fake tensors do not allow, so they replace its tensors.
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
