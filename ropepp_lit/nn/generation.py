"""Autoregressive generation with a KV cache.

:func:`generate` continues rows of one length, :class:`Batch` prompts of different lengths, and :class:`Row` a single
conversation whose prompts share a prefix.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ropepp_lit.nn.cache import KVCache
from ropepp_lit.nn.decoder import Decoder
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.sampling import RandomNumbers, Sampling, sample

GREEDY = Sampling()

CHUNK_TOKENS = 4096
"""Maximum number of prompt tokens per forward pass."""


def generate(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    documents: Documents | None = None,
    chunk_tokens: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Generate continuations of prompts of one length.

    Ranks that shard the decoder's weights (FSDP2) must all call this with the same arguments. Their logits may differ
    by rounding, so rank 0 samples the tokens of all ranks: otherwise one rank could finish a row earlier and the others
    would wait for its weights.

    Args:
        decoder: The model.
        input_ids: [B, T] prompt.
        max_new_tokens: Number of tokens to generate.
        sampling: Sampling parameters; `repetition_penalty` applies to all tokens of the prompt, so it requires rows
            without `documents`.
        documents: Bounds of documents if the prompt is packed; the last document of each row is continued.
        chunk_tokens: Prompt tokens per forward pass; None means all.
        generator: Random number generator on the decoder's device.

    Returns:
        An iterator of [B] int64, the next token of each row.
    """
    assert documents is None or sampling.repetition_penalty == 1
    # FSDP2 reuses the memory of gathered weights, and training cannot use tensors created in inference mode.
    mode = torch.no_grad() if isinstance(decoder, FSDPModule) else torch.inference_mode()
    return mode(_generate)(decoder, input_ids, max_new_tokens, sampling, documents, chunk_tokens, generator)


