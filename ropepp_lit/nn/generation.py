"""Sampling text from a decoder, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

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


def generate(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    documents: Documents | None = None,
    chunk_tokens: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue each row, with a KV cache.

    Ranks that shard the decoder's weights (FSDP2) must all call this with the same arguments. The last bits of their
    logits may differ, so rank 0 chooses the tokens of all ranks: otherwise one rank could end a row earlier and leave
    the others waiting for its weights.

    Args:
        decoder: The model.
        input_ids: [B, T] prompt.
        max_new_tokens: How many tokens to generate.
        temperature: See :func:`sample`.
        top_p: See :func:`sample`.
        documents: Bounds where the prompt packs several documents; the last of each row is continued.
        chunk_tokens: Tokens of the prompt in one forward pass; None means all.
        generator: See :func:`sample`.

    Returns:
        An iterator of [B] int64, the next token of each row.
    """
    # FSDP2 reuses the memory of gathered weights, and training cannot use tensors made in inference mode.
    mode = torch.no_grad() if isinstance(decoder, FSDPModule) else torch.inference_mode()
    return mode(_generate)(decoder, input_ids, max_new_tokens, temperature, top_p, documents, chunk_tokens, generator)


def _generate(
    decoder: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    documents: Documents | None,
    chunk_tokens: int | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    batch_size, num_tokens = input_ids.shape
    groups, size = _groups_of_weights(decoder), chunk_tokens or num_tokens
    cache = decoder.allocate_cache(batch_size=batch_size, max_tokens=num_tokens + max_new_tokens)
    for _ in range(max_new_tokens):
        for start in range(0, input_ids.shape[1], size):
            part = slice(start, start + size)
            logits = decoder(input_ids[:, part], documents=_slice(documents, part), cache=cache, logits_to_keep=1)
        tokens = sample(logits[:, -1], temperature=temperature, top_p=top_p, generator=generator)
        for group in groups:
            dist.broadcast(tokens, group=group, group_src=0)
        yield tokens
        input_ids = tokens[:, None]
        if documents is not None:
            documents = documents._replace(ids=documents.ids[:, -1:], positions=documents.positions[:, -1:] + 1)


def _slice(documents: Documents | None, tokens: slice) -> Documents | None:
    """The bounds of some tokens of each row; with a cache only `ids` and `positions` are read."""
    if documents is None:
        return None
    return documents._replace(ids=documents.ids[:, tokens], positions=documents.positions[:, tokens])


def _groups_of_weights(decoder: Decoder) -> list[dist.ProcessGroup]:
    """The ranks that FSDP2 shards the weights over, one group per dimension of their mesh."""
    if not isinstance(decoder, FSDPModule):
        return []
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # some weights stay gathered after a forward pass
    weight = next(decoder.parameters())
    assert isinstance(weight, DTensor)
    return weight.device_mesh.get_all_groups()
