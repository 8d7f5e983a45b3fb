"""The position schemes that the RoPE++ paper compares with, as its public code runs them, and none at all.

Shapes are those of :mod:`ropepp_lit.nn.positions`. Names here and there:

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
from ropepp_lit.nn.positions import HeadLayout, PositionScheme, RoPE, turn
from ropepp_lit.nn.precision import at_least_float32

NOISE_GAIN = 0.3
"""Gain of the Xavier-normal noise in FoPE's matrices."""


class NoPE(PositionScheme):
    """No positions (arXiv 2305.19466): the causal mask alone tells order. Base and scaling have no effect."""

    uses_frequencies = False

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """None."""
        return ()

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are."""
        return queries, keys


class RNoPE(RoPE):
    """RoPE in some layers and no positions in the others (arXiv 2501.18795), as in SmolLM3.

    Args:
        nope_layers: Layers without positions, counted from 0.
    """

    def __init__(self, *, nope_layers: list[int]) -> None:
        self.nope_layers = list(nope_layers)

    def rotation(self, layer: int) -> Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]:
        """RoPE's, or that of NoPE."""
        return NoPE().rotate if layer in self.nope_layers else self.rotate

    def __str__(self) -> str:
        return f"RoPE except in layers {', '.join(map(str, self.nope_layers))}"


