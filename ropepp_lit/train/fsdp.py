"""FSDP2: weights, gradients and optimizer states sharded over devices, rows of tokens too where they are long.

Lightning's `ModelParallelStrategy` with the defaults that training needs: it shards over all devices, skips the
reduction of gradients while they accumulate, and begins with the very weights that a single process begins with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder


class FSDP2Strategy(ModelParallelStrategy):
    """Shards the model over all devices, by torch's `fully_shard`.

    With `precision: bf16-mixed` weights and optimizer states stay in float32 and are cast to bfloat16 as they are
    gathered; gradients are reduced in float32.

    Args:
        context_parallel_size: Devices that share the tokens of each row (sequence parallelism over attention heads);
            must divide the query heads and the context length.
        replicate_size: Copies of the sharded model (HSDP): shards stay within a copy, and gradients are averaged over
            copies. 1 shards over all devices.
        save_distributed_checkpoint: Save a folder to which each device writes its shards, instead of one file that
            rank 0 writes. Both continue on any number of devices.
    """

    def __init__(
        self,
        *,
        context_parallel_size: int = 1,
        replicate_size: int = 1,
        save_distributed_checkpoint: bool = False,
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        self.context_parallel_size, self.replicate_size = context_parallel_size, replicate_size

    def check(self, *, world_size: int, num_query_heads: int, context_length: int) -> None:
        """Find what does not divide before anything is started.

        Raises:
            UsageError: a size is below 1; the devices, the heads or the context cannot be shared equally.
        """
        context = self.context_parallel_size
        for name, value in (("context_parallel_size", context), ("replicate_size", self.replicate_size)):
            if value < 1:
                raise UsageError(f"trainer.strategy.{name}: {value} must be 1 or more")
        for name, value, total, things in (
            ("context_parallel_size", context, num_query_heads, "query heads"),
            ("context_parallel_size", context, context_length, "tokens of a row"),
            ("context_parallel_size × replicate_size", context * self.replicate_size, world_size, "devices"),
        ):
            if total % value:
                raise UsageError(f"trainer.strategy.{name}: {value} must divide the {total:,} {things}")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Devices that share rows read the same rows."""
        ranks = self.device_mesh["replicate", "shard"]
        replicate, shard = (ranks.get_local_rank(name) for name in ("replicate", "shard"))
        return {"num_replicas": ranks.size(), "rank": replicate * ranks.size(1) + shard}

    def tokens_of_rank(self, num_tokens: int) -> slice:
        """The tokens of a row that this rank computes."""
        ranks, rank = self.device_mesh["context"].size(), self.device_mesh.get_local_rank("context")
        return slice(rank * num_tokens // ranks, (rank + 1) * num_tokens // ranks)

    def setup_environment(self) -> None:
        """Make the processes known to each other, and the mesh (replicate, shard, context)."""
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        copies, context = self.replicate_size, self.context_parallel_size
        shape = (copies, self.world_size // (copies * context), context)
        names = ("replicate", "shard", "context")
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Reduce gradients in the last micro-batch of a step alone."""
        assert self.lightning_module is not None
        is_last = not self.lightning_module.trainer.fit_loop._should_accumulate()
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(is_last, recurse=False)
        super().pre_backward(closure_loss)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state; for a single file as one process would save it, by the places of parameters."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        # Not Lightning's: it numbers parameters as the module does, and optimizers with groups number them otherwise.
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        assert self.model is not None
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        places = {name: place for place, name in enumerate(self._parameter_names(optimizer))}
        return _rename(state, places) if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer states; returns the rest."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only=True)
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        states = checkpoint.get("optimizer_states", []) if self.optimizers else []
        for optimizer, state in zip(self.optimizers, states, strict=True):
            self.load_optimizer_state(optimizer, state)
        return checkpoint

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Spread an optimizer's whole state, as one process saves it, over the ranks."""
        names = dict(enumerate(self._parameter_names(optimizer)))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        assert self.model is not None
        set_optimizer_state_dict(self.model, optimizer, _rename(state, names), options=options)

    def _parameter_names(self, optimizer: Optimizer) -> list[str]:
        """Names of an optimizer's parameters, in the order of its groups."""
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _rename(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other keys for its parameters."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}


for _name in ("fsdp2", "fsdp2strategy"):  # Lightning writes what it is given in small letters
    StrategyRegistry.register(_name, FSDP2Strategy, description="FSDP2, sharded over all devices")


def shard(decoder: Decoder, mesh: DeviceMesh, *, mixed_dtype: torch.dtype | None) -> None:
    """Shard a decoder on the meta device: each block, then the rest.

    Args:
        decoder: Changed in place; its parameters are still without memory.
        mesh: With the dimensions replicate, shard and context.
        mixed_dtype: What parameters are cast to for computing; None computes in theirs.
    """
    fsdp = mesh["shard", "context"]._flatten("fsdp")
    if mesh["replicate"].size() > 1:
        fsdp = mesh["replicate", "fsdp"]
    policy = MixedPrecisionPolicy()
    if mixed_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=mixed_dtype, reduce_dtype=torch.float32)
    for block in decoder.model.layers:
        fully_shard(block, mesh=fsdp, mp_policy=policy)
    fully_shard(decoder, mesh=fsdp, mp_policy=policy)
    register_fsdp_forward_method(decoder, "loss")
    if mesh["context"].size() > 1:
        decoder.set_context_group(mesh["context"].get_group())


def materialize(decoder: Decoder, weights: dict[str, Tensor] | None, device: torch.device) -> None:
    """Give a sharded decoder memory, and the weights that rank 0 holds.

    Args:
        decoder: Sharded, on the meta device.
        weights: On rank 0 all of them, elsewhere None.
        device: Of this rank.
    """
    decoder.to_empty(device=device)
    if decoder.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state: dict[str, Any] = dict(weights or {})
    set_model_state_dict(decoder, state, options=options)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over ranks, as one on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
