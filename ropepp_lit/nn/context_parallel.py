"""Context parallelism: ranks shard the tokens of each row, in one of two modes.

| mode     | a rank's tokens of a row | communication in attention                                  | limit       |
|----------|--------------------------|-------------------------------------------------------------|-------------|
| `heads`  | one slice                | all-to-all of queries, keys, values and outputs             | query heads |
| `gather` | a chunk of each half     | all-gather of keys and values                               | none        |

`heads` is DeepSpeed-Ulysses (arXiv 2309.14509): every rank computes full rows for a part of the heads. `gather` is the
all-gather of Llama 3 (arXiv 2407.21783): every rank computes its own queries with all heads. A row is split into 2P
chunks for P ranks, and rank r has chunks r and 2P - 1 - r, so that all ranks compute equally many scores.

Both are exact. :func:`elements_moved` counts the communication.

Shapes: B batch, T tokens of a full row, P ranks, K key/value heads, D head size.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.kernels import Segments, attend, attend_packed, usable_implementation
from ropepp_lit.nn.positions import HeadLayout

Mode = Literal["heads", "gather"]

MODES: tuple[Mode, ...] = ("heads", "gather")

# Newer versions of torch deprecate the second name.
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


class ContextShard(NamedTuple):
    """Shard of each row that a rank computes."""

    ranks: int
    """P."""

    rank: int
    """Index of the rank, from 0."""

    mode: Mode
    """Mode of communication."""

    def take(self, x: Tensor) -> Tensor:
        """Return this rank's tokens [B, T / P, …] of [B, T, …].

        Raises:
            UsageError: see :func:`tokens_of_rank`.
        """
        parts = [x[:, part] for part in tokens_of_rank(x.shape[1], self.ranks, self.rank, self.mode)]
        return torch.cat(parts, dim=1)

    def take_documents(
        self,
        documents: Documents | ShardedDocuments | None,
        rows: int,
        num_tokens: int,
        device: torch.device | None = None,
    ) -> Documents | ShardedDocuments | None:
        """Return the bounds of documents that the decoder needs on this rank.

        Call it once per batch, before the documents are moved to a GPU, to avoid synchronizing with it.

        Args:
            documents: Bounds for full rows; None means that every row is one document. A result of this method is
                returned unchanged.
            rows: B.
            num_tokens: T.
            device: Device of the result for rows of one document; otherwise that of the documents.

        Returns:
            For `heads` the argument, for `gather` the bounds that this rank attends to.

        Raises:
            UsageError: see :func:`tokens_of_rank`.
        """
        if self.mode == "heads" or isinstance(documents, ShardedDocuments):
            return documents
        return shard_documents(documents, rows, num_tokens, self.ranks, self.rank, device)


class ContextGroup(NamedTuple):
    """The ranks that shard the tokens of each row, and their mode of communication."""

    process_group: dist.ProcessGroup
    """Ranks."""

    mode: Mode
    """Mode of communication."""

    def size(self) -> int:
        """Return P."""
        return self.process_group.size()

    def rank(self) -> int:
        """Return the rank of this process in the group, from 0."""
        return self.process_group.rank()

    @property
    def shard(self) -> ContextShard:
        """Shard that this rank computes."""
        return ContextShard(self.size(), self.rank(), self.mode)


def tokens_of_rank(num_tokens: int, ranks: int, rank: int, mode: Mode) -> tuple[slice, ...]:
    """Return the tokens of a row that a rank computes, in order.

    Raises:
        UsageError: the tokens cannot be sharded equally.
    """
    chunks = ranks if mode == "heads" else 2 * ranks
    if num_tokens % chunks:
        raise UsageError(
            f"trainer.strategy.context_parallel_size: {ranks} ranks cannot split rows of {num_tokens:,} tokens into "
            f"{chunks} equal chunks; choose a data.context_length that {chunks} divides"
        )
    size = num_tokens // chunks
    numbers = (rank,) if mode == "heads" else (rank, chunks - 1 - rank)
    return tuple(slice(number * size, (number + 1) * size) for number in numbers)


def elements_moved(layout: HeadLayout, head_dim: int, ranks: int, mode: Mode) -> float:
    """Return the number of elements that an attention layer sends per rank and token of that rank in a forward pass.

    The backward pass sends as many, by all-to-alls or by the reduce-scatter of an all-gather; so does the recomputation
    of a checkpointed block.

    Args:
        layout: Head counts that the layer computes at once.
        head_dim: D.
        ranks: P.
        mode: Mode of communication.
    """
    if mode == "gather":
        return (ranks - 1) * 2 * layout.num_key_value_heads * (head_dim + layout.extra_dims)
    key_value_heads = math.lcm(layout.num_key_value_heads, ranks)
    heads = layout.num_query_heads + 2 * key_value_heads + layout.num_attention_heads
    return (ranks - 1) / ranks * heads * head_dim


def choose_mode(layout: HeadLayout, head_dim: int, ranks: int, mode: Mode | None = None) -> Mode:
    """Return the given mode, or else the one with less communication; `gather` if it is equal.

    Raises:
        UsageError: no such mode, or `heads` where the ranks do not divide the query heads.
    """
    divides = layout.num_query_heads % ranks == 0
    if mode is None:
        moved = {name: elements_moved(layout, head_dim, ranks, name) for name in MODES}
        return "heads" if divides and moved["heads"] < moved["gather"] else "gather"
    if mode not in MODES:
        raise UsageError(
            f"trainer.strategy.context_parallel_mode: no mode {mode!r}; choose {' or '.join(MODES)}, or leave it empty"
        )
    if mode == "heads" and not divides:
        raise UsageError(
            f"trainer.strategy.context_parallel_mode: heads needs a context_parallel_size that divides the "
            f"{layout.num_query_heads} query heads computed at once; {ranks} does not; choose gather"
        )
    return mode


class ShardedDocuments(NamedTuple):
    """Keys that the queries of one rank attend to in the mode `gather`. M keys of all segments."""

    positions: Tensor
    """[B, T / P] int64: positions of this rank's tokens."""

    key_indices: Tensor | None
    """[M] int64: indices of the keys of all segments in the flattened batch, with repetitions; None for plain rows."""

    segments: Segments | None
    """A segment per document and chunk of the rank: its queries, and its keys up to the last query."""