class PartialRoPE(RoPE):
    """RoPE on the first dimensions of each head, as in Pythia and GPT-NeoX; the rest carries no position.

    The frequencies are spread over the dimensions that rotate, d = head_dim × partial_rotary_factor of them: pair n is
    dimensions n and n + d/2. Base and scaling apply to these; YaRN's factor on cos and sin does not reach the rest.

    Args:
        partial_rotary_factor: Share of each head that rotates, above 0 and at most 1.
    """

    def __init__(self, *, partial_rotary_factor: float = 0.25) -> None:
        if not 0 < partial_rotary_factor <= 1:
            raise UsageError(
                f"model.positions.partial_rotary_factor: {partial_rotary_factor} must be above 0 and at most 1"
            )
        self.partial_rotary_factor = partial_rotary_factor

    def constants(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """None; refuses heads of which the factor is no even number of dimensions."""
        self._rotary_dim(head_dim)
        return {}

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Those of RoPE for heads of the size that rotates."""
        return super().tables(positions, frequencies, head_dim=self._rotary_dim(head_dim), dtype=dtype)

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Rotate the first dimensions."""
        rotary_dim = 2 * tables[0].shape[-1]
        turned = super().rotate(queries[..., :rotary_dim], keys[..., :rotary_dim], tables)
        queries, keys = (
            torch.cat((first, whole[..., rotary_dim:]), dim=-1)
            for first, whole in zip(turned, (queries, keys), strict=True)
        )
        return queries, keys

    def __str__(self) -> str:
        return f"PartialRoPE on {self.partial_rotary_factor:g} of each head"

    def _rotary_dim(self, head_dim: int) -> int:
        found = head_dim * self.partial_rotary_factor
        rotary_dim = round(found)
        if rotary_dim < 2 or rotary_dim % 2 or not math.isclose(found, rotary_dim):
            raise UsageError(
                f"model.positions.partial_rotary_factor: {self.partial_rotary_factor} of {head_dim} dimensions is "
                f"{found:g}; it must be an even number"
            )
        return rotary_dim


class FoPE(RoPE):
    """Fourier position embedding (arXiv 2412.17739): cos and sin that are mixtures of several frequencies.

    Frequencies below 2π / context_length are dropped: they turn less than once in the context that the model is trained
    with. Let θ_1 … θ_N be those that are left, and W = min(N, head_dim / 4). For key/value head h and w ≤ W

        C_hw(t) = Σ_n A_hnw cos(θ_n t)        S_hw(t) = Σ_n B_hnw sin(θ_n t)

    and C = S = 1 for the pairs beyond W, which so carry no position. Pair w of the head's keys, and of all queries that
    read them, is multiplied by C + i·S as RoPE multiplies by cos + i·sin. A and B are random, differ by layer and
    key/value head, and are not trained: a one in column w of row w·⌈N/W⌉ (counted from 0), if there is such a row, plus
    Xavier-normal noise of gain 0.3. As in the public code that is drawn for all heads at once, torch counting [K, N, W]
    as a kernel, so its standard deviation is 0.3 √(2 / (W (N + K))). Mixtures and products are computed in float32
    (float64 in a float64 model).

    Base and scaling decide the frequencies before any is dropped; YaRN's factor does not reach the pairs of 1. The
    matrices of a checkpoint fit other frequencies if as many of them are kept: with `Linear`, and with a YaRN for
    `context_length` × `factor`, that is so; another base is refused in most cases.

    Args:
        context_length: Tokens of the context that the model is trained with.
    """

    def __init__(self, *, context_length: int = 4096) -> None:
        if not context_length > 0:
            raise UsageError(f"model.positions.context_length: {context_length} must be above 0")
        self.context_length = context_length

    def constants(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """A and B, [K, N, W] each."""
        kept = self._num_kept(frequencies, head_dim)
        if not kept:
            raise UsageError(
                f"model.positions.context_length: in {self.context_length} tokens no frequency turns once; give more"
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
        """Cos and sin of position × frequency, each [B, T, D/2] of `dtype`; the first N are kept."""
        cos, sin = super().tables(positions, frequencies, head_dim=head_dim, dtype=dtype)
        return cos.squeeze(2), sin.squeeze(2)

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Multiply queries and keys by the mixtures of their key/value head."""
        cos, sin, cos_coef, sin_coef = tables
        cos, sin = (
            _mix(waves, coefficients, keys.shape[-1] // 2) for waves, coefficients in ((cos, cos_coef), (sin, sin_coef))
        )
        groups = queries.unflatten(2, (keys.shape[2], -1))
        return turn(groups, cos.unsqueeze(3), sin.unsqueeze(3)).flatten(2, 3), turn(keys, cos, sin)

    def __str__(self) -> str:
        return f"FoPE for {self.context_length:,} tokens"

    def _num_kept(self, frequencies: Frequencies, head_dim: int) -> int:
        """N; counted on the CPU and in float64, so that it is one number for every device and dtype."""
        inverse = frequencies.inverse_frequencies(head_dim, dtype=torch.float64, device="cpu")
        return int((inverse >= 2 * math.pi / self.context_length).sum())


def _mix(waves: Tensor, coefficients: Tensor, num_pairs: int) -> Tensor:
    """The first N of [B, T, D/2] times [K, N, W], filled up with ones to [B, T, K, num_pairs]."""
    waves = waves[..., : coefficients.shape[1]]
    with torch.autocast(waves.device.type, enabled=False):
        mixed = torch.einsum("btn,knw->btkw", waves, coefficients.to(waves.dtype))
    return F.pad(mixed, (0, num_pairs - mixed.shape[-1]), value=1.0)


class ALiBi(PositionScheme):
    """Attention with linear biases (arXiv 2108.12409): -m_h (t - s) on the score of query position t, key position s.

    m_h = 2^(-8h/H), h = 1 … H, for H attention heads that are a power of two. For other H: the slopes of the power of
    two below, then every second slope (h = 1, 3, 5, …) of the power of two above. Base and scaling have no effect.

    There is no mask of biases: eight dimensions in front of each query and key add m_h s - m_h t to their product, so
    memory stays linear, and every attention kernel, packed documents and the KV cache work as they are. To be right in
    bfloat16 too, s goes as its bytes (exact below 2^24) and m_h as the sum of two numbers; m_h t is the same for a
    whole row of scores, so it need only be near. Cost: KV cache and attention's arithmetic grow by 8 / head_dim.

    Against explicit biases in float64 (normal random queries, keys and values; H = 6 and 8, D = 64 and 128, on a CPU)
    outputs of root mean square 0.3 differ by 1e-6 at most in float32 and by 8e-3 in bfloat16, which is bfloat16's own
    rounding; the same at 4,096 and at 65,536 tokens. Far keys get weights below float32's normal numbers, on which CPUs
    are slow: call `torch.set_flush_denormal(True)` first, as `ropepp-lit fit` does (twice as fast at 4,096 tokens).
    """

    uses_frequencies = False

    def head_layout(self, *, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> HeadLayout:
        """Heads of the plain model, each with eight dimensions more."""
        return HeadLayout(num_attention_heads, num_attention_heads, num_key_value_heads, extra_dims=8)

    def constants(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """log₂ m_h, [H]: of few bits, so exact in every dtype."""
        heads = layout.num_attention_heads
        power = 1 << (heads.bit_length() - 1)  # the power of two at or below
        exponents = [-8 * h / power for h in range(1, power + 1)]
        exponents += [-8 * h / (2 * power) for h in range(1, 2 * power, 2)][: heads - power]
        return {"slope_exponents": torch.tensor(exponents)}

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """The positions, as integers."""
        return (positions,)

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Put eight dimensions in front; queries and keys themselves stay as they are."""
        positions, exponents = tables
        precision = at_least_float32(queries.dtype)
        slopes = exponents.to(precision).exp2() * math.sqrt(queries.shape[-1])  # attention divides by this root
        own, own_rest = _split(slopes * positions.to(precision)[..., None] / 256)
        coarse, fine = (part.expand_as(own) for part in _split(slopes))
        # In this order partial sums stay small, as m t is taken off m s before anything is added.
        of_query = (256 * coarse, 256 * coarse, coarse, own, own_rest, 256 * fine, 256 * fine, fine)
        s_bytes = (256 * (positions >> 16), (positions >> 8) & 255, positions & 255)
        minus = torch.full_like(positions, -256)
        of_key = torch.stack((*s_bytes, minus, minus, *s_bytes), dim=-1).unsqueeze(2).expand(-1, -1, keys.shape[2], -1)
        return (
            torch.cat((torch.stack(of_query, dim=-1).to(queries.dtype), queries), dim=-1),
            torch.cat((of_key.to(keys.dtype), keys), dim=-1),
        )


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """A number of bfloat16 and what it lacks of x, both in the dtype of x."""
    coarse = x.to(torch.bfloat16).to(x.dtype)
    return coarse, x - coarse
