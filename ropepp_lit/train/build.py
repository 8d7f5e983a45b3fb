"""Construction of a decoder for training: memory options, kernel selection, compilation, sharding, and weights.

:func:`build_decoder` applies them in the required order. Weights are initialized (:func:`init_weights`,
:func:`init_adapters`) or loaded (:func:`load_weights`); :mod:`ropepp_lit.train.parallel` shards the decoder.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ropepp_lit.checkpoint import WEIGHTS_PREFIX, decoder_weights, is_sharded, load_shards
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.nn import Decoder
from ropepp_lit.nn.kernels import select_implementation
from ropepp_lit.nn.lora import LoRA, base_names, inject, trained_names
from ropepp_lit.sharded import tensor_shapes
from ropepp_lit.train.parallel import distribute_weights, local_part, shard_like


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
        shard: Function that shards a decoder on the meta device, such as
            :func:`~ropepp_lit.train.parallel.shard_decoder` with its arguments; None disables sharding.
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


def allocate(decoder: Decoder, device: torch.device) -> None:
    """Allocate the uninitialized weights of a decoder on the meta device."""
    decoder.to_empty(device=device)
    if decoder.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight


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
                local.copy_(shard_like(parameter, full))
            elif name.endswith((".lora_B.weight", ".imaginary")):
                local.zero_()
            elif name.endswith(".lora_magnitude_vector.weight"):
                layer = decoder.get_submodule(own.partition(".lora_")[0])
                weight = local_part(layer.base_layer.weight)  # type: ignore[arg-type, union-attr]
                norms = layer.lora_magnitude_vector["default"].get_weight_norm  # type: ignore[index, union-attr]
                local.copy_(norms(weight.to(local.dtype), torch.zeros_like(weight, dtype=local.dtype), 1.0))
