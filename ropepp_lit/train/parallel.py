"""Preparation of a decoder for training: memory options, kernel selection, compilation, sharding, and weights.

:func:`build_decoder` applies them in the required order. Weights are initialized (:func:`init_weights`,
:func:`init_adapters`) or loaded (:func:`load_weights`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ropepp_lit.checkpoint import WEIGHTS_PREFIX, decoder_weights, is_sharded, load_shards
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.nn import Decoder
from ropepp_lit.nn.context_parallel import ContextGroup, Mode, choose_mode
from ropepp_lit.nn.kernels import select_implementation
from ropepp_lit.nn.lora import LoRA, base_names, inject, trained_names
from ropepp_lit.sharded import tensor_shapes


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


def build_decoder(
    create: Callable[[], Decoder],
    *,
    device: torch.device,
    shard: Callable[[Decoder], None] | None = None,
    activation_checkpointing: int | Literal["attention"] = 0,
    offload_activations: bool = False,
    mlp_chunk_tokens: int | None = None,
    attention_head_groups: int = 1,
    compile: bool | None = None,
    attention: str | None = None,
    init_from: str | None = None,
    loads_checkpoint: bool = False,
    lora: LoRA | None = None,
) -> Decoder:
    """Build a decoder that is ready to train.

    Args:
        create: Function that creates the decoder, with initial weights, on the default device.
        device: Device of this rank.
        shard: Function that shards a decoder on the meta device, such as :func:`shard_decoder` with its arguments; None
            disables sharding.
        activation_checkpointing: Option of :class:`~ropepp_lit.train.causal_lm.CausalLM`.
        offload_activations: Likewise.
        mlp_chunk_tokens: Likewise.
        attention_head_groups: Likewise.
        compile: Likewise.
        attention: Likewise.
        init_from: Likewise.
        loads_checkpoint: Whether the weights are loaded from a checkpoint later: they are allocated but not
            initialized.
        lora: LoRA settings; the weights of `init_from`, the base, are then loaded in any case. None trains all weights.

    Returns:
        The decoder, on `device`; on the CPU if its weights are initialized and it is not sharded.

    Raises:
        UsageError: `init_from` cannot be read, the kernel `attention` is not available, or `attention_head_groups` does
            not divide the key/value heads.
    """
    assert lora is None or init_from is not None, "adapters need a base"
    initializes = init_from is None and not loads_checkpoint
    if initializes and shard is None:
        decoder = init_weights(create)
    else:
        with torch.device("meta"):
            decoder = create()
            if lora is not None:
                inject(decoder, lora)
    decoder.save_memory(
        checkpoint_every=1 if activation_checkpointing == "attention" else activation_checkpointing,
        keep_attention=activation_checkpointing == "attention",
        offload=offload_activations,
        mlp_chunk_tokens=mlp_chunk_tokens,
        attention_head_groups=attention_head_groups,
    )
    decoder.set_attention(select_implementation(attention, device))
    if (device.type == "cuda" and not offload_activations) if compile is None else compile:
        compile_blocks(decoder)
    if shard is not None:
        shard(decoder)
    if not initializes or shard is not None:
        allocate(decoder, device)
    if initializes and shard is not None:
        distribute_weights(decoder, init_weights(create).state_dict() if dist.get_rank() == 0 else {})
    elif init_from is not None and (lora is not None or not loads_checkpoint):
        load_weights(decoder, init_from)
    if lora is not None and not loads_checkpoint:
        init_adapters(decoder)
    return decoder


def init_weights(create: Callable[[], Decoder]) -> Decoder:
    """Create a decoder on the CPU with weights that depend only on the run's seed, not on device or strategy.

    The CPU is used because random numbers of a CPU and a GPU differ. The state of torch's generators is preserved.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(torch.initial_seed())
        return create()


def compile_blocks(decoder: Decoder) -> None:
    """Compile each block with torch.compile; the blocks have the same structure and share one graph."""
    # Suppress a warning about in-place operations under selective checkpointing; blocks have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for block in decoder.model.layers:
        block.compile()


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
        mode = choose_mode(decoder.layout_at_once, decoder.config.head_dim, ranks, context_mode)
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


