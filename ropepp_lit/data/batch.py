"""What a training step reads, with all that a GPU would have to be waited for computed on the CPU.

Shapes: B rows, T tokens of each row that this rank computes, M labels that count.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder
from ropepp_lit.nn.context_parallel import ContextShard, ShardedDocuments
from ropepp_lit.nn.decoder import Reduction
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.loss import IGNORE_INDEX


class AnswerPairs(NamedTuple):
    """The pairs of a chosen and a rejected answer in whole rows. P pairs, of which each is two documents."""

    keys: tuple[int, ...]
    """[P]: a hash of 64 bits of each pair's tokens up to the last label, and of its labels."""

    lengths: Tensor
    """[2P] int64: this rank's labels of each answer, as they follow each other; chosen and rejected in turn."""

    num_tokens: Tensor
    """[P, 2] int64: labels of each answer, in whole rows."""

    is_counted: Tensor
    """[P] bool: whether this rank counts the pair: of ranks that share rows, the one with its first label does."""

    num_counted: int
    """How many those are."""

    @classmethod
    def find(cls, input_ids: Tensor, labels: Tensor, documents: Documents, shard: ContextShard | None) -> AnswerPairs:
        """The pairs in a batch.

        Args:
            input_ids: [B, row] int64.
            labels: [B, row] int64; every answer has one that counts.
            documents: Of which those with labels are chosen and rejected answers in turn.
            shard: Which tokens of a row this rank computes; None means all.

        Raises:
            UsageError: an answer is without the other one.
        """
        places = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
        bounds = documents.cu_seqlens.long()
        numbers, answers, counts = torch.bucketize(places, bounds[1:], right=True).unique_consecutive(
            return_inverse=True, return_counts=True
        )
        num_pairs = len(numbers) // 2
        if len(numbers) % 2:
            raise UsageError(
                "data: a rejected answer does not follow each chosen one; see `ropepp-lit prepare --verify`"
            )
        content = torch.stack((input_ids.flatten(), labels.flatten()), dim=1).int().numpy()
        # Up to the last label: a token behind it is an input only where the row does not end with it.
        ends = places[counts.cumsum(0)[1::2] - 1] + 1
        ranges = zip(bounds[numbers[::2]].tolist(), ends.tolist(), strict=True)
        keys = tuple(_hash(content[start:end].tobytes()) for start, end in ranges)
        answer_of = torch.full((labels.numel(),), -1).index_copy(0, places, answers).view_as(labels)
        firsts = (answers != F.pad(answers[:-1], (1, 0), value=-1)) & (answers % 2 == 0)
        is_first = torch.zeros(labels.numel(), dtype=torch.bool).index_copy(0, places, firsts).view_as(labels)
        if shard is not None:
            answer_of, is_first = shard.take(answer_of), shard.take(is_first)
        lengths = torch.bincount(answer_of[answer_of >= 0], minlength=2 * num_pairs)
        is_counted = torch.zeros(num_pairs, dtype=torch.bool)
        is_counted[answer_of[is_first] // 2] = True
        return cls(keys, lengths, counts.view(num_pairs, 2), is_counted, int(is_counted.sum()))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    input_ids: Tensor
    """[B, T] int64."""

    labels: Tensor
    """[B, T] int64: the next token at each place; -100 where none counts."""

    documents: Documents | ShardedDocuments | None
    """Bounds of packed documents in whole rows; None where rows are plain causal ones. What this rank attends to, where
    ranks gather keys and values."""

    places: Tensor | None
    """[M] int64: where the labels count, in the flattened batch; None where all do."""

    num_labels: int
    """M."""

    num_tokens: int
    """Tokens of whole rows."""

    visible_pairs: int
    """Pairs of a query and a key that it sees, in whole rows: Σ n (n + 1) / 2 over documents of n tokens."""

    weights: Tensor | None = None
    """[B, T] float32: what each label weighs, where the loss is averaged over documents: one by the number of labels of
    its document in the whole row. None weighs all alike."""

    num_documents: int = 0
    """Documents with labels, where they are averaged over. Of ranks that share rows, the one with the first label of a
    document counts it."""

    pairs: AnswerPairs | None = None
    """Which labels belong to which answers, where the documents are pairs of answers."""

    @classmethod
    def create(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        documents: Documents | None,
        *,
        shard: ContextShard | None = None,
        weighs_documents: bool = False,
        holds_pairs: bool = False,
    ) -> Batch:
        """A batch of whole rows on the CPU.

        Args:
            input_ids: [B, row] int64.
            labels: [B, row] int64.
            documents: Bounds of packed documents.
            shard: Which tokens of a row this rank computes; None means all.
            weighs_documents: Weigh labels so that each of `documents` weighs the same.
            holds_pairs: Whether documents with labels are chosen and rejected answers in turn.
        """
        rows, length = input_ids.shape
        if documents is None:
            visible_pairs = rows * length * (length + 1) // 2
        else:
            lengths = documents.cu_seqlens.diff().long()
            visible_pairs = int((lengths * (lengths + 1)).sum()) // 2
        num_tokens = input_ids.numel()
        weights, is_first = None, None
        if weighs_documents:
            assert documents is not None
            weights, is_first = _weigh(labels, documents)
        pairs = None
        if holds_pairs:
            assert documents is not None
            pairs = AnswerPairs.find(input_ids, labels, documents, shard)
        sharded: Documents | ShardedDocuments | None = documents
        if shard is not None:
            if weights is not None and is_first is not None:
                weights, is_first = shard.take(weights), shard.take(is_first)
            input_ids, labels = shard.take(input_ids), shard.take(labels)
            sharded = shard.take_documents(documents, rows, length)
        counts = (labels != IGNORE_INDEX).flatten()
        num_labels = int(counts.sum())
        places = None if num_labels == len(counts) else counts.nonzero().flatten()
        num_documents = 0 if is_first is None else int(is_first.sum())
        return cls(
            input_ids, labels, sharded, places, num_labels, num_tokens, visible_pairs, weights, num_documents, pairs
        )

    def loss(self, decoder: Decoder, reduction: Reduction = "sum") -> Tensor:
        """The loss of the labels, see :meth:`~ropepp_lit.nn.decoder.Decoder.loss`."""
        return decoder.loss(
            self.input_ids,
            self.labels,
            documents=self.documents,
            label_indices=self.places,
            weights=self.weights,
            reduction=reduction,
        )


def _weigh(labels: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """What each label of whole rows weighs, float32, and whether it is the first of its document; of their shape."""
    places = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
    numbers = torch.bucketize(places, documents.cu_seqlens[1:].long(), right=True)
    weights = torch.zeros(labels.numel(), dtype=torch.float32)
    weights[places] = 1 / torch.bincount(numbers).float()[numbers]
    is_first = torch.zeros(labels.numel(), dtype=torch.bool)
    is_first[places] = numbers != F.pad(numbers[:-1], (1, 0), value=-1)
    return weights.view_as(labels), is_first.view_as(labels)
