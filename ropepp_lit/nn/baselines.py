"""Position schemes that the RoPE++ paper compares with, as in its public code, and schemes without positions.

Shapes are those of :mod:`ropepp_lit.nn.positions`. Names here, in the paper and in its code:

| here          | paper's tables | public code             |
|---------------|----------------|-------------------------|
| `PartialRoPE` | Pythia         | `modeling_llama_pythia` |
| `FoPE`        | FoPE           | `modeling_llama_fope`   |
| `ALiBi`       | ALiBi          | `modeling_llama_alibi`  |
| `NoPE`        |                |                         |
| `RNoPE`       |                |                         |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.frequencies import Frequencies
from ropepp_lit.nn.positions import HeadLayout, PositionScheme, RoPE, apply_rotary
from ropepp_lit.nn.precision import at_least_float32

NOISE_GAIN = 0.3
"""Gain of the Xavier-normal noise in FoPE's coefficient matrices."""


class NoPE(PositionScheme):
    """No position encoding (arXiv 2305.19466); order is only in the causal mask. Base and scaling have no effect."""

    uses_frequencies = False

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Return no tables."""
        return ()

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return queries and keys unchanged."""
        return queries, keys


class RNoPE(RoPE):
    """RoPE in some layers and no positions in the others (arXiv 2501.18795), as in SmolLM3.

    Args:
        nope_layers: Layers without positions, counted from 0.
    """

    def __init__(self, *, nope_layers: list[int]) -> None:
        self.nope_layers = list(nope_layers)

    def rotation(self, layer: int) -> Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]:
        """Return the rotation of RoPE or of NoPE."""
        return NoPE().rotate if layer in self.nope_layers else self.rotate

    def __str__(self) -> str:
        return f"RoPE except in layers {', '.join(map(str, self.nope_layers))}"


