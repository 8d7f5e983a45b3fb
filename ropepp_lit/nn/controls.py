"""Ablation controls of RoPE++: second heads that are not imaginary, with the head counts and cache of EC or EH.

They separate the effect of the imaginary part from that of more heads and a wider output projection. Each differs from
RoPE++ only in how the second query is computed (:class:`IndependentQueries` also has a wider q_proj).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.frequencies import Frequencies
from ropepp_lit.nn.positions import HeadLayout, PairedHeads, RoPE, Variant, apply_rotary, check_variant, paired_layout


class TurnedQueries(PairedHeads):
    """Second heads whose query is the first one rotated by a fixed angle: A = (R_t R_{-φ} q)ᵀ (R_s k).

    In terms of the complex score z, A = cos φ Re z - sin φ Im z: RoPE++ at 90°, a copy of the first head at 0°, which
    differs from it only in the output projection.

    Args:
        variant: See :class:`~ropepp_lit.nn.positions.RoPEPP`.
        angle: φ in degrees.
    """

    def __init__(self, *, variant: Variant = "ec", angle: float = 0.0) -> None:
        super().__init__(variant=variant)
        if not math.isfinite(angle):
            raise UsageError(f"model.positions.angle: {angle} must be a number of degrees")
        self.angle = angle

    def second_queries(self, queries: Tensor, rotated: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Return the rotated queries, multiplied by exp(-iφ)."""
        cos, sin = (torch.full((), part(-math.radians(self.angle)), dtype=tables[0].dtype, device=rotated.device)
                    for part in (math.cos, math.sin))  # fmt: skip
        return apply_rotary(rotated, cos, sin)

    def __str__(self) -> str:
        return f"queries turned by {self.angle:g}° ({self.variant.upper()})"


class MappedQueries(PairedHeads):
    """Second heads whose query is the first one mapped by a random orthogonal matrix: A = (R_t M q)ᵀ (R_s k).

    M is sampled for each layer and key/value head (uniformly, by the QR decomposition) and not trained; it mixes rotary
    pairs, which no rotation of RoPE++ does.

    Args:
        variant: See :class:`~ropepp_lit.nn.positions.RoPEPP`.
    """

    def constants(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """Return M, [K, D, D]."""
        maps = torch.empty(layout.num_key_value_heads, head_dim, head_dim)
        for matrix in maps:
            nn.init.orthogonal_(matrix)
        return {"query_map": maps}

    def second_queries(self, queries: Tensor, rotated: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Return the mapped queries, rotated."""
        cos, sin, maps = tables
        groups = queries.unflatten(2, (maps.shape[0], -1))
        mapped = torch.einsum("btkgd,ked->btkge", groups, maps.to(queries.dtype))
        return apply_rotary(mapped.flatten(2, 3), cos, sin)

    def __str__(self) -> str:
        return f"queries mapped at random ({self.variant.upper()})"


class UnrotatedQueries(PairedHeads):
    """Second heads whose query is not rotated: A = qᵀ (R_s k), which depends on the key's absolute position.

    Args:
        variant: See :class:`~ropepp_lit.nn.positions.RoPEPP`.
    """

    def second_queries(self, queries: Tensor, rotated: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Return the queries unchanged."""
        return queries

    def __str__(self) -> str:
        return f"queries without rotation ({self.variant.upper()})"


class IndependentQueries(RoPE):
    """Second heads with independent queries: plain RoPE with the attention heads and the KV cache of EC or EH.

    q_proj has as many heads as the softmax, twice those of RoPE++.

    Args:
        variant: See :class:`~ropepp_lit.nn.positions.RoPEPP`.
    """

    def __init__(self, *, variant: Variant = "ec") -> None:
        self.variant = check_variant(variant)

    def head_layout(self, *, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> HeadLayout:
        """Return (Q, H, K): EC of a plain (H, K) is (2H, 2H, K); EH of (H, K) is (H, H, K/2)."""
        layout = paired_layout(self.variant, num_attention_heads, num_key_value_heads)
        return layout._replace(num_query_heads=layout.num_attention_heads)

    def __str__(self) -> str:
        return f"independent queries ({self.variant.upper()})"
