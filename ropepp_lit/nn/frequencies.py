"""Rotary frequencies: the base, and its scaling for longer contexts.

Every class takes `rope_theta` and provides the scaled inverse frequencies θ_n = rope_theta^(-2n/d) and a factor on cos
and sin. Names here, in the paper and in its code:

| here                                 | paper's table    | public code          | transformers |
|--------------------------------------|------------------|----------------------|--------------|
| `Frequencies(rope_theta=10000)`      | pre-training     | default              | `default`    |
| `Frequencies(rope_theta=500000)`     | "NTK" (new base) | new `rope_theta`     | `default`    |
| `Linear(factor=8)`                   | Linear PI        | `factor: 8`          | `linear`     |
| `YarnByRotations(factor=32)`         | YaRN             | `yarn: true`         | none         |
| `Yarn(factor=32)`                    |                  |                      | `yarn`       |
| `Llama3(factor=32)`                  |                  |                      | `llama3`     |
| `Clipped(context_length=4096)`       |                  |                      | none         |

Computed in the requested dtype, float32 for float32 models as is usual, so that results are bit for bit those of
transformers where transformers has the scheme.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ropepp_lit.errors import UsageError


class Frequencies:
    """Plain rotary frequencies. The paper's "NTK" stage is this with `rope_theta` 500000.

    Args:
        rope_theta: The base of the rotary frequencies.
    """

    def __init__(self, *, rope_theta: float = 10_000.0) -> None:
        if not rope_theta > 1:
            raise UsageError(f"model.frequencies.rope_theta: {rope_theta} must be above 1")
        self.rope_theta = rope_theta

    reach: int | None = None
    """Context length that the scaling is meant for, factor × original_max_position_embeddings; None where unknown."""

    attention_factor: float = 1.0
    """Factor on cos and sin, so scores are scaled by its square (YaRN's temperature)."""

    def inverse_frequencies(
        self, head_dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Return the radians per position of each rotary pair.

        Args:
            head_dim: Number of rotated dimensions, even.
            dtype: float32 or float64.
            device: Device of the result.

        Returns:
            [head_dim / 2] of `dtype`, largest first.
        """
        return self._scale(self._plain(head_dim, dtype=dtype, device=device), head_dim)

    def __str__(self) -> str:
        return f"base {self.rope_theta:g}"

    def _plain(self, head_dim: int, *, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).to(dtype) / head_dim
        return 1.0 / (self.rope_theta**exponents)

    def _scale(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        return inverse_frequencies


class Linear(Frequencies):
    """Linear position interpolation (arXiv 2306.15595): all frequencies divided by `factor`.

    Args:
        rope_theta: The base of the rotary frequencies.
        factor: Longer context / original context.
    """

    def __init__(self, *, rope_theta: float = 10_000.0, factor: float) -> None:
        super().__init__(rope_theta=rope_theta)
        self.factor = _require_factor(factor)

    def __str__(self) -> str:
        return f"{super().__str__()}, linear / {self.factor:g}"

    def _scale(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        return inverse_frequencies / self.factor


class _Yarn(Frequencies, ABC):
    """Base class of YaRN (arXiv 2309.00071): a ramp between interpolated and original frequencies, and a temperature.

    Args:
        rope_theta: The base of the rotary frequencies.
        factor: Longer context / original context.
        original_max_position_embeddings: Tokens of the original training context.
        beta_fast: Pairs with at least this many rotations in the original context keep their frequency.
        beta_slow: Pairs with at most this many rotations are interpolated.
        attention_factor: Factor on cos and sin; empty means 0.1 ln(factor) + 1.
    """

    def __init__(
        self,
        *,
        rope_theta: float = 10_000.0,
        factor: float,
        original_max_position_embeddings: int = 4096,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
    ) -> None:
        super().__init__(rope_theta=rope_theta)
        self.factor = _require_factor(factor)
        self.original_max_position_embeddings = _require_context(original_max_position_embeddings)
        self.reach = round(factor * original_max_position_embeddings)
        if not beta_fast > beta_slow > 0:
            raise UsageError(
                f"model.frequencies.beta_fast: {beta_fast} must be above beta_slow ({beta_slow}), both above 0"
            )
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.attention_factor = 0.1 * math.log(factor) + 1.0 if attention_factor is None else attention_factor

    def __str__(self) -> str:
        return (
            f"{super().__str__()}, {type(self).__name__} × {self.factor:g} "
            f"from {self.original_max_position_embeddings:,} tokens"
        )

    def _scale(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        share = self._original_share(inverse_frequencies, head_dim)
        return inverse_frequencies / self.factor * (1 - share) + inverse_frequencies * share

    @abstractmethod
    def _original_share(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        """Return the weight of the original frequency for each pair, from 1 (fast pairs) to 0 (slow pairs)."""


class YarnByRotations(_Yarn):
    """YaRN as in the public RoPE++ code: the ramp is linear in the rotations within the original context."""

    def _original_share(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        rotations = self.original_max_position_embeddings * inverse_frequencies / (2 * math.pi)
        return ((rotations - self.beta_slow) / (self.beta_fast - self.beta_slow)).clamp(0, 1)


class Yarn(_Yarn):
    """YaRN as in transformers: the ramp is linear in the index of the pair, with its ends rounded outwards.

    Args:
        truncate: Round the ends of the ramp outwards to integers.
        kwargs: Arguments of `YarnByRotations`.
    """

    def __init__(self, *, truncate: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.truncate = truncate

    def _original_share(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        low, high = (self._pair_with(rotations, head_dim) for rotations in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # a step instead of a division by zero
        pairs = torch.arange(head_dim // 2, dtype=inverse_frequencies.dtype, device=inverse_frequencies.device)
        return 1 - ((pairs - low) / (high - low)).clamp(0, 1)

    def _pair_with(self, rotations: float, head_dim: int) -> float:
        """Return the (real-valued) index of the pair with this many rotations in the original context."""
        context = self.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(self.rope_theta))


class Llama3(Frequencies):
    """Scaling of Llama 3.1 and later: divides slow pairs by `factor` and keeps fast ones, with a ramp between them.

    Args:
        rope_theta: The base of the rotary frequencies.
        factor: Divisor of the slow pairs.
        original_max_position_embeddings: Tokens of the original training context.
        low_freq_factor: Pairs with fewer rotations than this in the original context are divided.
        high_freq_factor: Pairs with more rotations than this keep their frequency.
    """

    def __init__(
        self,
        *,
        rope_theta: float = 500_000.0,
        factor: float = 8.0,
        original_max_position_embeddings: int = 8192,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
    ) -> None:
        super().__init__(rope_theta=rope_theta)
        self.factor = _require_factor(factor)
        self.original_max_position_embeddings = _require_context(original_max_position_embeddings)
        self.reach = round(factor * original_max_position_embeddings)
        if not high_freq_factor > low_freq_factor > 0:
            raise UsageError(
                f"model.frequencies.high_freq_factor: {high_freq_factor} must be above low_freq_factor "
                f"({low_freq_factor}), both above 0"
            )
        self.low_freq_factor, self.high_freq_factor = low_freq_factor, high_freq_factor

    def __str__(self) -> str:
        return f"{super().__str__()}, Llama3 × {self.factor:g} from {self.original_max_position_embeddings:,} tokens"

    def _scale(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        wavelengths = 2 * math.pi / inverse_frequencies
        rotations = self.original_max_position_embeddings / wavelengths
        share = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - share) * inverse_frequencies / self.factor + share * inverse_frequencies
        slow = torch.where(rotations < self.low_freq_factor, inverse_frequencies / self.factor, between)
        return torch.where(rotations > self.high_freq_factor, inverse_frequencies, slow)


class Clipped(Frequencies):
    """Frequencies whose slowest pairs are tapered to 0 (arXiv 2602.05258) or set to 0 (p-RoPE, arXiv 2410.06205).

    A pair of frequency 0 does not rotate, so its scores do not depend on distance. With pairs n_0 … N-1 clipped, θ_n is
    multiplied by (1 + cos(π (n - n_0) / (N - 1 - n_0))) / 2, from 1 to 0; or by 0 without `taper`.

    Args:
        rope_theta: The base of the rotary frequencies.
        context_length: Clip the pairs with less than one rotation in this many tokens.
        kept: Alternative to context_length: the fraction of the pairs, the fastest, that is kept; p of p-RoPE.
        taper: Taper the clipped frequencies; false sets them to 0.
    """

    def __init__(
        self,
        *,
        rope_theta: float = 10_000.0,
        context_length: int | None = None,
        kept: float | None = None,
        taper: bool = True,
    ) -> None:
        super().__init__(rope_theta=rope_theta)
        if (context_length is None) == (kept is None):
            raise UsageError("model.frequencies: Clipped needs either context_length or kept; set one of them")
        if context_length is not None and context_length < 1:
            raise UsageError(f"model.frequencies.context_length: {context_length} must be 1 or more")
        if kept is not None and not 0 <= kept <= 1:
            raise UsageError(f"model.frequencies.kept: {kept} must be from 0 to 1")
        self.context_length, self.kept, self.taper = context_length, kept, taper

    def __str__(self) -> str:
        how = "faded out" if self.taper else "set to 0"
        if self.kept is not None:
            return f"{super().__str__()}, all but {self.kept:.0%} {how}"
        return f"{super().__str__()}, {how} below one turn in {self.context_length:,} tokens"

    def _scale(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        first = self._num_kept(head_dim)
        pairs = torch.arange(head_dim // 2, dtype=inverse_frequencies.dtype, device=inverse_frequencies.device)
        factors = (pairs < first).to(pairs.dtype)
        if self.taper:
            share = ((pairs - first) / max(1, head_dim // 2 - 1 - first)).clamp(0, 1)
            factors = (1 + (math.pi * share).cos()) / 2
        return inverse_frequencies * factors

    def _num_kept(self, head_dim: int) -> int:
        """Return n_0, counted on the CPU in float64, so that it is the same for every device and dtype."""
        if self.kept is not None:
            return round(self.kept * (head_dim // 2))
        plain = self._plain(head_dim, dtype=torch.float64, device="cpu")
        return int((plain >= 2 * math.pi / (self.context_length or 1)).sum())


def _require_factor(factor: float) -> float:
    if not 1 <= factor < math.inf:
        raise UsageError(f"model.frequencies.factor: {factor} must be 1 or more, and finite")
    return factor


def _require_context(tokens: int) -> int:
    if not tokens > 0:
        raise UsageError(f"model.frequencies.original_max_position_embeddings: {tokens} must be above 0")
    return tokens