def _generate(
    decoder: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    documents: Documents | None,
    chunk_tokens: int | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    batch_size, num_tokens = input_ids.shape
    groups, size = _groups_of_weights(decoder), chunk_tokens or num_tokens
    cache = decoder.allocate_cache(batch_size=batch_size, max_tokens=num_tokens + max_new_tokens)
    seen = _seen(decoder, input_ids) if sampling.repetition_penalty != 1 else None
    random = None
    for _ in range(max_new_tokens):
        for start in range(0, input_ids.shape[1], size):
            part = slice(start, start + size)
            logits = decoder(input_ids[:, part], documents=_slice(documents, part), cache=cache, logits_to_keep=1)
        if sampling.temperature > 0:
            random = torch.rand(batch_size, dtype=torch.float64, device=input_ids.device, generator=generator)
        tokens = sample(logits[:, -1], sampling, random=random, seen=seen)
        for group in groups:
            dist.broadcast(tokens, group=group, group_src=0)
        yield tokens
        input_ids = tokens[:, None]
        if seen is not None:
            seen.scatter_(1, input_ids, True)
        if documents is not None:
            documents = documents._replace(ids=documents.ids[:, -1:], positions=documents.positions[:, -1:] + 1)


class Batch:
    """Batched generation for prompts of different lengths, with the results of unbatched generation.

    Prompts are packed in the prefill, without padding, and their keys and values are right-aligned in the cache: empty
    slots before shorter prompts are masked, and each row has its own positions. Compared to the same prompt alone, only
    the order of summation may differ, so logits agree up to rounding (about 1e-15 relative in float64), and greedy
    tokens are the same unless two are equally likely to that precision. The random numbers of a row depend only on its
    seed.

    Args:
        decoder: The model, not sharded.
        prompts: Token ids, at least one per prompt.
        max_new_tokens: Maximum number of tokens to generate per row.
        sampling: Sampling parameters.
        seeds: Seed of each prompt; optional for greedy sampling.
        chunk_tokens: Prompt tokens per forward pass.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.numbers = list(range(len(prompts)))
        """Indices into `prompts` of the remaining rows."""
        self._decoder, self._sampling = decoder, sampling
        device = decoder.model.embed_tokens.weight.device
        longest = max(map(len, prompts))
        self._padding = [longest - len(prompt) for prompt in prompts]
        # The last generated token is never an input.
        self._cache = decoder.allocate_cache(batch_size=len(prompts), max_tokens=longest + max_new_tokens - 1)
        self._tokens = torch.empty(len(prompts), dtype=torch.int64, device=device)
        self._positions = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._logits: Tensor | None = self._read(prompts, chunk_tokens)
        self._cache.set_rows(longest, self._padding)
        self._random = None
        if sampling.temperature > 0:
            assert seeds is not None
            self._random = RandomNumbers(seeds, device)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.cat([_seen(decoder, self._input(prompt)) for prompt in prompts])

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """Return the next token of each remaining row, keyed by the row's index into `prompts`.

        Raises:
            ValueError: `max_new_tokens` tokens have already been generated.
        """
        if self._logits is None:
            logits = self._decoder(self._tokens[:, None], positions=self._positions[:, None], cache=self._cache)
            self._logits, self._positions = logits[:, -1], self._positions + 1
        random = self._random.next() if self._random is not None else None
        self._tokens = sample(self._logits, self._sampling, random=random, seen=self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, self._tokens[:, None], True)
        self._logits = None
        return dict(zip(self.numbers, self._tokens.tolist(), strict=True))

    @torch.inference_mode()
    def end(self, numbers: Collection[int]) -> None:
        """Drop rows, by their indices into `prompts`, so that no compute or memory is spent on them."""
        kept = [index for index, number in enumerate(self.numbers) if number not in numbers]
        if len(kept) == len(self.numbers):
            return
        self.numbers = [self.numbers[index] for index in kept]
        if not kept:
            return
        self._padding = [self._padding[index] for index in kept]
        self._cache.keep_rows(kept, self._padding)
        first = min(self._padding)
        self._padding = [slots - first for slots in self._padding]
        self._tokens, self._positions = self._tokens[kept], self._positions[kept]
        if self._random is not None:
            self._random.keep_rows(kept)
        if self._seen is not None:
            self._seen = self._seen[kept]

    def _read(self, prompts: Sequence[Sequence[int]], chunk_tokens: int) -> Tensor:
        """Prefill the cache and return the logits [B, V] after the prompts; short prompts share a forward pass."""
        logits: list[Tensor] = []
        while len(logits) < len(prompts):
            start = len(logits)
            sizes = itertools.accumulate(len(prompt) for prompt in prompts[start:])
            count = sum(size <= chunk_tokens for size in sizes)
            if count > 1:
                logits += self._read_packed(prompts[start : start + count], start)
            else:
                row = self._cache.row(start, self._padding[start])
                logits.append(_read_chunks(self._decoder, row, self._input(prompts[start]), chunk_tokens)[0])
        return torch.stack(logits)

    def _read_packed(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        """Prefill the rows from `first` on in one packed forward pass and return the logits [rows, V]."""
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.arange(len(prompts)).repeat_interleave(torch.tensor(lengths))
        documents = Documents.from_ids(ids[None])
        ends = documents.cu_seqlens[1:].tolist()
        input_ids = self._input(list(itertools.chain.from_iterable(prompts)))
        ids, bounds, positions = (part.to(input_ids.device) for part in documents[:3])
        documents = Documents(ids, bounds, positions, documents.longest)
        packed = self._decoder.allocate_cache(batch_size=1, max_tokens=ends[-1])
        packed.is_packed = True
        hidden = self._decoder.hidden_states(input_ids, documents=documents, cache=packed)
        for number, (length, end) in enumerate(zip(lengths, ends, strict=True), start=first):
            row = self._cache.row(number, self._padding[number])
            row.keys[:, :, :, :length] = packed.keys[:, :, :, end - length : end]
            row.values[:, :, :, :length] = packed.values[:, :, :, end - length : end]
        logits: Tensor = self._decoder.lm_head(hidden[0, [end - 1 for end in ends]])
        return logits

    def _input(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self._positions.device)


class Row:
    """Generation for one row whose KV cache is reused: the shared prefix of the next prompt is not computed again.

    It can still be used after an exception at any time, such as KeyboardInterrupt.

    Args:
        decoder: The model, not sharded.
        chunk_tokens: Prompt tokens per forward pass.
    """

    def __init__(self, decoder: Decoder, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self._decoder, self._chunk_tokens = decoder, chunk_tokens
        self._device = decoder.model.embed_tokens.weight.device
        self._ids: list[int] = []
        """Tokens whose keys and values are cached."""
        with torch.inference_mode():
            self._cache = decoder.allocate_cache(batch_size=1, max_tokens=256)

    @property
    def num_cached(self) -> int:
        """Number of tokens whose keys and values are cached."""
        return len(self._ids)

    def num_shared(self, ids: Sequence[int]) -> int:
        """Return the number of leading tokens of a prompt whose keys and values are cached."""
        pairs = zip(self._ids, ids, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def generate(
        self, ids: Sequence[int], *, max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[int]:
        """Generate a continuation of a prompt.

        Args:
            ids: Token ids, at least one.
            max_new_tokens: Number of tokens to generate.
            sampling: Sampling parameters.
            seed: Seed of the random numbers.

        Returns:
            An iterator of token ids. Random numbers and results are those of :class:`Batch` with this seed.
        """
        random = RandomNumbers([seed], self._device) if sampling.temperature > 0 else None
        seen = None
        if sampling.repetition_penalty != 1:
            seen = _seen(self._decoder, torch.tensor([list(ids)], device=self._device))
        shared = min(self.num_shared(ids), len(ids) - 1)  # the last token is always computed, for its logits
        cached, new = list(ids[:shared]), list(ids[shared:])
        for _ in range(max_new_tokens):
            token = int(self._next(cached, new, sampling, random, seen))
            cached, new = cached + new, [token]
            yield token

    @torch.inference_mode()
    def _next(
        self,
        cached: list[int],
        new: list[int],
        sampling: Sampling,
        random: RandomNumbers | None,
        seen: Tensor | None,
    ) -> Tensor:
        """Compute the new tokens and return [1], the token after them."""
        self._ids, self._cache.num_tokens = cached, len(cached)
        needed = len(cached) + len(new)
        if needed > self._cache.max_tokens:
            self._cache.grow(1 << (needed - 1).bit_length())
        input_ids = torch.tensor([new], device=self._device)
        logits = _read_chunks(self._decoder, self._cache, input_ids, self._chunk_tokens)
        self._ids = cached + new
        tokens = sample(logits, sampling, random=random.next() if random is not None else None, seen=seen)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        return tokens


def _read_chunks(decoder: Decoder, cache: KVCache, input_ids: Tensor, chunk_tokens: int) -> Tensor:
    """Compute tokens in chunks of forward passes and return the logits [B, V] after them."""
    logits: Tensor
    for part in input_ids.split(chunk_tokens, dim=1):
        logits = decoder(part, cache=cache, logits_to_keep=1)
    return logits[:, -1]


def _seen(decoder: Decoder, input_ids: Tensor) -> Tensor:
    """Return [B, V] bool, true for the tokens of each row."""
    seen = torch.zeros(len(input_ids), decoder.config.vocab_size, dtype=torch.bool, device=input_ids.device)
    return seen.scatter_(1, input_ids, True)


def _slice(documents: Documents | None, tokens: slice) -> Documents | None:
    """Return the bounds of a slice of each row; with a cache only `ids` and `positions` are used."""
    if documents is None:
        return None
    return documents._replace(ids=documents.ids[:, tokens], positions=documents.positions[:, tokens])


def _groups_of_weights(decoder: Decoder) -> list[dist.ProcessGroup]:
    """Return the process groups that FSDP2 shards the weights over, one per dimension of their device mesh."""
    if not isinstance(decoder, FSDPModule):
        return []
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # some weights are still gathered after a forward pass
    weight = next(decoder.parameters())
    assert isinstance(weight, DTensor)
    return weight.device_mesh.get_all_groups()
