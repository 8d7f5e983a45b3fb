"""FSDP2 strategy: shards weights, gradients and optimizer states over devices, and optionally the tokens of a row.

It extends Lightning's `ModelParallelStrategy`: it shards over all devices by default, and starts from the same weights
as a single process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder, HeadLayout
from ropepp_lit.nn.context_parallel import ContextGroup, ContextShard, Mode, choose_mode, tokens_of_rank
from ropepp_lit.sharded import load_sharded_state, read_pickled, read_sharded_rest
from ropepp_lit.train.lora import own_weights
from ropepp_lit.train.optimizer_state import check_optimizer_state
from ropepp_lit.train.parallel import ParallelDims, distribute_weights, set_gradient_reduction, shard_decoder


class ParameterCasts(Precision):
    """Precision `bf16-mixed` without autocast, for FSDP2, which casts parameters as it gathers them."""

    precision = "bf16-mixed"


class FSDP2Strategy(ModelParallelStrategy):
    """Shards the model over all devices with torch's `fully_shard`.

    With `precision: bf16-mixed`, weights and optimizer states are in float32, and weights are cast to bfloat16 as they
    are gathered; all activations are in bfloat16, without autocast; gradients are reduced in float32.

    Args:
        context_parallel_size: Number of devices that share the tokens of each row (context parallelism).
        context_parallel_mode: `gather`: each device gathers all keys and values; twice the size must divide the context
            length. `heads`: devices exchange tokens for attention heads (DeepSpeed-Ulysses); the size must divide the
            query heads and the context length. Empty chooses the mode that sends fewer bytes.
        replicate_size: Number of replicas of the sharded model (HSDP); gradients are averaged over replicas. 1 shards
            over all devices.
        reduce_each_micro_batch: During gradient accumulation, reduce gradients after each micro-batch, so that each
            device stores only its shards of them. False reduces once per step, which halves the communication of the
            other micro-batches and takes 4 bytes per parameter of the full model on each device.
        reshard_after_forward: Free the gathered parameters of a layer after its forward pass and gather them again in
            the backward pass. False gathers them once per step (ZeRO-2), which takes 2 bytes (4 in float32) per
            parameter of the full model on each device.
        save_distributed_checkpoint: Save a folder to which each device writes its shards, instead of a single file
            written by rank 0. Training can continue from both on any number of devices.
    """

    def __init__(
        self,
        *,
        context_parallel_size: int = 1,
        context_parallel_mode: Mode | None = None,
        replicate_size: int = 1,
        reduce_each_micro_batch: bool = True,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = False,
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        self.context_parallel_size, self.replicate_size = context_parallel_size, replicate_size
        self.context_parallel_mode = context_parallel_mode
        self.reduce_each_micro_batch, self.reshard_after_forward = reduce_each_micro_batch, reshard_after_forward
        self._dims: ParallelDims | None = None
        self._context_group: ContextGroup | None = None
        self._was_last: bool | None = None

    @property
    def precision_plugin(self) -> Precision:
        """Precision plugin; the setter replaces mixed precision by casts of FSDP2, without autocast."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, MixedPrecision):
            self.check_precision(plugin.precision)
            plugin = ParameterCasts()
        self._precision_plugin = plugin

    @staticmethod
    def check_precision(precision: str) -> None:
        """Raise UsageError for a precision with gradient scaling: gradients would be reduced before unscaling."""
        if precision in ("16", "16-mixed"):
            raise UsageError("trainer.precision: 16-mixed does not work with fsdp2; use bf16-mixed")

    def check(self, *, world_size: int, layout: HeadLayout, head_dim: int, context_length: int) -> None:
        """Check the sizes before anything is started.

        Raises:
            UsageError: a size is below 1, or devices, heads or context length are not divisible by it.
        """
        context = self.context_parallel_size
        for name, value in (("context_parallel_size", context), ("replicate_size", self.replicate_size)):
            if value < 1:
                raise UsageError(f"trainer.strategy.{name}: {value} must be 1 or more")
        if context > 1:
            mode = choose_mode(layout, head_dim, context, self.context_parallel_mode)
            tokens_of_rank(context_length, context, 0, mode)
        if world_size % (context * self.replicate_size):
            raise UsageError(
                f"trainer.strategy.context_parallel_size × replicate_size: {context * self.replicate_size} must divide "
                f"the {world_size:,} devices"
            )

    @property
    def dims(self) -> ParallelDims:
        """Groups of ranks; available after the processes are connected."""
        assert self._dims is not None
        return self._dims

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of a distributed sampler; devices that share rows read the same rows."""
        return {"num_replicas": self.dims.num_replicas, "rank": self.dims.replica}

    @property
    def context_shard(self) -> ContextShard | None:
        """Tokens of a row that this rank computes, available after the model is sharded; None means all."""
        if self.context_parallel_size == 1:
            return None
        assert self._context_group is not None
        return self._context_group.shard

    def setup_environment(self) -> None:
        """Connect the processes, and create the groups of ranks."""
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        if self._dims is None:
            self._dims = ParallelDims.create(
                self.root_device.type,
                context_parallel_size=self.context_parallel_size,
                replicate_size=self.replicate_size,
            )
        self._device_mesh = self._dims.mesh
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def shard(self, decoder: Decoder) -> None:
        """Shard a decoder on the meta device."""
        mixed_dtype = torch.bfloat16 if isinstance(self.precision_plugin, ParameterCasts) else None
        shard_decoder(
            decoder,
            self.dims,
            mixed_dtype=mixed_dtype,
            reshard_after_forward=self.reshard_after_forward,
            context_mode=self.context_parallel_mode,
        )
        self._context_group = decoder.context_group

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Configure whether the backward pass reduces gradients."""
        assert self.lightning_module is not None
        is_last = not self.lightning_module.trainer.fit_loop._should_accumulate()
        if is_last != self._was_last:
            self._was_last = is_last
            for decoder in self.lightning_module.children():
                if isinstance(decoder, FSDPModule):
                    set_gradient_reduction(
                        decoder,
                        is_last=is_last,
                        reduce_each_micro_batch=self.reduce_each_micro_batch,
                        reshard_after_forward=self.reshard_after_forward,
                    )
        super().pre_backward(closure_loss)

    @property
    def _state_dict_options(self) -> StateDictOptions:
        """Options for a full state dict on the CPU, or for shards on the device, which torch copies as it writes."""
        is_full = not self._save_distributed_checkpoint
        return StateDictOptions(full_state_dict=is_full, cpu_offload=is_full)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights: the shards of this rank, or for a single file all of them on rank 0."""
        assert self.model is not None
        options = self._state_dict_options
        options.ignore_frozen_params = True  # a run with LoRA does not store its base
        return get_model_state_dict(self.model, options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer state; for a single file as a single process saves it, by parameter indices."""
        # Lightning's implementation numbers parameters in the order of the module, not in that of the groups.
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        assert self.model is not None
        state = get_optimizer_state_dict(self.model, optimizer, options=self._state_dict_options)
        if self._save_distributed_checkpoint:
            return state
        indices = {name: index for index, name in enumerate(self._parameter_names(optimizer))}
        return _rename(state, indices) if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer states, and return the other entries."""
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if path.is_dir():
            # Lightning's implementation unpickles arbitrary objects in the folder.
            weights = get_model_state_dict(self.model)
            optimizers = {
                f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)
                for number, optimizer in enumerate(self.optimizers)
            }
            state: dict[str, Any] = {"state_dict": weights, **optimizers}
            load_sharded_state(path, state, is_distributed=True)
            set_model_state_dict(self.model, state["state_dict"])
            for number, optimizer in enumerate(self.optimizers):
                set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{number}"])
            return read_sharded_rest(path)
        checkpoint = read_pickled(path)
        weights, has_frozen = checkpoint.pop("state_dict"), not all(p.requires_grad for p in self.model.parameters())
        if has_frozen:
            weights = own_weights(self.model, weights)
        distribute_weights(self.model, weights, strict=not has_frozen)
        states = checkpoint.get("optimizer_states", []) if self.optimizers else []
        for optimizer, state in zip(self.optimizers, states, strict=True):
            self.load_optimizer_state(optimizer, state, path)
        return checkpoint

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any], path: str | Path) -> None:
        """Distribute a full optimizer state, as a single process saves it into the file `path`, over the ranks."""
        check_optimizer_state(optimizer, state, path)
        names = dict(enumerate(self._parameter_names(optimizer)))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        assert self.model is not None
        set_optimizer_state_dict(self.model, optimizer, _rename(state, names), options=options)

    def _parameter_names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of an optimizer's parameters, in the order of its groups."""
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _rename(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """Return an optimizer state with other keys for its parameters."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}


for _name in ("fsdp2", "fsdp2strategy"):  # Lightning converts names to lower case
    StrategyRegistry.register(_name, FSDP2Strategy, description="FSDP2, sharded over all devices")
# `auto` uses `ddp` on multiple devices too. Without bucket views each gradient is stored twice.
StrategyRegistry.register(
    "ddp", DDPStrategy, override=True, gradient_as_bucket_view=True, description="DDP, gradients as views of buckets"
)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, on every rank; other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