def allocate(decoder: Decoder, device: torch.device) -> None:
    """Allocate the uninitialized weights of a decoder on the meta device."""
    decoder.to_empty(device=device)
    if decoder.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight


def distribute_weights(decoder: nn.Module, weights: dict[str, Any], *, strict: bool = True) -> None:
    """Copy rank 0's weights into a sharded module, one tensor at a time; `weights` of other ranks are ignored.

    Args:
        decoder: Decoder sharded by :func:`shard_decoder`, or a module that contains it.
        weights: Full tensors by name.
        strict: Whether all weights are required; otherwise missing ones are unchanged.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    set_model_state_dict(decoder, dict(weights), options=options)


def load_weights(decoder: Decoder, path: str) -> None:
    """Load the weights of a checkpoint or a Hugging Face folder into a decoder, sharded or not.

    From a sharded checkpoint each rank reads its own shards; otherwise rank 0 reads the weights and distributes them.
    Adapters are unchanged. Weights of query and key norms that the checkpoint lacks are set to 1.

    Raises:
        UsageError: the checkpoint is missing or damaged.
    """
    is_distributed, names = isinstance(decoder, FSDPModule), base_names(decoder)
    has_adapters = len(names) < len(decoder.state_dict())
    if is_sharded(path):
        state = decoder.state_dict()
        weights = {WEIGHTS_PREFIX + name: state[own] for name, own in names.items()}
        for name in qk_norms(weights) - {name.removeprefix("state_dict.") for name in tensor_shapes(Path(path))}:
            local_part(weights.pop(name)).fill_(1.0)
        load_shards(path, weights, is_distributed=is_distributed)
        return
    weights = decoder_weights(open_checkpoint(path)) if not is_distributed or dist.get_rank() == 0 else {}
    weights = {names.get(name, name): value for name, value in weights.items()}
    if weights:  # on rank 0
        shapes = {name: value.shape for name, value in decoder.state_dict().items()}
        weights |= {name: torch.ones(shapes[name]) for name in qk_norms(shapes) - set(weights)}
    if is_distributed:
        distribute_weights(decoder, weights, strict=not has_adapters)
    else:
        decoder.load_state_dict(weights, strict=not has_adapters)


def qk_norms(names: Iterable[str]) -> set[str]:
    """Return those names that are weights of query and key norms."""
    return {name for name in names if name.endswith((".q_norm.weight", ".k_norm.weight"))}


@torch.no_grad()
def init_adapters(decoder: Decoder) -> None:
    """Initialize adapters such that the decoder's outputs equal those of its base.

    A is initialized as in peft, from the run's seed only (see :func:`init_weights`); B and columns of imaginary heads
    are zero; norms of DoRA are those of the base, whose weights must be loaded.
    """
    parameters = dict(decoder.named_parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed())
        for name, own in trained_names(decoder).items():
            parameter, local = parameters[own], local_part(parameters[own])
            if name.endswith(".lora_A.weight"):
                full = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                nn.init.kaiming_uniform_(full, a=math.sqrt(5))
                local.copy_(_shard_like(parameter, full))
            elif name.endswith((".lora_B.weight", ".imaginary")):
                local.zero_()
            elif name.endswith(".lora_magnitude_vector.weight"):
                layer = decoder.get_submodule(own.partition(".lora_")[0])
                weight = local_part(layer.base_layer.weight)  # type: ignore[arg-type, union-attr]
                norms = layer.lora_magnitude_vector["default"].get_weight_norm  # type: ignore[index, union-attr]
                local.copy_(norms(weight.to(local.dtype), torch.zeros_like(weight, dtype=local.dtype), 1.0))


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_like(parameter: Tensor, full: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that every rank has, placed like a parameter."""
    if not isinstance(parameter, DTensor):
        return full
    mesh, placements = parameter.device_mesh, parameter.placements
    shards = distribute_tensor(full.to(parameter.device), mesh, placements, src_data_rank=None)
    return shards.to_local()
