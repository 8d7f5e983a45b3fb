"""PoPE, which encodes content in magnitudes and positions in phases. Shapes: :mod:`ropepp_lit.nn.positions`."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.frequencies import Frequencies
from ropepp_lit.nn.positions import HeadLayout, RoPE, apply_rotary


class PoPE(RoPE):
    """Polar coordinate position embeddings (arXiv 2509.10534).

    Each of the D dimensions of a head becomes a complex number, whose magnitude encodes content and whose phase encodes
    position. With query position t, key position s and θ_c = rope_theta^(-c/D), c = 0 … D-1:

        A = Σ_c softplus(q_c) softplus(k_c) cos((s - t) θ_c + δ_c)

    The phase bias δ_c is trained for each key/value head and clamped to [-2π, 0]. The clamp has a straight-through
    gradient: torch's own is 0 at and beyond the bounds, so δ could not leave its initial value 0. Scores are divided by
    √D.

    Since cos(a - b) = cos a cos b + sin a sin b, the score is a product of 2D dimensions, which every attention kernel
    supports. Cost: twice the KV cache and FLOPs of attention, as values are padded to 2D too. Half-precision CUDA
    kernels accept up to 256 dimensions, so heads of up to 128.

    Base and scaling apply as to RoPE with heads of 2D.

    Args:
        phase_init: Initial values of δ: `zero`, or `uniform` in the interval.
    """

    def __init__(self, *, phase_init: Literal["zero", "uniform"] = "zero") -> None:
        if phase_init not in ("zero", "uniform"):
            raise UsageError(f"model.positions.phase_init: {phase_init!r} does not exist; choose zero or uniform")
        self.phase_init = phase_init

    def head_layout(self, *, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> HeadLayout:
        """Return the head counts of the plain model, twice as wide; magnitudes and softplus inputs are saved."""
        saved = head_dim * (num_attention_heads + 2 * num_key_value_heads)
        return HeadLayout(num_attention_heads, num_attention_heads, num_key_value_heads, head_dim, saved)

    def parameters(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """Return δ, [K, D]."""
        bias = torch.zeros(layout.num_key_value_heads, head_dim)
        return {"phase_bias": bias.uniform_(-2 * math.pi, 0) if self.phase_init == "uniform" else bias}

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Return cos and sin of the angles, each [B, T, 1, D] of `dtype`."""
        return super().tables(positions, frequencies, head_dim=2 * head_dim, dtype=dtype)

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return real and imaginary parts of softplus(q_c) e^{i t θ_c} and softplus(k_c) e^{i (s θ_c + δ_c)}."""
        cos, sin, bias = tables
        with torch.autocast(queries.device.type, enabled=False):  # with it, softplus saves float32 copies on CUDA
            queries, keys = F.softplus(queries), F.softplus(keys)
            bias = bias.to(cos.dtype)
            bias = bias + (bias.clamp(-2 * math.pi, 0) - bias).detach()
            # Rotated by δ first and then by position, so that no tensor of their sum is saved for the backward pass.
            biased = torch.cat((keys * bias.cos(), keys * bias.sin()), dim=-1)
            queries = torch.cat([(queries * part).to(queries.dtype) for part in (cos, sin)], dim=-1)
            return queries, apply_rotary(biased, cos, sin).to(keys.dtype)

    def __str__(self) -> str:
        return "PoPE"
