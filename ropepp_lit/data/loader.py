"""From prepared shards to batches: samples of tokens, which of them a rank reads, and the loader of a whole run."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ropepp_lit.data.batch import Batch
from ropepp_lit.data.comparison import continued_at
from ropepp_lit.data.packing import PADDING_LENGTH, Lengths, PackedPlan, TooLong
from ropepp_lit.data.plan import BlockPlan, Mixture
from ropepp_lit.data.remote import RemoteFolder
from ropepp_lit.data.shards import Manifest, TokenShards
from ropepp_lit.data.trained_tokens import ID_BITS, REJECTED
from ropepp_lit.errors import UsageError
from ropepp_lit.nn.context_parallel import ContextShard
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.loss import IGNORE_INDEX
from ropepp_lit.text.tokenizer import TextTokenizer


class Source(NamedTuple):
    """Prepared shards, and how much of the training they are."""

    name: str
    folder: Path
    manifest: Manifest
    remote: RemoteFolder | None
    weight: float


NO_TOKEN = ~0
"""Where a sample has no token: token 0, not trained (:mod:`ropepp_lit.data.trained_tokens`)."""


class Samples(Dataset):
    """Samples of a split as [context_length + 1] tokens: blocks of text, or rows of whole conversations.

    Args:
        sources: Where the tokens are.
        split: `train` or `validation`.
        context_length: Tokens that a model reads at once.
        intra_document_masking: See :class:`~ropepp_lit.data.token_data.TokenData`.
        seed: Of the order.
        in_order: Read every token once, in order, instead of shuffled samples.
        too_long: What becomes of conversations that are longer than a sample.

    Raises:
        UsageError: the context is longer than the tokens of a source, or shorter than all of its conversations.
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
        too_long: TooLong,
    ) -> None:
        self._context_length = context_length
        self._intra_document_masking = intra_document_masking
        self._in_order = in_order
        self._has_untrained = in_order or any(source.manifest.marks_trained_tokens for source in sources)
        self._holds_pairs = any(source.manifest.holds_pairs for source in sources)
        self._weighs_conversations = False
        self._mixture = Mixture([source.weight for source in sources], seed=seed)
        self._shards: list[TokenShards] = []
        self.plans: list[BlockPlan | PackedPlan] = []
        """How samples are made of each source."""
        self._manifests = [source.manifest for source in sources]
        self._names = [f"{split} in {source.name}" for source in sources]
        for number, source in enumerate(sources):
            shards = TokenShards(source.folder, source.manifest, split, remote=source.remote)
            order = None if in_order else seed + 1_000_003 * number
            make = self._pack if source.manifest.marks_trained_tokens else self._cut
            self._shards.append(shards)
            self.plans.append(make(shards, order, self._names[number], too_long))

    def _cut(self, shards: TokenShards, seed: int | None, name: str, _: TooLong) -> BlockPlan:
        chunk_tokens = [chunk.tokens for chunk in shards.chunks]
        plan = BlockPlan(chunk_tokens, context_length=self._context_length, seed=seed)
        if plan.samples_per_pass == 0:
            raise UsageError(
                f"data.context_length: {self._context_length} is longer than the {sum(chunk_tokens):,} tokens of "
                f"{name}; give more text or a shorter context"
            )
        return plan

    def _pack(self, shards: TokenShards, seed: int | None, name: str, too_long: TooLong) -> PackedPlan:
        places = self._context_length + 1
        lengths = Lengths.read(shards, places=places, too_long=too_long)
        plan = PackedPlan(lengths, places=places, seed=seed)
        if plan.samples_per_pass == 0:
            remedy = f"set it to {lengths.shortest - 1:,} or more"
            if too_long == "cut":
                problem = f"no conversation of {name} keeps a trained token when it is cut to rows of"
            else:
                problem = (
                    f"all {'pairs of answers' if self._holds_pairs else 'conversations'} of {name} are longer than"
                )
                remedy += "" if self._holds_pairs else ", or data.too_long to cut"
            raise UsageError(f"data.context_length: {problem} {self._context_length:,} tokens; {remedy}")
        return plan

    def average_conversations(self) -> None:
        """Let batches carry weights by which each conversation weighs the same.

        Raises:
            UsageError: a source is text.
        """
        for name, plan in zip(self._names, self.plans, strict=True):
            if not isinstance(plan, PackedPlan):
                raise UsageError(
                    f"model.loss_average: conversations needs training data of conversations, and {name} is text; "
                    "choose trained_tokens"
                )
        self._weighs_conversations = True

    def packed(self) -> Iterator[tuple[str, PackedPlan, Manifest]]:
        """The split and source of conversations, how they are packed, and the set's manifest."""
        for name, plan, manifest in zip(self._names, self.plans, self._manifests, strict=True):
            if isinstance(plan, PackedPlan):
                yield name, plan, manifest

    def __len__(self) -> int:
        """Samples of one pass over all sources."""
        return sum(plan.samples_per_pass for plan in self.plans)

    def __getitems__(self, samples: list[int]) -> tuple[Tensor, Tensor | None]:
        """A whole batch at once.

        Args:
            samples: Their numbers.

        Returns:
            Tokens, [samples, context_length + 1] int64, those that are not trained as complements (padding too); and
            where documents start, the same shape in bool, or None where rows are plain causal ones.
        """
        tokens = np.empty((len(samples), self._context_length + 1), dtype=np.int64)
        starts = np.zeros_like(tokens, dtype=np.bool_) if self._intra_document_masking else None
        for index, sample in enumerate(samples):
            row, end, source = tokens[index], 0, 0
            row_starts = None if starts is None else starts[index]
            if not self._in_order or sample < len(self):
                source, number = (0, sample) if self._in_order else self._mixture.locate(sample)
                shards, plan = self._shards[source], self.plans[source]
                end = shards.read(plan.locate(number), row, row_starts)
                if shards.is_remote:
                    shards.expect(plan.chunks_behind(number))
            row[end:] = NO_TOKEN
            if isinstance(self.plans[source], PackedPlan) and row_starts is not None:
                row_starts[end::PADDING_LENGTH] = True
        if starts is not None and self._holds_pairs:
            starts |= tokens < REJECTED
        return torch.from_numpy(tokens), None if starts is None else torch.from_numpy(starts)

    def collate(self, samples: tuple[Tensor, Tensor | None], shard: ContextShard | None = None) -> Batch:
        """A batch of what `__getitems__` gave: inputs, labels shifted by one, and the bounds of documents."""
        tokens, starts = samples
        input_ids, labels = tokens[:, :-1], tokens[:, 1:]
        if self._has_untrained:
            input_ids = torch.maximum(input_ids, ~input_ids) & ID_BITS
            labels = labels.masked_fill(labels < 0, IGNORE_INDEX)
        if starts is None:
            return Batch.create(input_ids, labels, None, shard=shard)
        # The first token of a document is never a label: what comes before it is another document.
        labels = labels.masked_fill(starts[:, 1:], IGNORE_INDEX)
        documents = Documents.from_starts(starts[:, :-1])
        return Batch.create(
            input_ids,
            labels,
            documents,
            shard=shard,
            weighs_documents=self._weighs_conversations,
            holds_pairs=self._holds_pairs,
        )

    def documents(self) -> Iterator[np.ndarray]:
        """Token ids of each document, [tokens] of the shards' dtype, in the order in which they are stored."""
        for shards in self._shards:
            yield from shards.documents()


