"""Sharding of a decoder with FSDP2: groups of ranks, sharded modules, gradient reduction, distribution of weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ropepp_lit.nn import Decoder
from ropepp_lit.nn.context_parallel import ContextGroup, Mode, choose_mode


class ParallelDims(NamedTuple):
    """Dimensions of parallelism of a run; consecutive ranks share the tokens of a row."""

    mesh: DeviceMesh
    """Mesh for `fully_shard`: `fsdp`, or `replicate` and `fsdp` with multiple replicas (HSDP)."""

    replica: int
    """Index of the rows that this rank reads, below `num_replicas`."""

    num_replicas: int
    """Number of groups of ranks that read different rows."""

    context_group: dist.ProcessGroup | None
    """Ranks that share the tokens of a row; None if each rank computes full rows."""

    @classmethod
    def create(cls, device_type: str, *, context_parallel_size: int = 1, replicate_size: int = 1) -> ParallelDims:
        """Create the process groups. Every rank must call it.

        Args:
            device_type: Device type of the mesh, such as `cuda`.
            context_parallel_size: Number of ranks that share the tokens of each row.
            replicate_size: Number of replicas of the sharded model.
        """
        world_size, rank, context = dist.get_world_size(), dist.get_rank(), context_parallel_size
        shape: tuple[int, ...] = (world_size,)
        names: tuple[str, ...] = ("fsdp",)
        if replicate_size > 1:
            shape, names = (replicate_size, world_size // replicate_size), ("replicate", "fsdp")
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        group = dist.new_subgroups(context)[0] if context > 1 else None
        return cls(mesh, rank // context, world_size // context, group)


def shard_decoder(
    decoder: Decoder,
    dims: ParallelDims,
    *,
    mixed_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    context_mode: Mode | None = None,
) -> None:
    """Shard a decoder with FSDP2: the embedding, each block, the output layer, and the remaining parameters.

    A tied embedding and output layer belong to the remaining parameters, which are gathered during the complete step.

    Args:
        decoder: Decoder on the meta device; modified in place.
        dims: Dimensions of parallelism.
        mixed_dtype: Dtype to which parameters are cast as they are gathered, and so the dtype of activations; gradients
            are then reduced in float32. None computes in the parameters' dtype.
        reshard_after_forward: Free the gathered parameters after the forward pass and gather them again in the backward
            pass.
        context_mode: Mode of context parallelism; None chooses the mode that sends fewer bytes.

    Raises:
        UsageError: see :func:`~ropepp_lit.nn.context_parallel.choose_mode`.
    """
    # The float32 tables of a position scheme are inputs of the blocks and must not be cast.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if mixed_dtype is not None:
        policy = MixedPrecisionPolicy(mixed_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    embedding, output = decoder.model.embed_tokens, decoder.lm_head
    for module in (embedding, *decoder.model.layers, output):
        if module in (embedding, output) and decoder.config.tie_word_embeddings:
            continue
        # The backward pass starts with the output layer, so it would be gathered again immediately.
        reshards = reshard_after_forward and module is not output
        fully_shard(module, mesh=dims.mesh, mp_policy=policy, reshard_after_forward=reshards)
    fully_shard(decoder, mesh=dims.mesh, mp_policy=policy)
    if isinstance(embedding, FSDPModule):
        embedding.set_unshard_in_backward(False)  # its gradient does not depend on its weights
    register_fsdp_forward_method(decoder, "loss")
    register_fsdp_forward_method(output, "loss")
    if dims.context_group is not None:
        ranks = dims.context_group.size()
        mode = choose_mode(decoder.group_layout, decoder.config.head_dim, ranks, context_mode)
        decoder.set_context_group(ContextGroup(dims.context_group, mode))


def set_gradient_reduction(
    decoder: FSDPModule, *, is_last: bool, reduce_each_micro_batch: bool, reshard_after_forward: bool
) -> None:
    """Configure how the next backward pass of a sharded decoder handles gradients and gathered parameters.

    Args:
        decoder: Decoder sharded by :func:`shard_decoder`.
        is_last: Whether an optimizer step follows.
        reduce_each_micro_batch: Reduce-scatter gradients in each backward pass instead of only in the last one. The
            all-reduce over replicas (HSDP) is in the last one in either case.
        reshard_after_forward: As passed to :func:`shard_decoder`. If False, parameters remain gathered until the last
            backward pass.
    """
    decoder.set_requires_gradient_sync(is_last or reduce_each_micro_batch)
    decoder.set_requires_all_reduce(is_last)
    decoder.set_reshard_after_backward(is_last or reshard_after_forward)


def distribute_weights(decoder: nn.Module, weights: dict[str, Any], *, strict: bool = True) -> None:
    """Copy rank 0's weights into a sharded module, one tensor at a time; `weights` of other ranks are ignored.

    Args:
        decoder: Decoder sharded by :func:`shard_decoder`, or a module that contains it.
        weights: Full tensors by name.
        strict: Whether all weights are required; otherwise missing ones are unchanged.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    set_model_state_dict(decoder, dict(weights), options=options)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: Tensor, full: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that every rank has, placed like a parameter."""
    if not isinstance(parameter, DTensor):
        return full
    mesh, placements = parameter.device_mesh, parameter.placements
    shards = distribute_tensor(full.to(parameter.device), mesh, placements, src_data_rank=None)
    return shards.to_local()