def shard_documents(
    documents: Documents | None,
    rows: int,
    num_tokens: int,
    ranks: int,
    rank: int,
    device: torch.device | None = None,
) -> ShardedDocuments:
    """Return the bounds that a rank attends to in the mode `gather`; see :meth:`ContextShard.take_documents`."""
    device = device if documents is None else documents.positions.device
    parts = tokens_of_rank(num_tokens, ranks, rank, "gather")
    tokens = torch.cat([torch.arange(part.start, part.stop, device=device) for part in parts])
    if documents is None:
        return ShardedDocuments(tokens.expand(rows, -1), None, None)
    bounds = documents.cu_seqlens.to(torch.int64)
    query_indices = (torch.arange(rows, device=device)[:, None] * num_tokens + tokens).flatten()
    numbers = torch.bucketize(query_indices, bounds[1:], right=True)
    is_start = torch.arange(len(query_indices), device=device) % (num_tokens // (2 * ranks)) == 0
    is_start[1:] |= numbers[1:] != numbers[:-1]
    query_bounds = F.pad(is_start.nonzero().flatten(), (0, 1), value=len(query_indices))
    first_keys = bounds[numbers[query_bounds[:-1]]]
    lengths = query_indices[query_bounds[1:] - 1] + 1 - first_keys
    key_bounds = F.pad(lengths.cumsum(0), (1, 0))
    key_indices = torch.arange(int(key_bounds[-1]), device=device)
    key_indices = key_indices + (first_keys - key_bounds[:-1]).repeat_interleave(lengths)
    longest_query, longest_key = int(query_bounds.diff().max()), int(lengths.max())
    segments = Segments(query_bounds.to(torch.int32), key_bounds.to(torch.int32), longest_query, longest_key)
    return ShardedDocuments(documents.positions[:, tokens], key_indices, segments)


def attend_to_gathered(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: ShardedDocuments,
    group: ContextGroup,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute causal attention of this rank's queries to the keys of all ranks.

    Args:
        queries: [B, T / P, H, D], rotated.
        keys: [B, T / P, K, D], rotated.
        values: [B, T / P, K, D].
        documents: Bounds that this rank attends to.
        group: The ranks.
        scale: See :func:`~ropepp_lit.nn.kernels.attend`.
        implementation: See :func:`~ropepp_lit.nn.kernels.attend`.

    Returns:
        [B, T / P, H, D].
    """
    both = _gather_tokens(torch.cat((keys, values), dim=-1), group)
    if documents.segments is None:
        parts = tokens_of_rank(both.shape[1], group.size(), group.rank(), "gather")
        outputs = [
            attend(chunk, *both[:, : part.stop].chunk(2, dim=-1), scale=scale, implementation=implementation)
            for chunk, part in zip(queries.chunk(2, dim=1), parts, strict=True)
        ]
        return torch.cat(outputs, dim=1)
    assert documents.key_indices is not None
    keys, values = both.flatten(0, 1).index_select(0, documents.key_indices).chunk(2, dim=-1)
    implementation = usable_implementation(implementation, queries.device.type, queries.dtype)
    flat = queries.flatten(0, 1)
    output = attend_packed(flat, keys, values, documents.segments, scale=scale, implementation=implementation)
    return output.view_as(queries)


def _gather_tokens(x: Tensor, group: ContextGroup) -> Tensor:
    """All-gather [B, T / P, heads, D], two chunks of each row, to [B, T, heads, D] in the order of the row."""
    gathered = _all_gather(
        x.unflatten(1, (2, -1)).contiguous(), 0, group.process_group
    )  # ranks × B, 2, T / 2P, heads, D
    first, second = gathered.unflatten(0, (group.size(), -1)).unbind(2)
    return torch.cat((first, second.flip(0))).transpose(0, 1).flatten(1, 2)


def tokens_to_heads(x: Tensor, group: ContextGroup) -> Tensor:
    """Exchange [B, T / P, heads, D] for [B, T, heads / P, D]; heads that P does not divide are repeated first."""
    ranks = group.size()
    heads = math.lcm(x.shape[2], ranks)
    if heads != x.shape[2]:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    x = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)  # P, B, T / P, heads / P, D
    return _all_to_all(x, group).permute(1, 0, 2, 3, 4).flatten(1, 2)


def heads_of_rank(x: Tensor, group: ContextGroup) -> Tensor:
    """Return the part of x [heads, …] that belongs to this rank's heads after :func:`tokens_to_heads`."""
    heads = math.lcm(x.shape[0], group.size())
    return x.repeat_interleave(heads // x.shape[0], dim=0).chunk(group.size())[group.rank()]


def heads_to_tokens(x: Tensor, group: ContextGroup) -> Tensor:
    """Exchange [B, T, heads / P, D] for [B, T / P, heads, D]."""
    x = x.unflatten(1, (group.size(), -1)).transpose(0, 1)  # P, B, T / P, heads / P, D
    return _all_to_all(x, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _all_to_all(x: Tensor, group: ContextGroup) -> Tensor:
    """Send x[r] to rank r, and return what the ranks sent, in their order."""
    received = all_to_all_single_autograd(x.contiguous().flatten(), None, None, group.process_group)
    return received.view(x.shape)