class TrainLoader:
    """Batches of a whole run, from the sample where it stands.

    Its length is that of the run, so that Lightning neither reads ahead nor begins a second epoch. Its state is the
    number of samples that all ranks have read or left out together, the same on every rank.

    Args:
        samples: Of the split.
        batch_size: Samples of a rank's batch.
        num_batches: Of the run.
        num_replicas: Ranks that read different data.
        rank: This one among them.
        identity: Of the data, see :func:`~ropepp_lit.data.comparison.identity_of`.
        skipped: Ranges of samples that are left out, first and end of each; a checkpoint's are added.
        loading: See :func:`make_loader`.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        num_batches: int,
        num_replicas: int,
        rank: int,
        identity: dict[str, Any],
        skipped: Sequence[Sequence[int]] = (),
        **loading: Any,
    ) -> None:
        self._samples, self._batch_size, self._num_batches = samples, batch_size, num_batches
        self._replica = {"num_replicas": num_replicas, "rank": rank}
        self._identity, self._loading = identity, loading
        self._skipped = sorted(map(list, skipped))
        self.samples = 0

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        batches = RankBatches(
            self.samples, self._num_batches, self._skipped, batch_size=self._batch_size, **self._replica
        )
        for batch, samples in zip(make_loader(self._samples, batches, **self._loading), batches.of_all(), strict=True):
            self.samples = samples[-1] + 1
            yield batch

    def state_dict(self) -> dict:
        """The position in the data."""
        skipped = {"skipped": self._skipped} if self._skipped else {}
        return {"samples": self.samples, "identity": self._identity, **skipped}

    def load_state_dict(self, state: dict) -> None:
        """Continue at the position of a checkpoint, where :func:`~ropepp_lit.data.comparison.continued_at` says."""
        self.samples, is_other = continued_at(state, self._identity)
        if not is_other:
            self._skipped += [part for part in state.get("skipped", ()) if part not in self._skipped]
            self._skipped.sort()


def make_loader(
    samples: Samples, batches: RankBatches, *, num_workers: int, shard: ContextShard | None, pin_memory: bool
) -> DataLoader:
    """A loader of batches.

    Args:
        samples: Of a split.
        batches: Which of them make a batch.
        num_workers: Processes that read ahead.
        shard: Which tokens of a row this rank computes; None means all.
        pin_memory: Give batches in pinned memory, which a GPU copies while the host goes on.
    """
    collate = partial(samples.collate, shard=shard)
    return DataLoader(
        samples, batch_sampler=batches, num_workers=num_workers, collate_fn=collate, pin_memory=pin_memory
    )


def replica_of(trainer: Trainer) -> dict[str, int]:
    """`num_replicas`, how many ranks read different data, and the `rank` of this process among them."""
    return trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}


class RankBatches:
    """Sample numbers of one rank's batches: the ranks take turns.

    Args:
        first: The first sample.
        count: Number of batches.
        skipped: Ranges of samples that are left out, first and end of each, ascending.
        batch_size: Samples of each.
        num_replicas: Ranks that read different data.
        rank: This one among them.
    """

    def __init__(
        self,
        first: int,
        count: int,
        skipped: Sequence[Sequence[int]],
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
    ) -> None:
        self._first, self._count, self._batch_size = first, count, batch_size
        self._num_replicas, self._rank, self._skipped = num_replicas, rank, skipped

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        start = self._rank * self._batch_size
        for samples in self.of_all():
            yield list(samples[start : start + self._batch_size])

    def of_all(self) -> Iterator[Sequence[int]]:
        """Sample numbers of the batches of all ranks together, ascending."""
        sample, size = self._first, self._num_replicas * self._batch_size
        for _ in range(self._count):
            if not any(end > sample for _, end in self._skipped):
                yield range(sample, sample + size)
                sample += size
                continue
            chosen: list[int] = []
            while len(chosen) < size:
                for first, end in self._skipped:
                    sample = end if first <= sample < end else sample
                chosen.append(sample)
                sample += 1
            yield chosen


def sample_texts(
    documents: Iterator[np.ndarray], tokenizer: TextTokenizer, *, limit: int, min_tokens: int
) -> list[str]:
    """Documents as text: those whose tokens have the least hash.

    Args:
        documents: Token ids of each.
        tokenizer: Of these.
        limit: How many at most.
        min_tokens: Leave out those of fewer tokens.
    """

    def candidates() -> Iterator[np.ndarray]:
        for ids in documents:
            if len(ids) >= min_tokens and (len(ids) > 48 or tokenizer.decode(ids.tolist()).strip()):
                yield ids

    chosen = heapq.nsmallest(limit, candidates(), key=lambda ids: hashlib.sha256(ids.tobytes()).digest())
    return [tokenizer.decode(ids.tolist()) for ids in chosen]
