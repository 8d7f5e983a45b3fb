"""Sequence parallelism over attention heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Ranks share the tokens of each row. For attention they trade: from a slice of the tokens with all heads to all tokens
with a slice of the heads, and back. Every rank then attends over whole rows, so packed documents and positions need no
change.
"""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


def tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T / ranks, heads, D] to [B, T, heads / ranks, D]; heads that cannot be shared equally are repeated first."""
    ranks = group.size()
    heads = math.lcm(x.shape[2], ranks)
    if heads != x.shape[2]:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    x = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)  # ranks, B, T / ranks, heads / ranks, D
    return _trade(x, group).permute(1, 0, 2, 3, 4).flatten(1, 2)


def heads_of_rank(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What goes with the heads that :func:`tokens_to_heads` gives this rank, of x [heads, …] that every rank has."""
    heads = math.lcm(x.shape[0], group.size())
    return x.repeat_interleave(heads // x.shape[0], dim=0).chunk(group.size())[group.rank()]


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T, heads / ranks, D] to [B, T / ranks, heads, D]."""
    x = x.unflatten(1, (group.size(), -1)).transpose(0, 1)  # ranks, B, T / ranks, heads / ranks, D
    return _trade(x, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _trade(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give x[r] to rank r, and get one from each."""
    traded = all_to_all_single_autograd(x.contiguous().flatten(), None, None, group)
    return traded.view(x.shape)
