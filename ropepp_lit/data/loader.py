"""From prepared shards to batches: samples of tokens, which of them a rank reads, and the loader of a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ropepp_lit.data.batch import Batch
from ropepp_lit.data.comparison import continued_at
from ropepp_lit.data.plan import BlockPlan, Mixture
from ropepp_lit.data.remote import RemoteFolder
from ropepp_lit.data.shards import Manifest, TokenShards
from ropepp_lit.errors import UsageError
from ropepp_lit.nn.context_parallel import ContextShard
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.loss import IGNORE_INDEX


class Source(NamedTuple):
    """Prepared shards, and how much of the training they are."""

    name: str
    folder: Path
    manifest: Manifest
    remote: RemoteFolder | None
    weight: float


class Blocks(Dataset):
    """Samples of a split as [context_length + 1] tokens; -100 where validation has run out of them.

    Args:
        sources: Where the tokens are.
        split: `train` or `validation`.
        context_length: Tokens that a model reads at once.
        intra_document_masking: See :class:`~ropepp_lit.data.token_data.TokenData`.
        seed: Of the order.
        in_order: Read every token once, in order, instead of shuffled blocks.

    Raises:
        UsageError: the context is longer than the tokens of a source.
    """

    def __init__(
        self,
        sources: list[Source],
        split: str,
        *,
        context_length: int,
        intra_document_masking: bool,
        seed: int,
        in_order: bool,
    ) -> None:
        self._context_length = context_length
        self._intra_document_masking = intra_document_masking
        self._in_order = in_order
        self._mixture = Mixture([source.weight for source in sources], seed=seed)
        self._shards, self._plans = [], []
        for number, source in enumerate(sources):
            shards = TokenShards(source.folder, source.manifest, split, remote=source.remote)
            chunk_tokens = [chunk.tokens for chunk in shards.chunks]
            order = None if in_order else seed + 1_000_003 * number
            plan = BlockPlan(chunk_tokens, context_length=context_length, seed=order)
            if plan.blocks_per_pass == 0:
                raise UsageError(
                    f"data.context_length: {context_length} is longer than the {sum(chunk_tokens):,} tokens of "
                    f"{split} in {source.name}; give more text or a shorter context"
                )
            self._shards.append(shards)
            self._plans.append(plan)

    def __len__(self) -> int:
        """Samples of one pass over all sources."""
        return sum(plan.blocks_per_pass for plan in self._plans)

    def __getitems__(self, samples: list[int]) -> tuple[Tensor, Tensor | None]:
        """A whole batch at once.

        Args:
            samples: Their numbers.

        Returns:
            Tokens, [samples, context_length + 1] int64; and where documents start, the same shape in bool, or None
            where rows are plain causal ones.
        """
        tokens = np.empty((len(samples), self._context_length + 1), dtype=np.int64)
        starts = np.zeros_like(tokens, dtype=np.bool_) if self._intra_document_masking else None
        for index, sample in enumerate(samples):
            row, end = tokens[index], 0
            if not self._in_order or sample < len(self):
                source, number = (0, sample) if self._in_order else self._mixture.locate(sample)
                shards, plan = self._shards[source], self._plans[source]
                end = shards.read(plan.locate(number), row, None if starts is None else starts[index])
                if shards.is_remote:
                    shards.expect(plan.chunks_behind(number))
            row[end:] = IGNORE_INDEX
        return torch.from_numpy(tokens), None if starts is None else torch.from_numpy(starts)

    def collate(self, samples: tuple[Tensor, Tensor | None], shard: ContextShard | None = None) -> Batch:
        """A batch of what `__getitems__` gave: inputs, labels shifted by one, and the bounds of documents."""
        tokens, starts = samples
        input_ids, labels = tokens[:, :-1], tokens[:, 1:]
        if self._in_order:
            input_ids = input_ids.clamp(min=0)  # where validation has run out of tokens
        if starts is None:
            return Batch.create(input_ids, labels, None, shard=shard)
        # The first token of a document is never a label: what comes before it is another document.
        labels = labels.masked_fill(starts[:, 1:], IGNORE_INDEX)
        return Batch.create(input_ids, labels, Documents.from_starts(starts[:, :-1]), shard=shard)

    def documents(self) -> Iterator[np.ndarray]:
        """Token ids of each document, [tokens] of the shards' dtype, in the order in which they are stored."""
        for shards in self._shards:
            yield from shards.documents()


class TrainLoader:
    """Batches of a whole run, from the sample where it stands.

    Its length is that of the run, so that Lightning neither reads ahead nor begins a second epoch. Its state is the
    number of samples that all ranks have read together, the same on every rank.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        batch_size: int,
        num_batches: int,
        num_replicas: int,
        rank: int,
        identity: dict[str, Any],
        **loading: Any,
    ) -> None:
        self._blocks, self._batch_size, self._num_batches = blocks, batch_size, num_batches
        self._replica = {"num_replicas": num_replicas, "rank": rank}
        self._identity, self._loading = identity, loading
        self.samples = 0

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        batches = RankBatches(self.samples, self._num_batches, batch_size=self._batch_size, **self._replica)
        for batch in make_loader(self._blocks, batches, **self._loading):
            self.samples += self._batch_size * self._replica["num_replicas"]
            yield batch

    def state_dict(self) -> dict:
        """The position in the data."""
        return {"samples": self.samples, "identity": self._identity}

    def load_state_dict(self, state: dict) -> None:
        """Continue at the position of a checkpoint, where :func:`~ropepp_lit.data.comparison.continued_at` says."""
        self.samples, _ = continued_at(state, self._identity)


def make_loader(
    blocks: Blocks, batches: RankBatches, *, num_workers: int, shard: ContextShard | None, pin_memory: bool
) -> DataLoader:
    """A loader of batches.

    Args:
        blocks: The samples.
        batches: Which of them make a batch.
        num_workers: Processes that read ahead.
        shard: Which tokens of a row this rank computes; None means all.
        pin_memory: Give batches in pinned memory, which a GPU copies while the host goes on.
    """
    collate = partial(blocks.collate, shard=shard)
    return DataLoader(blocks, batch_sampler=batches, num_workers=num_workers, collate_fn=collate, pin_memory=pin_memory)


class RankBatches:
    """Sample numbers of one rank's batches: the ranks take turns."""

    def __init__(self, first: int, count: int, *, batch_size: int, num_replicas: int, rank: int) -> None:
        self._first, self._count, self._batch_size = first, count, batch_size
        self._num_replicas, self._rank = num_replicas, rank

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(self._count):
            start = self._first + (index * self._num_replicas + self._rank) * self._batch_size
            yield list(range(start, start + self._batch_size))
