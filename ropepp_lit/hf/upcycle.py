"""Upcycles RoPE checkpoints to RoPE++: EC with unchanged outputs, EH as an approximation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ropepp_lit.checkpoint import KEY, describe_architecture, make_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.export import architecture_of
from ropepp_lit.hf.folder import weights_of
from ropepp_lit.nn import DecoderConfig, RoPE, RoPEPP, layout_of


def upcycle(
    checkpoint: dict[str, Any], *, variant: Literal["ec", "eh"], pairs: Literal["average", "first"] = "average"
) -> dict[str, Any]:
    """Create a RoPE++ checkpoint with the weights of a RoPE checkpoint.

    EC: every head becomes the real head of a pair, and the output projection gets zero columns for the imaginary heads.
    The outputs are those of the RoPE model, and the new columns receive gradients from the first step.

    EH is an approximation, because it has half the query and key/value heads: two adjacent key/value heads, and the
    query heads of their groups, are combined. The columns of the imaginary heads are initialized to zero too.

    Args:
        checkpoint: Checkpoint with plain RoPE.
        variant: `ec` or `eh`.
        pairs: For EH: `average` the weights of each two heads (and add their columns of the output projection), or keep
            only the `first` of them.

    Raises:
        UsageError: The checkpoint does not have plain RoPE, or its number of heads cannot be halved.
    """
    old = architecture_of(checkpoint)
    if type(old.scheme) is not RoPE:
        raise UsageError(
            "source: only a checkpoint with plain RoPE can be upcycled to RoPE++; "
            f"this one has {type(old.scheme).__name__}"
        )
    scheme = RoPEPP(variant=variant)
    config = old.decoder
    layout_of(config, scheme)
    weights = weights_of(checkpoint)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        if variant == "eh":
            _halve(weights, prefix, config, average=pairs == "average")
        output = prefix + "o_proj.weight"
        columns = weights[output].unflatten(1, (-1, config.head_dim))
        weights[output] = torch.stack((columns, torch.zeros_like(columns)), dim=2).flatten(1)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    entry = checkpoint[KEY]
    preserved = (
        "tokenizer",
        "tokenizer_config",
        "generation_config",
        "bos_token_id",
        "eos_token_id",
        "opening",
        "context_length",
        "card",
    )
    return make_checkpoint(
        weights,
        architecture=describe_architecture(config, scheme, old.frequencies),
        origin=entry.get("origin") or "a RoPE checkpoint",
        **{key: entry.get(key) for key in preserved},
    )


def _halve(weights: dict[str, Tensor], prefix: str, config: DecoderConfig, *, average: bool) -> None:
    """Combine each two adjacent key/value heads, and the corresponding query heads of their groups."""
    groups = config.num_attention_heads // config.num_key_value_heads

    def pair(heads: Tensor, per_group: int, *, add: bool = False) -> Tensor:
        """Combine head i of each group with head i of the next group: [heads, …] to [heads / 2, …]."""
        couples = heads.unflatten(0, (-1, 2, per_group))
        if not average:
            return couples[:, 0].flatten(0, 1)
        return (couples.sum(dim=1) if add else couples.mean(dim=1)).flatten(0, 1)

    for part, per_group in (("q", groups), ("k", 1), ("v", 1)):
        for kind in ("weight", "bias"):
            name = f"{prefix}{part}_proj.{kind}"
            if name in weights:
                heads = weights[name].unflatten(0, (-1, config.head_dim))
                weights[name] = pair(heads, per_group).flatten(0, 1)
    name = prefix + "o_proj.weight"
    columns = weights[name].unflatten(1, (-1, config.head_dim)).transpose(0, 1)
    weights[name] = pair(columns, groups, add=True).transpose(0, 1).flatten(1)
