"""PoPE: content in magnitudes, positions in phases. Shapes are those of :mod:`ropepp_lit.nn.positions`."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.frequencies import Frequencies
from ropepp_lit.nn.positions import HeadLayout, RoPE, turn


class PoPE(RoPE):
    """Polar coordinate position embeddings (arXiv 2509.10534).

    Each of the D dimensions of a head is a complex number of its own, whose magnitude is content and whose phase is
    position. With query position t, key position s and θ_c = rope_theta^(-c/D), c = 0 … D-1:

        A = Σ_c softplus(q_c) softplus(k_c) cos((s - t) θ_c + δ_c)

    The phase bias δ_c is trained for each key/value head, and clamped to [-2π, 0]. Its gradient is that without the
    clamp: torch's own is 0 from the ends on, so δ could not leave 0, where it begins. Scores are divided by √D.

    By cos(a - b) = cos a cos b + sin a sin b that is a product of 2D dimensions, so every attention kernel works as it
    is. Cost: twice the KV cache and arithmetic of attention, as values are padded to 2D too. Kernels of half precision
    on CUDA take up to 256 dimensions, so heads of up to 128.

    Base and scaling apply as to RoPE with heads of 2D.

    Args:
        phase_init: First values of δ: `zero`, or `uniform` in the interval.
    """

    def __init__(self, *, phase_init: Literal["zero", "uniform"] = "zero") -> None:
        if phase_init not in ("zero", "uniform"):
            raise UsageError(f"model.positions.phase_init: no way {phase_init!r}; choose zero or uniform")
        self.phase_init = phase_init

    def head_layout(self, *, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> HeadLayout:
        """Heads of the plain model, twice as wide; the backward pass reads both magnitudes and softplus's arguments."""
        kept = head_dim * (num_attention_heads + 2 * num_key_value_heads)
        return HeadLayout(num_attention_heads, num_attention_heads, num_key_value_heads, head_dim, kept)

    def parameters(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """δ, [K, D]."""
        bias = torch.zeros(layout.num_key_value_heads, head_dim)
        return {"phase_bias": bias.uniform_(-2 * math.pi, 0) if self.phase_init == "uniform" else bias}

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Cos and sin of position × frequency, each [B, T, 1, D] of `dtype`."""
        return super().tables(positions, frequencies, head_dim=2 * head_dim, dtype=dtype)

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts of softplus(q_c) e^{i t θ_c} and softplus(k_c) e^{i (s θ_c + δ_c)}."""
        cos, sin, bias = tables
        with torch.autocast(queries.device.type, enabled=False):  # else softplus would keep float32 copies on CUDA
            queries, keys = F.softplus(queries), F.softplus(keys)
            bias = bias.to(cos.dtype)
            bias = bias + (bias.clamp(-2 * math.pi, 0) - bias).detach()
            # Turned by δ first and by position then, so that the backward pass reads no tensor of their sum.
            biased = torch.cat((keys * bias.cos(), keys * bias.sin()), dim=-1)
            of_query = torch.cat([(queries * part).to(queries.dtype) for part in (cos, sin)], dim=-1)
            return of_query, turn(biased, cos, sin).to(keys.dtype)

    def __str__(self) -> str:
        return "PoPE"
