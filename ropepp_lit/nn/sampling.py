"""Sampling of the next token from logits.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.precision import at_least_float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters, applied in this order, as transformers' logits processors of the same names."""

    repetition_penalty: float = 1.0
    """Penalty of tokens that the row already contains, in the prompt too: positive logits are divided by it, negative
    ones multiplied (arXiv 1909.05858); 1 means none."""

    temperature: float = 0.0
    """Divisor of the logits; 0 selects the most likely token (greedy) and ignores the parameters below."""

    top_k: int = 0
    """Sample from the k most likely tokens, and those as likely as the last of them; 0 means all."""

    top_p: float = 1.0
    """Sample from the smallest set of tokens whose total probability reaches this (arXiv 1904.09751)."""

    min_p: float = 0.0
    """Minimum probability of a token, as a fraction of that of the most likely one (arXiv 2407.01082)."""

    def check(self, prefix: str = "") -> Sampling:
        """Return the parameters, or raise a UsageError that names the key after `prefix`."""
        if not self.repetition_penalty > 0:
            raise UsageError(
                f"{prefix}repetition_penalty: {self.repetition_penalty} must be above 0; 1 means no penalty"
            )
        if not self.temperature >= 0:
            raise UsageError(f"{prefix}temperature: {self.temperature} must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"{prefix}top_k: {self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"{prefix}top_p: {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"{prefix}min_p: {self.min_p} must be 0 (off) to 1")
        return self


def sample(logits: Tensor, sampling: Sampling, *, random: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """Sample the next token of each row.

    Args:
        logits: [B, V].
        sampling: Sampling parameters.
        random: [B] float64, uniform in [0, 1); not used with temperature 0.
        seen: [B, V] bool, true for the tokens that each row contains; used for `repetition_penalty` only.

    Returns:
        [B] int64.
    """
    scores = process(logits, sampling, seen)
    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    assert random is not None
    # In vocabulary order, so that tokens of nearly equal probability are not reordered by rounding.
    sums = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    sampled = torch.minimum(random[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, sampled, right=True).squeeze(-1)


def process(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Return the processed logits, equal to those of transformers' processors of the same names.

    Args:
        logits: See :func:`sample`.
        sampling: See :func:`sample`.
        seen: See :func:`sample`.

    Returns:
        [B, V], float32 or float64; -inf for excluded tokens.
    """
    scores = logits.to(at_least_float32(logits.dtype))
    if sampling.repetition_penalty != 1:
        assert seen is not None
        penalty = sampling.repetition_penalty
        scores = scores.where(~seen, torch.where(scores < 0, scores * penalty, scores / penalty))
    if sampling.temperature == 0:
        return scores
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, tokens = scores.sort(dim=-1)
        is_excluded = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        is_excluded[:, -1] = False
        scores = scores.masked_fill(torch.empty_like(is_excluded).scatter_(-1, tokens, is_excluded), -torch.inf)
    if sampling.min_p > 0:
        probabilities = scores.softmax(dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -torch.inf)
    return scores


class RandomNumbers:
    """Uniform random numbers for rows, with a separate generator per row.

    Args:
        seeds: Seed of each row.
        device: Device of the results; the numbers are generated on the CPU, so they are the same for every device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device
        self._buffer = torch.empty(len(seeds), 0)
        self._used = 0

    def next(self) -> Tensor:
        """Return [B] float64 in [0, 1)."""
        if self._used == self._buffer.shape[1]:
            size = 64  # constant, so that the numbers of a row do not depend on how many are used
            rows = [torch.rand(size, generator=generator, dtype=torch.float64) for generator in self._generators]
            self._buffer, self._used = torch.stack(rows).to(self._device), 0
        self._used += 1
        return self._buffer[:, self._used - 1]

    def keep_rows(self, numbers: Sequence[int]) -> None:
        """Drop all other rows."""
        self._generators = [self._generators[number] for number in numbers]
        self._buffer = self._buffer[list(numbers)]


def seed_of(seed: int, index: int) -> int:
    """Return the seed of prompt number `index`: 63 bits that depend only on the two arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1
