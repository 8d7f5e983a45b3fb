"""Rotary frequencies: the base and how it is stretched for longer contexts.

Every class takes `rope_theta` and answers two questions: the inverse frequencies θ_n = rope_theta^(-2n/d), stretched,
and the factor on cos and sin. Names here and in the paper and its code:

| here                                 | paper's table    | public code          | transformers |
|--------------------------------------|------------------|----------------------|--------------|
| `Frequencies(rope_theta=10000)`      | pre-training     | default              | `default`    |
| `Frequencies(rope_theta=500000)`     | "NTK" (new base) | new `rope_theta`     | `default`    |
| `Linear(factor=8)`                   | Linear PI        | `factor: 8`          | `linear`     |
| `YarnByRotations(factor=32)`         | YaRN             | `yarn: true`         | none         |
| `Yarn(factor=32)`                    |                  |                      | `yarn`       |
| `Llama3(factor=32)`                  |                  |                      | `llama3`     |
| `Clipped(context_length=4096)`       |                  |                      | none         |

Arithmetic is in the dtype asked for, float32 for float32 models as everywhere in the field, so that it agrees with
transformers bit for bit where transformers has the scheme.
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
    """Tokens that the scaling was made for, where it says so: factor × original_max_position_embeddings."""

    attention_factor: float = 1.0
    """Factor on cos and sin, so on scores its square (YaRN's temperature)."""

    def inverse_frequencies(
        self, head_dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Radians per position of each rotary pair.

        Args:
            head_dim: Dimensions that rotate, even.
            dtype: float32 or float64.
            device: Where to put the result.

        Returns:
            [head_dim / 2] of `dtype`, largest first.
        """
        return self._stretch(self._plain(head_dim, dtype=dtype, device=device), head_dim)

    def __str__(self) -> str:
        return f"base {self.rope_theta:g}"

    def _plain(self, head_dim: int, *, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).to(dtype) / head_dim
        return 1.0 / (self.rope_theta**exponents)

    def _stretch(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
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

    def _stretch(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        return inverse_frequencies / self.factor


class _Yarn(Frequencies, ABC):
    """What both YaRNs share (arXiv 2309.00071): a ramp between interpolated and original frequencies, a temperature.

    Args:
        rope_theta: The base of the rotary frequencies.
        factor: Longer context / original context.
        original_max_position_embeddings: Tokens of the context that the model was trained with.
        beta_fast: Rotations within the original context from which a pair is kept as it is.
        beta_slow: Rotations up to which a pair is interpolated.
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

    def _stretch(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        keep = self._keep(inverse_frequencies, head_dim)
        return inverse_frequencies / self.factor * (1 - keep) + inverse_frequencies * keep

    @abstractmethod
    def _keep(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        """Share of the original frequency that each pair keeps, from 1 (fast pairs) to 0 (slow pairs)."""


class YarnByRotations(_Yarn):
    """YaRN as the public RoPE++ code has it: the ramp is linear in the rotations within the original context."""

    def _keep(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        rotations = self.original_max_position_embeddings * inverse_frequencies / (2 * math.pi)
        return ((rotations - self.beta_slow) / (self.beta_fast - self.beta_slow)).clamp(0, 1)


class Yarn(_Yarn):
    """YaRN as transformers has it: the ramp is linear in the index of the pair, its ends rounded outwards.

    Args:
        truncate: Round the ramp's ends outwards to whole pairs.
        kwargs: Those of `YarnByRotations`.
    """

    def __init__(self, *, truncate: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.truncate = truncate

    def _keep(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        low, high = (self._pair_with(rotations, head_dim) for rotations in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # the ramp becomes a step instead of a division by zero
        pairs = torch.arange(head_dim // 2, dtype=inverse_frequencies.dtype, device=inverse_frequencies.device)
        return 1 - ((pairs - low) / (high - low)).clamp(0, 1)

    def _pair_with(self, rotations: float, head_dim: int) -> float:
        """Index (a real number) of the pair that turns `rotations` times within the original context."""
        context = self.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(self.rope_theta))


class Llama3(Frequencies):
    """The scaling of Llama 3.1 and later: slow pairs divided by `factor`, fast ones kept, a ramp in wavelength between.

    Args:
        rope_theta: The base of the rotary frequencies.
        factor: Divisor of the slow pairs.
        original_max_position_embeddings: Tokens of the context that the model was trained with.
        low_freq_factor: Pairs that turn fewer times than this within the original context are divided.
        high_freq_factor: Pairs that turn more often than this are kept.
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

    def _stretch(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        wavelengths = 2 * math.pi / inverse_frequencies
        rotations = self.original_max_position_embeddings / wavelengths
        keep = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - keep) * inverse_frequencies / self.factor + keep * inverse_frequencies
        slow = torch.where(rotations < self.low_freq_factor, inverse_frequencies / self.factor, between)
        return torch.where(rotations > self.high_freq_factor, inverse_frequencies, slow)


class Clipped(Frequencies):
    """The slowest frequencies faded out (arXiv 2602.05258) or set to 0 (p-RoPE, arXiv 2410.06205).

    A pair of frequency 0 does not turn, so it compares contents at any distance. With pairs n_0 … N-1 clipped, θ_n is
    multiplied by (1 + cos(π (n - n_0) / (N - 1 - n_0))) / 2, from 1 to 0; or by 0 without `taper`.

    Args:
        rope_theta: The base of the rotary frequencies.
        context_length: Clip the pairs that turn less than once in so many tokens.
        kept: Instead: the share of the pairs, the fastest, that is kept; p of p-RoPE.
        taper: Fade out; false sets to 0.
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
            raise UsageError("model.frequencies: Clipped needs context_length or kept, one of them")
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

    def _stretch(self, inverse_frequencies: Tensor, head_dim: int) -> Tensor:
        first = self._num_kept(head_dim)
        pairs = torch.arange(head_dim // 2, dtype=inverse_frequencies.dtype, device=inverse_frequencies.device)
        factors = (pairs < first).to(pairs.dtype)
        if self.taper:
            share = ((pairs - first) / max(1, head_dim // 2 - 1 - first)).clamp(0, 1)
            factors = (1 + (math.pi * share).cos()) / 2
        return inverse_frequencies * factors

    def _num_kept(self, head_dim: int) -> int:
        """n_0; counted on the CPU and in float64, so that it is one number for every device and dtype."""
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
