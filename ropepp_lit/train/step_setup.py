"""Settings of a training step, besides the model, that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ropepp_lit.nn.context_parallel import Mode
from ropepp_lit.nn.lora import LoRA

DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
"""Compute dtypes by the first part of the name of a Lightning precision."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings that the memory of a step depends on: batch, devices, precision and memory options.

    Args:
        rows: Rows in a micro-batch of a device (of a group of devices with context parallelism).
        context_length: Tokens in each row.
        strategy: One device, DDP, or FSDP2 (HSDP if `replicate_size` is above 1).
        devices: Number of devices in the cluster.
        replicate_size: Number of replicas of the sharded model.
        context_parallel_size: Number of devices that share the tokens of each row.
        context_parallel_mode: See :mod:`ropepp_lit.nn.context_parallel`.
        precision: Precision as named by Lightning, such as `bf16-mixed`.
        accumulate_grad_batches: Micro-batches in a step.
        gradient_clip_val: Maximum norm of the gradient; None disables clipping.
        reduce_each_micro_batch: Option of :class:`~ropepp_lit.train.fsdp.FSDP2Strategy`.
        reshard_after_forward: Likewise.
        activation_checkpointing: Option of :class:`~ropepp_lit.train.causal_lm.CausalLM`.
        offload_activations: Likewise.
        mlp_chunk_tokens: Likewise.
        attention_head_groups: Likewise.
        lora: Likewise.
    """

    rows: int
    context_length: int
    strategy: Literal["one", "ddp", "fsdp2"] = "one"
    devices: int = 1
    replicate_size: int = 1
    context_parallel_size: int = 1
    context_parallel_mode: Mode = "heads"
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    reduce_each_micro_batch: bool = True
    reshard_after_forward: bool = True
    activation_checkpointing: int | Literal["attention"] = 0
    offload_activations: bool = False
    mlp_chunk_tokens: int | None = None
    attention_head_groups: int = 1
    lora: LoRA | None = None

    @property
    def shards(self) -> int:
        """Number of devices over which parameters, gradients and optimizer states are sharded."""
        return self.devices // self.replicate_size if self.strategy == "fsdp2" else 1

    @property
    def tokens_per_row(self) -> int:
        """Tokens of each row on this device."""
        return self.context_length // self.context_parallel_size

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this device."""
        return self.rows * self.tokens_per_row

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matrix products."""
        return self.base_dtype if not self.is_mixed else DTYPES[self.precision.split("-")[0]]

    @property
    def is_mixed(self) -> bool:
        """Whether matrix products have another dtype than the trained parameters."""
        return self.precision.endswith("mixed")

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of trained parameters, gradients and optimizer states."""
        return torch.float32 if self.is_mixed else DTYPES[self.precision.split("-")[0]]

    @property
    def base_dtype(self) -> torch.dtype:
        """Dtype of frozen parameters."""
        named = None if self.lora is None else self.lora.base_dtype
        return self.weight_dtype if named is None else getattr(torch, named)

    @property
    def checkpoint_every(self) -> int:
        """Interval of checkpointed blocks: every Nth is recomputed in the backward pass; 0 means none."""
        return 1 if self.activation_checkpointing == "attention" else self.activation_checkpointing

    @property
    def keeps_attention(self) -> bool:
        """Whether checkpointed blocks store the outputs of attention."""
        return self.activation_checkpointing == "attention"

    @property
    def uses_autocast(self) -> bool:
        """Whether operations cast their inputs; FSDP2 casts parameters as it gathers them instead."""
        return self.is_mixed and self.strategy != "fsdp2"

    @property
    def keeps_full_gradients(self) -> bool:
        """Whether gradients are stored unreduced between micro-batches."""
        return self.accumulate_grad_batches > 1 and not (self.strategy == "fsdp2" and self.reduce_each_micro_batch)
