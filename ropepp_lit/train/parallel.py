"""What is applied to a decoder before it trains: memory options, compilation, sharding and weights, a function each.

:func:`build_decoder` calls them in the order in which they must be called.
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
    """How the ranks of a run share the work; consecutive ranks share the tokens of a row."""

    mesh: DeviceMesh
    """Ranks for `fully_shard`: `fsdp`, or with several replicas (HSDP) `replicate` and `fsdp`."""

    replica: int
    """Which rows this rank reads, of `num_replicas`."""

    num_replicas: int
    """Groups of ranks that read different rows."""

    context_group: dist.ProcessGroup | None
    """Ranks that share the tokens of a row; None where each rank computes whole rows."""

    @classmethod
    def create(cls, device_type: str, *, context_parallel_size: int = 1, replicate_size: int = 1) -> ParallelDims:
        """Make the process groups; all ranks must call it.

        Args:
            device_type: Of the mesh, such as `cuda`.
            context_parallel_size: Ranks that share the tokens of each row.
            replicate_size: Copies of the sharded model.
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
    make: Callable[[], Decoder],
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
    """A decoder that is ready to train.

    Args:
        make: Makes the decoder with its first weights on the default device.
        device: Of this rank.
        shard: Shards a decoder without weights, such as :func:`shard_decoder` with its arguments; None keeps it whole.
        activation_checkpointing: See :class:`~ropepp_lit.train.causal_lm.CausalLM`.
        offload_activations: See there.
        mlp_chunk_tokens: See there.
        attention_head_groups: See there.
        compile: See there.
        attention: See there.
        init_from: See there.
        loads_checkpoint: A checkpoint will be loaded: allocate the weights, and leave them uninitialized.
        lora: What trains beside the weights of `init_from`, which are loaded in any case; None trains them themselves.

    Returns:
        The decoder. A whole one with weights that were drawn is on the CPU, others are on `device`.

    Raises:
        UsageError: `init_from` cannot be read, `attention` cannot run here, or `attention_head_groups` does not divide
            the key/value heads.
    """
    assert lora is None or init_from is not None, "adapters need a base"
    is_drawn = init_from is None and not loads_checkpoint
    if is_drawn and shard is None:
        decoder = draw_weights(make)
    else:
        with torch.device("meta"):
            decoder = make()
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
    if not is_drawn or shard is not None:
        allocate(decoder, device)
    if is_drawn and shard is not None:
        distribute_weights(decoder, draw_weights(make).state_dict() if dist.get_rank() == 0 else {})
    elif init_from is not None and (lora is not None or not loads_checkpoint):
        load_weights(decoder, init_from)
    if lora is not None and not loads_checkpoint:
        draw_adapters(decoder)
    return decoder


