"""Sampling text from a decoder, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.decoder import Decoder
from ropepp_lit.nn.documents import Documents


def check_sampling(prefix: str, temperature: float, top_p: float) -> tuple[float, float]:
    """Settings of :func:`sample`, or a UsageError that names the key after `prefix`."""
    if temperature < 0:
        raise UsageError(f"{prefix}temperature: {temperature} must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"{prefix}top_p: {top_p} must be above 0 and at most 1")
    return temperature, top_p


def sample(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Choose the next token of each row.

    Args:
        logits: [B, vocab_size].
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Sample from the smallest set of tokens whose probability reaches this (arXiv 1904.09751).
        generator: Source of the random numbers.

    Returns:
        [B] int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.where(before < top_p, 0.0)
    choice = torch.multinomial(probabilities, num_samples=1, generator=generator)
    return tokens.gather(-1, choice).squeeze(-1)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    documents: Documents | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue each row, with a KV cache.

    Args:
        decoder: The model.
        input_ids: [B, T] prompt.
        max_new_tokens: How many tokens to make.
        temperature: See :func:`sample`.
        top_p: See :func:`sample`.
        documents: Bounds where the prompt packs several documents; the last of each row is continued.
        generator: See :func:`sample`.

    Yields:
        [B] int64, the next token of each row.
    """
    batch_size, num_tokens = input_ids.shape
    cache = decoder.allocate_cache(batch_size=batch_size, max_tokens=num_tokens + max_new_tokens)
    for _ in range(max_new_tokens):
        logits = decoder(input_ids, documents=documents, cache=cache, logits_to_keep=1)[:, -1]
        tokens = sample(logits, temperature=temperature, top_p=top_p, generator=generator)
        yield tokens
        input_ids = tokens[:, None]
        if documents is not None:
            # With a cache only the ids and positions are read.
            documents = documents._replace(ids=documents.ids[:, -1:], positions=documents.positions[:, -1:] + 1)