class PartialRoPE(RoPE):
    """RoPE on the first dimensions of each head, as in Pythia and GPT-NeoX; the rest has no position encoding.

    The frequencies are spread over the d = head_dim × partial_rotary_factor rotated dimensions: pair n is dimensions n
    and n + d/2. Base, scaling and YaRN's attention factor apply only to these.

    Args:
        partial_rotary_factor: Fraction of each head that rotates, above 0 and at most 1.
    """

    def __init__(self, *, partial_rotary_factor: float = 0.25) -> None:
        if not 0 < partial_rotary_factor <= 1:
            raise UsageError(
                f"model.positions.partial_rotary_factor: {partial_rotary_factor} must be above 0 and at most 1"
            )
        self.partial_rotary_factor = partial_rotary_factor

    def constants(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """Return no constants; check that the factor gives an even number of dimensions."""
        self._rotary_dim(head_dim)
        return {}

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Return RoPE's tables for the rotated dimensions."""
        return super().tables(positions, frequencies, head_dim=self._rotary_dim(head_dim), dtype=dtype)

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Rotate the first dimensions."""
        rotary_dim = 2 * tables[0].shape[-1]
        rotated = super().rotate(queries[..., :rotary_dim], keys[..., :rotary_dim], tables)
        queries, keys = (
            torch.cat((first, x[..., rotary_dim:]), dim=-1) for first, x in zip(rotated, (queries, keys), strict=True)
        )
        return queries, keys

    def __str__(self) -> str:
        return f"PartialRoPE on {self.partial_rotary_factor:g} of each head"

    def _rotary_dim(self, head_dim: int) -> int:
        product = head_dim * self.partial_rotary_factor
        rotary_dim = round(product)
        if rotary_dim < 2 or rotary_dim % 2 or not math.isclose(product, rotary_dim):
            raise UsageError(
                f"model.positions.partial_rotary_factor: {self.partial_rotary_factor} of {head_dim} dimensions is "
                f"{product:g}; it must be an even number"
            )
        return rotary_dim


class FoPE(RoPE):
    """Fourier position embedding (arXiv 2412.17739): cos and sin are mixtures of multiple frequencies.

    Frequencies below 2π / context_length are dropped: they complete less than one rotation in the training context. Let
    θ_1 … θ_N be the remaining ones, and W = min(N, head_dim / 4). For key/value head h and w ≤ W

        C_hw(t) = Σ_n A_hnw cos(θ_n t)        S_hw(t) = Σ_n B_hnw sin(θ_n t)

    and C = S = 1 for the pairs beyond W, which therefore encode no position. Pair w of the head's keys, and of all
    queries that read them, is multiplied by C + i·S as RoPE multiplies by cos + i·sin. A and B are random, differ by
    layer and key/value head, and are not trained: a one in column w of row w·⌈N/W⌉ (counted from 0), if that row
    exists, plus Xavier-normal noise of gain 0.3. As in the public code, the noise is sampled for all heads at once and
    torch treats [K, N, W] as a kernel, so its standard deviation is 0.3 √(2 / (W (N + K))). Mixtures and products are
    computed in float32 (float64 in a float64 model).

    Base and scaling determine the frequencies before any is dropped; YaRN's attention factor does not apply to the
    pairs of 1. A checkpoint's matrices can be used with other frequencies if as many of them remain: this is so with
    `Linear`, and with a YaRN for `context_length` × `factor`; another base is refused in most cases.

    Args:
        context_length: Tokens of the training context.
    """

    def __init__(self, *, context_length: int = 4096) -> None:
        if not context_length > 0:
            raise UsageError(f"model.positions.context_length: {context_length} must be above 0")
        self.context_length = context_length

    def constants(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """Return A and B, [K, N, W] each."""
        kept = self._num_kept(frequencies, head_dim)
        if not kept:
            raise UsageError(
                f"model.positions.context_length: no frequency completes a rotation in {self.context_length} tokens; "
                "set a larger value"
            )
        width = min(kept, head_dim // 4)
        if not width:
            raise UsageError(f"model.decoder.head_dim: {head_dim} is too small; FoPE needs 4 or more")
        step = math.ceil(kept / width)
        identity = torch.zeros(kept, width)
        identity[::step] = torch.eye(math.ceil(kept / step), width)
        shape = (layout.num_key_value_heads, kept, width)
        return {
            name: identity + nn.init.xavier_normal_(torch.empty(shape), gain=NOISE_GAIN)
            for name in ("cos_coef", "sin_coef")
        }

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Return cos and sin of the angles, each [B, T, D/2] of `dtype`; `rotate` uses the first N."""
        cos, sin = super().tables(positions, frequencies, head_dim=head_dim, dtype=dtype)
        return cos.squeeze(2), sin.squeeze(2)

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Multiply queries and keys by the mixtures of their key/value head."""
        cos, sin, cos_coef, sin_coef = tables
        cos, sin = (
            _mix(waves, coefficients, keys.shape[-1] // 2) for waves, coefficients in ((cos, cos_coef), (sin, sin_coef))
        )
        groups = queries.unflatten(2, (keys.shape[2], -1))
        return apply_rotary(groups, cos.unsqueeze(3), sin.unsqueeze(3)).flatten(2, 3), apply_rotary(keys, cos, sin)

    def __str__(self) -> str:
        return f"FoPE for {self.context_length:,} tokens"

    def _num_kept(self, frequencies: Frequencies, head_dim: int) -> int:
        """Return N, counted on the CPU in float64, so that it is the same for every device and dtype."""
        inverse = frequencies.inverse_frequencies(head_dim, dtype=torch.float64, device="cpu")
        return int((inverse >= 2 * math.pi / self.context_length).sum())


def _mix(waves: Tensor, coefficients: Tensor, num_pairs: int) -> Tensor:
    """Return the first N of [B, T, D/2] times [K, N, W], padded with ones to [B, T, K, num_pairs]."""
    waves = waves[..., : coefficients.shape[1]]
    with torch.autocast(waves.device.type, enabled=False):
        mixed = torch.einsum("btn,knw->btkw", waves, coefficients.to(waves.dtype))
    return F.pad(mixed, (0, num_pairs - mixed.shape[-1]), value=1.0)


class ALiBi(PositionScheme):
    """Attention with linear biases (arXiv 2108.12409): -m_h (t - s) on the score of query position t, key position s.

    m_h = 2^(-8h/H), h = 1 … H, for H attention heads that are a power of two. For other H: the slopes of the power of
    two below, then every second slope (h = 1, 3, 5, …) of the power of two above. Base and scaling have no effect.

    No bias matrix is built: eight dimensions prepended to each query and key add m_h s - m_h t to their product, so
    memory is linear in T, and all attention kernels, packed documents and the KV cache need no change. For accuracy in
    bfloat16, s is encoded as its bytes (exact below 2^24) and m_h as the sum of two numbers; m_h t is constant within a
    row of scores, so an approximation is enough. Cost: the KV cache and attention's FLOPs grow by 8 / head_dim.

    Against explicit biases in float64 (normal random queries, keys and values; H = 6 and 8, D = 64 and 128, on a CPU)
    outputs of root mean square 0.3 differ by at most 1e-6 in float32 and 8e-3 in bfloat16, which is bfloat16's own
    rounding; the same at 4,096 and at 65,536 tokens. Weights of distant keys are denormal in float32, which is slow on
    CPUs: call `torch.set_flush_denormal(True)` first, as `ropepp-lit fit` does (twice as fast at 4,096 tokens).
    """

    uses_frequencies = False

    def head_layout(self, *, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> HeadLayout:
        """Return the head counts of the plain model, with eight extra dimensions."""
        return HeadLayout(num_attention_heads, num_attention_heads, num_key_value_heads, extra_dims=8)

    def constants(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """Return log₂ m_h, [H], which has few bits and is exact in every dtype."""
        heads = layout.num_attention_heads
        power = 1 << (heads.bit_length() - 1)  # the power of two at or below
        exponents = [-8 * h / power for h in range(1, power + 1)]
        exponents += [-8 * h / (2 * power) for h in range(1, 2 * power, 2)][: heads - power]
        return {"slope_exponents": torch.tensor(exponents)}

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Return the positions as integers."""
        return (positions,)

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Prepend eight dimensions to queries and keys."""
        positions, exponents = tables
        precision = at_least_float32(queries.dtype)
        slopes = exponents.to(precision).exp2() * math.sqrt(queries.shape[-1])  # attention divides by this root
        own, own_rest = _split(slopes * positions.to(precision)[..., None] / 256)
        coarse, fine = (part.expand_as(own) for part in _split(slopes))
        # This order keeps partial sums small: m t is subtracted from m s before anything is added.
        query_parts = (256 * coarse, 256 * coarse, coarse, own, own_rest, 256 * fine, 256 * fine, fine)
        s_bytes = (256 * (positions >> 16), (positions >> 8) & 255, positions & 255)
        minus = torch.full_like(positions, -256)
        key_parts = torch.stack((*s_bytes, minus, minus, *s_bytes), dim=-1).unsqueeze(2)  # [B, T, 1, 8]
        return (
            torch.cat((torch.stack(query_parts, dim=-1).to(queries.dtype), queries), dim=-1),
            torch.cat((key_parts.expand(-1, -1, keys.shape[2], -1).to(keys.dtype), keys), dim=-1),
        )


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x rounded to bfloat16 and the remainder, both in the dtype of x."""
    coarse = x.to(torch.bfloat16).to(x.dtype)
    return coarse, x - coarse