def draw_weights(make: Callable[[], Decoder]) -> Decoder:
    """A decoder on the CPU whose weights depend on the run's seed alone: the same for any device and strategy.

    Random numbers of a CPU and a GPU differ. The state of torch's generators is left as it is.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(torch.initial_seed())
        return make()


def compile_blocks(decoder: Decoder) -> None:
    """Compile each block by torch.compile; blocks are alike, so they share one graph."""
    # It would warn of operations in place under selective checkpointing; blocks have none.
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
    """Shard a decoder by FSDP2: embedding, each block, output layer, and the rest.

    Embedding and output layer that share a weight stay with the rest, which is gathered during a whole step.

    Args:
        decoder: On the meta device; changed in place.
        dims: How the ranks share the work.
        mixed_dtype: What parameters are cast to as they are gathered, so that all activations have it too; gradients
            are then reduced in float32. None computes in the parameters' dtype.
        reshard_after_forward: Free the gathered parameters after the forward pass and gather them again in the backward
            pass.
        context_mode: How ranks share the tokens of a row; None chooses the mode that moves less.

    Raises:
        UsageError: see :func:`~ropepp_lit.nn.context_parallel.choose_mode`.
    """
    # A position scheme's float32 tables are inputs of the blocks and must stay float32.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if mixed_dtype is not None:
        policy = MixedPrecisionPolicy(mixed_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    embedding, output = decoder.model.embed_tokens, decoder.lm_head
    for module in (embedding, *decoder.model.layers, output):
        if module in (embedding, output) and decoder.config.tie_word_embeddings:
            continue
        # The backward pass begins with the output layer, so to free it would only mean to gather it at once again.
        frees = reshard_after_forward and module is not output
        fully_shard(module, mesh=dims.mesh, mp_policy=policy, reshard_after_forward=frees)
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
    """Say what the next backward pass of a sharded decoder does with gradients and gathered parameters.

    Args:
        decoder: Sharded by :func:`shard_decoder`.
        is_last: Whether an optimizer step follows.
        reduce_each_micro_batch: Reduce-scatter gradients in each backward pass instead of the last one alone. Replicas
            (HSDP) are averaged over in the last one in either case.
        reshard_after_forward: As given to :func:`shard_decoder`. Parameters that stay gathered after a forward pass
            stay so until the last backward pass.
    """
    decoder.set_requires_gradient_sync(is_last or reduce_each_micro_batch)
    decoder.set_requires_all_reduce(is_last)
    decoder.set_reshard_after_backward(is_last or reshard_after_forward)


def allocate(decoder: Decoder, device: torch.device) -> None:
    """Give a decoder on the meta device memory, without initial values."""
    decoder.to_empty(device=device)
    if decoder.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight


def distribute_weights(decoder: nn.Module, weights: dict[str, Any], *, strict: bool = True) -> None:
    """Copy rank 0's weights into a sharded module, one tensor at a time; what other ranks give is not read.

    Args:
        decoder: Sharded by :func:`shard_decoder`, or a module around it.
        weights: By name.
        strict: Whether a weight may not be missing; those that are stay as they are.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    set_model_state_dict(decoder, dict(weights), options=options)


def load_weights(decoder: Decoder, path: str) -> None:
    """Load the weights of a checkpoint or a Hugging Face folder into a decoder, sharded or not.

    From a sharded checkpoint each rank reads its own shards; anything else is read by rank 0, which distributes it.
    Adapters stay as they are. Norms of queries and keys that the checkpoint lacks begin at one.

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
    if weights:  # of rank 0
        shapes = {name: value.shape for name, value in decoder.state_dict().items()}
        weights |= {name: torch.ones(shapes[name]) for name in qk_norms(shapes) - set(weights)}
    if is_distributed:
        distribute_weights(decoder, weights, strict=not has_adapters)
    else:
        decoder.load_state_dict(weights, strict=not has_adapters)


def qk_norms(names: Iterable[str]) -> set[str]:
    """Of weights' names those of the norms of queries and keys."""
    return {name for name in names if name.endswith((".q_norm.weight", ".k_norm.weight"))}


@torch.no_grad()
def draw_adapters(decoder: Decoder) -> None:
    """Give adapters their first values, with which the decoder computes what its base does.

    A is drawn as peft does, by the run's seed alone (see :func:`draw_weights`); B and columns of imaginary heads are
    zero; norms of DoRA are those of the base, whose weights must be there.
    """
    parameters = dict(decoder.named_parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed())
        for name, own in trained_names(decoder).items():
            parameter, local = parameters[own], local_part(parameters[own])
            if name.endswith(".lora_A.weight"):
                drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
                local.copy_(_shard_like(parameter, drawn))
            elif name.endswith((".lora_B.weight", ".imaginary")):
                local.zero_()
            elif name.endswith(".lora_magnitude_vector.weight"):
                layer = decoder.get_submodule(own.partition(".lora_")[0])
                weight = local_part(layer.base_layer.weight)  # type: ignore[arg-type, union-attr]
                norms = layer.lora_magnitude_vector["default"].get_weight_norm  # type: ignore[index, union-attr]
                local.copy_(norms(weight.to(local.dtype), torch.zeros_like(weight, dtype=local.dtype), 1.0))


def local_part(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    shards = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
    return shards.to_local()
