"""Check of the model's memory options, which trade time for memory."""

from __future__ import annotations

from typing import Literal

from ropepp_lit.errors import UsageError


def check_memory_options(
    *,
    activation_checkpointing: int | Literal["attention"],
    offload_activations: bool,
    mlp_chunk_tokens: int | None,
    attention_head_groups: int,
    compile: bool | None,
) -> None:
    """Check the options of :class:`~ropepp_lit.train.causal_lm.CausalLM` with these names.

    Raises:
        UsageError: an option is out of range, or two of them are incompatible.
    """
    if isinstance(activation_checkpointing, int) and activation_checkpointing < 0:
        raise UsageError(
            f"model.activation_checkpointing: {activation_checkpointing} must be 0 (none) or more, or attention"
        )
    if mlp_chunk_tokens is not None and mlp_chunk_tokens < 1:
        raise UsageError(f"model.mlp_chunk_tokens: {mlp_chunk_tokens} must be 1 or more")
    if offload_activations and not activation_checkpointing:
        raise UsageError("model.offload_activations: moves what activation_checkpointing keeps; set that to 1 or more")
    if offload_activations and activation_checkpointing == "attention":
        raise UsageError(
            "model.offload_activations: does not move what attention keeps; set activation_checkpointing to 1"
        )
    if offload_activations and compile:
        raise UsageError("model.compile: torch.compile cannot trace offload_activations; choose one of them")
    if attention_head_groups > 1 and activation_checkpointing == "attention":
        raise UsageError(
            "model.attention_head_groups: activation_checkpointing attention keeps the outputs of all groups; set "
            "that to 1, or attention_head_groups to 1"
        )
