"""The batch of a training step. Values that would require a GPU synchronization are computed on the CPU.

Shapes: B rows, T tokens of each row that this rank computes, M labels that are not ignored.
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
    """Pairs of a chosen and a rejected answer in full rows. P pairs, each of which is two documents."""

    keys: tuple[int, ...]
    """[P]: 64-bit hash of each pair's labels and its tokens up to the last label."""

    lengths: Tensor
    """[2P] int64: number of this rank's labels of each answer in order; chosen and rejected alternate."""

    num_tokens: Tensor
    """[P, 2] int64: number of labels of each answer in full rows."""

    is_counted: Tensor
    """[P] bool: whether this rank counts the pair; of ranks that share rows, the one with its first label does."""

    num_counted: int
    """Number of pairs that this rank counts."""

    @classmethod
    def find(cls, input_ids: Tensor, labels: Tensor, documents: Documents, shard: ContextShard | None) -> AnswerPairs:
        """Find the pairs in a batch.

        Args:
            input_ids: [B, row] int64.
            labels: [B, row] int64; every answer has at least one label that is not ignored.
            documents: Document bounds; documents with labels are alternately chosen and rejected answers.
            shard: Tokens of a row that this rank computes; None means all.

        Raises:
            UsageError: The number of answers is odd.
        """
        positions = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
        bounds = documents.cu_seqlens.long()
        numbers, answers, counts = torch.bucketize(positions, bounds[1:], right=True).unique_consecutive(
            return_inverse=True, return_counts=True
        )
        num_pairs = len(numbers) // 2
        if len(numbers) % 2:
            raise UsageError(
                "data: a rejected answer does not follow each chosen one; see `ropepp-lit prepare --verify`"
            )
        content = torch.stack((input_ids.flatten(), labels.flatten()), dim=1).int().numpy()
        # Up to the last label: a token after it is an input only if the row does not end with it.
        ends = positions[counts.cumsum(0)[1::2] - 1] + 1
        ranges = zip(bounds[numbers[::2]].tolist(), ends.tolist(), strict=True)
        keys = tuple(_hash(content[start:end].tobytes()) for start, end in ranges)
        answer_of = torch.full((labels.numel(),), -1).index_copy(0, positions, answers).view_as(labels)
        firsts = (answers != F.pad(answers[:-1], (1, 0), value=-1)) & (answers % 2 == 0)
        is_first = torch.zeros(labels.numel(), dtype=torch.bool).index_copy(0, positions, firsts).view_as(labels)
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
    """[B, T] int64: the next token of each position; -100 is ignored."""

    documents: Documents | ShardedDocuments | None
    """Bounds of packed documents in full rows, or the keys that this rank attends to if ranks gather keys and values;
    None if rows are plain causal ones."""

    places: Tensor | None
    """[M] int64: positions of the labels that are not ignored, in the flattened batch; None if none is ignored."""

    num_labels: int
    """Number of labels that are not ignored (M)."""

    num_tokens: int
    """Number of tokens in full rows."""

    visible_pairs: int
    """Number of query-key pairs that attention computes, in full rows: Σ n (n + 1) / 2 over documents of n tokens."""

    weights: Tensor | None = None
    """[B, T] float32: weight of each label if the loss is averaged over documents: 1 / (labels of its document in the
    full row). None means equal weights."""

    num_documents: int = 0
    """Number of documents with labels, if the loss is averaged over documents. Of ranks that share rows, the one with
    the first label of a document counts it."""

    pairs: AnswerPairs | None = None
    """Pairs of answers, if the documents are pairs."""

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
        """Create a batch from full rows on the CPU.

        Args:
            input_ids: [B, row] int64.
            labels: [B, row] int64.
            documents: Bounds of packed documents.
            shard: Tokens of a row that this rank computes; None means all.
            weighs_documents: Whether to weight labels so that all documents have equal weight.
            holds_pairs: Whether documents with labels are alternately chosen and rejected answers.
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
            weights, is_first = _label_weights(labels, documents)
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
        is_label = (labels != IGNORE_INDEX).flatten()
        num_labels = int(is_label.sum())
        places = None if num_labels == len(is_label) else is_label.nonzero().flatten()
        num_documents = 0 if is_first is None else int(is_first.sum())
        return cls(
            input_ids, labels, sharded, places, num_labels, num_tokens, visible_pairs, weights, num_documents, pairs
        )

    def loss(self, decoder: Decoder, reduction: Reduction = "sum") -> Tensor:
        """Compute the loss of the labels, see :meth:`~ropepp_lit.nn.decoder.Decoder.loss`."""
        return decoder.loss(
            self.input_ids,
            self.labels,
            documents=self.documents,
            label_indices=self.places,
            weights=self.weights,
            reduction=reduction,
        )


def _label_weights(labels: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """Return the weight of each label of full rows, float32, and whether it is its document's first; same shape."""
    positions = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
    numbers = torch.bucketize(positions, documents.cu_seqlens[1:].long(), right=True)
    weights = torch.zeros(labels.numel(), dtype=torch.float32)
    weights[positions] = 1 / torch.bincount(numbers).float()[numbers]
    is_first = torch.zeros(labels.numel(), dtype=torch.bool)
    is_first[positions] = numbers != F.pad(numbers[:-1], (1, 0), value=-1)
    return weights.view_as(labels), is_first.view_as(labels)
