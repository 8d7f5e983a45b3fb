"""Generating tokens from a decoder, one by one, with a KV cache.

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
"""Tokens of prompts that :class:`Batch` reads in one forward pass."""


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
    """Continue rows of one length.

    Ranks that shard the decoder's weights (FSDP2) must all call this with the same arguments. The last bits of their
    logits may differ, so rank 0 chooses the tokens of all ranks: otherwise one rank could end a row earlier and leave
    the others waiting for its weights.

    Args:
        decoder: The model.
        input_ids: [B, T] prompt.
        max_new_tokens: How many tokens to generate.
        sampling: How tokens are chosen; `repetition_penalty` counts all tokens of the prompt, so it needs rows without
            `documents`.
        documents: Bounds where the prompt packs several documents; the last of each row is continued.
        chunk_tokens: Tokens of the prompt in one forward pass; None means all.
        generator: Source of the random numbers, on the decoder's device.

    Returns:
        An iterator of [B] int64, the next token of each row.
    """
    assert documents is None or sampling.repetition_penalty == 1
    # FSDP2 reuses the memory of gathered weights, and training cannot use tensors made in inference mode.
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
    """Prompts of any lengths that are continued together, each as if it were alone.

    Prompts are read packed, without padding, and their keys and values stand right-aligned in the cache: empty slots
    before a shorter prompt are masked, and positions count each row's own tokens. Against the same prompt alone only
    the order of sums in products may differ, so logits agree to rounding (about 1e-15 relative in float64), and greedy
    tokens are the same unless two are equally likely to that precision. The random numbers of a row depend on its seed
    alone.

    Args:
        decoder: The model, not sharded.
        prompts: Token ids, at least one of each.
        max_new_tokens: Tokens that a row can get.
        sampling: How tokens are chosen.
        seeds: One for each prompt; may be left out for greedy sampling.
        chunk_tokens: Tokens of prompts in one forward pass.
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
        """Places in `prompts` of the rows that are left."""
        self._decoder, self._sampling = decoder, sampling
        device = decoder.model.embed_tokens.weight.device
        longest = max(map(len, prompts))
        self._padding = [longest - len(prompt) for prompt in prompts]
        # The last token that is generated is never read.
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
        """The next token of each row that is left, by the row's place in `prompts`.

        Raises:
            ValueError: `max_new_tokens` are generated already.
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
        """Drop rows, by their places in `prompts`: what is left computes and reads no more than it needs."""
        kept = [place for place, number in enumerate(self.numbers) if number not in numbers]
        if len(kept) == len(self.numbers):
            return
        self.numbers = [self.numbers[place] for place in kept]
        if not kept:
            return
        self._padding = [self._padding[place] for place in kept]
        self._cache.keep_rows(kept, self._padding)
        first = min(self._padding)
        self._padding = [slots - first for slots in self._padding]
        self._tokens, self._positions = self._tokens[kept], self._positions[kept]
        if self._random is not None:
            self._random.keep_rows(kept)
        if self._seen is not None:
            self._seen = self._seen[kept]

    def _read(self, prompts: Sequence[Sequence[int]], chunk_tokens: int) -> Tensor:
        """[B, V], the logits behind prompts, which are read into the cache's rows; short ones in one forward pass."""
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
        """[rows, V], the logits behind prompts that go to the rows from `first` on."""
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
        for place, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            row = self._cache.row(first + place, self._padding[first + place])
            row.keys[:, :, :, :length] = packed.keys[:, :, :, end - length : end]
            row.values[:, :, :, :length] = packed.values[:, :, :, end - length : end]
        return self._decoder.lm_head(hidden[0, [end - 1 for end in ends]])

    def _input(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self._positions.device)


class Row:
    """One row that is read and continued by turns; tokens that it begins with again are not read again.

    An exception at any moment, such as KeyboardInterrupt, leaves it usable.

    Args:
        decoder: The model, not sharded.
        chunk_tokens: Tokens that one forward pass reads.
    """

    def __init__(self, decoder: Decoder, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self._decoder, self._chunk_tokens = decoder, chunk_tokens
        self._device = decoder.model.embed_tokens.weight.device
        self._ids: list[int] = []
        """Tokens whose keys and values the cache holds."""
        with torch.inference_mode():
            self._cache = decoder.allocate_cache(batch_size=1, max_tokens=256)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are known."""
        return len(self._ids)

    def num_shared(self, ids: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt whose keys and values are known."""
        pairs = zip(self._ids, ids, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def generate(
        self, ids: Sequence[int], *, max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[int]:
        """Continue a prompt.

        Args:
            ids: Token ids, at least one.
            max_new_tokens: How many tokens to generate.
            sampling: How tokens are chosen.
            seed: Of the random numbers.

        Returns:
            An iterator of token ids. The random numbers and the result are those of :class:`Batch` with this seed.
        """
        random = RandomNumbers([seed], self._device) if sampling.temperature > 0 else None
        seen = None
        if sampling.repetition_penalty != 1:
            seen = _seen(self._decoder, torch.tensor([list(ids)], device=self._device))
        new, shared = list(ids), min(self.num_shared(ids), len(ids) - 1)  # the last token is read for its logits
        known, new = new[:shared], new[shared:]
        for _ in range(max_new_tokens):
            token = int(self._next(known, new, sampling, random, seen))
            known, new = known + new, [token]
            yield token

    @torch.inference_mode()
    def _next(
        self,
        known: list[int],
        new: list[int],
        sampling: Sampling,
        random: RandomNumbers | None,
        seen: Tensor | None,
    ) -> Tensor:
        """[1], the token behind those that are known to the cache and those that are read now."""
        self._ids, self._cache.num_tokens = known, len(known)
        needed = len(known) + len(new)
        if needed > self._cache.max_tokens:
            self._cache.grow(1 << (needed - 1).bit_length())
        input_ids = torch.tensor([new], device=self._device)
        logits = _read_chunks(self._decoder, self._cache, input_ids, self._chunk_tokens)
        self._ids = known + new
        tokens = sample(logits, sampling, random=random.next() if random is not None else None, seen=seen)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        return tokens


def _read_chunks(decoder: Decoder, cache: KVCache, input_ids: Tensor, chunk_tokens: int) -> Tensor:
    """[B, V], the logits behind tokens that are read in several forward passes."""
    for part in input_ids.split(chunk_tokens, dim=1):
        logits = decoder(part, cache=cache, logits_to_keep=1)
    return logits[:, -1]


def _seen(decoder: Decoder, input_ids: Tensor) -> Tensor:
    """[B, V] bool, true for the tokens of each row."""
    seen = torch.zeros(len(input_ids), decoder.config.vocab_size, dtype=torch.bool, device=input_ids.device)
    return seen.scatter_(1, input_ids, True)


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
