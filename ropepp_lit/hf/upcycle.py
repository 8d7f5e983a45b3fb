"""RoPE checkpoints turned into RoPE++ ones: EC with unchanged output, EH as an approximation."""

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
    """A RoPE++ checkpoint with the weights of a RoPE one.

    EC: every head becomes the real one of a pair; the output projection gets columns of zeros for the imaginary heads.
    So the output is that of the RoPE model, and gradients reach the new columns at once.

    EH has half the query and key/value heads, so it approximates: two neighbouring key/value heads, and the query
    heads that read them, become one. Imaginary heads begin with columns of zeros here too.

    Args:
        checkpoint: With plain RoPE.
        variant: `ec` or `eh`.
        pairs: For EH: `average` the weights of each two heads (columns of the output projection are added), or keep the
            `first` of them and drop the other.

    Raises:
        UsageError: the checkpoint is no plain RoPE one, or its heads cannot be halved.
    """
    old = architecture_of(checkpoint)
    if type(old.scheme) is not RoPE:
        raise UsageError(
            "source: only a checkpoint with plain RoPE can be turned into RoPE++, "
            f"and this one has {type(old.scheme).__name__}"
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
    ours = checkpoint[KEY]
    kept = (
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
        origin=ours.get("origin") or "a RoPE checkpoint",
        **{key: ours.get(key) for key in kept},
    )


def _halve(weights: dict[str, Tensor], prefix: str, config: DecoderConfig, *, average: bool) -> None:
    """Make one key/value head of each two, and one query head of each two that then read the same."""
    groups = config.num_attention_heads // config.num_key_value_heads

    def pair(heads: Tensor, per_group: int, *, add: bool = False) -> Tensor:
        """[heads, …] to half as many: head i of one group and head i of the next become one."""
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
