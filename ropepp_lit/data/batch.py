"""What a training step reads, with all that a GPU would have to be waited for computed on the CPU.

Shapes: B rows, T tokens of each row that this rank computes, M labels that count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp_lit.nn.context_parallel import ContextShard, ShardedDocuments
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.loss import IGNORE_INDEX


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

    @classmethod
    def create(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        documents: Documents | None,
        *,
        shard: ContextShard | None = None,
        weighs_documents: bool = False,
    ) -> Batch:
        """A batch of whole rows on the CPU.

        Args:
            input_ids: [B, row] int64.
            labels: [B, row] int64.
            documents: Bounds of packed documents.
            shard: Which tokens of a row this rank computes; None means all.
            weighs_documents: Weigh labels so that each of `documents` weighs the same.
        """
        rows, length = input_ids.shape
        if documents is None:
            pairs = rows * length * (length + 1) // 2
        else:
            lengths = documents.cu_seqlens.diff().long()
            pairs = int((lengths * (lengths + 1)).sum()) // 2
        num_tokens = input_ids.numel()
        weights, is_first = None, None
        if weighs_documents:
            assert documents is not None
            weights, is_first = _weigh(labels, documents)
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
        return cls(input_ids, labels, sharded, places, num_labels, num_tokens, pairs, weights, num_documents)


def _weigh(labels: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """What each label of whole rows weighs, float32, and whether it is the first of its document; of their shape."""
    places = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
    numbers = torch.bucketize(places, documents.cu_seqlens[1:].long(), right=True)
    weights = torch.zeros(labels.numel(), dtype=torch.float32)
    weights[places] = 1 / torch.bincount(numbers).float()[numbers]
    is_first = torch.zeros(labels.numel(), dtype=torch.bool)
    is_first[places] = numbers != F.pad(numbers[:-1], (1, 0), value=-1)
    return weights.view_as(labels), is_first.view_as(labels)
