"""Training samples: rows of tokens cut or packed from token shards, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ropepp_lit.data.batch import Batch
from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.packing import PADDING_LENGTH, Lengths, PackedPlan, TooLong
from ropepp_lit.data.plan import BlockPlan, Mixture
from ropepp_lit.data.remote import RemoteFolder
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.data.trained_tokens import ID_BITS, REJECTED
from ropepp_lit.errors import UsageError
from ropepp_lit.nn.context_parallel import ContextShard
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.loss import IGNORE_INDEX


class TokenSource(NamedTuple):
    """Token shards of one source, and their weight in the training mixture."""

    name: str
    """Name of the source as given by the user."""
    folder: Path
    """Folder of the manifest."""
    manifest: Manifest
    """Manifest of the shards."""
    remote: RemoteFolder | None
    """Object store of the chunks; None if they are in the folder."""
    weight: float
    """Relative weight in the mixture."""


PADDING = ~0
"""Padding: token 0, stored as not trained (:mod:`ropepp_lit.data.trained_tokens`)."""


class Samples(Dataset):
    """Samples of a split, [context_length + 1] tokens each: blocks of text, or rows of complete conversations.

    Args:
        sources: Token shards to read.
        split: `train` or `validation`.
        context_length: Number of input tokens of a sample.
        intra_document_masking: See :class:`~ropepp_lit.data.token_data.TokenData`.
        seed: Seed of the order.
        in_order: Whether to read every token once, in order, instead of shuffled samples.
        too_long: Handling of conversations that are longer than a sample.

    Raises:
        UsageError: The context is longer than all tokens of a source, or shorter than all of its conversations.
    """

    def __init__(
        self,
        sources: list[TokenSource],
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
        """Plan of each source: the tokens of each sample."""
        self._manifests = [source.manifest for source in sources]
        self._names = [f"{split} in {source.name}" for source in sources]
        for number, source in enumerate(sources):
            shards = TokenShards(source.folder, source.manifest, split, remote=source.remote)
            order = None if in_order else seed + 1_000_003 * number
            create_plan = self._packed_plan if source.manifest.marks_trained_tokens else self._block_plan
            self._shards.append(shards)
            self.plans.append(create_plan(shards, order, self._names[number], too_long))

    def _block_plan(self, shards: TokenShards, seed: int | None, name: str, _: TooLong) -> BlockPlan:
        chunk_tokens = [chunk.tokens for chunk in shards.chunks]
        plan = BlockPlan(chunk_tokens, context_length=self._context_length, seed=seed)
        if plan.samples_per_pass == 0:
            raise UsageError(
                f"data.context_length: {self._context_length} is longer than the {sum(chunk_tokens):,} tokens of "
                f"{name}; provide more text or set a shorter context"
            )
        return plan

    def _packed_plan(self, shards: TokenShards, seed: int | None, name: str, too_long: TooLong) -> PackedPlan:
        row_length = self._context_length + 1
        lengths = Lengths.read(shards, row_length=row_length, too_long=too_long)
        plan = PackedPlan(lengths, row_length=row_length, seed=seed)
        if plan.samples_per_pass == 0:
            remedy = f"set it to {lengths.shortest - 1:,} or more"
            if too_long == "cut":
                problem = f"no conversation of {name} has a trained token after truncation to"
            else:
                problem = (
                    f"all {'pairs of answers' if self._holds_pairs else 'conversations'} of {name} are longer than"
                )
                remedy += "" if self._holds_pairs else ", or data.too_long to cut"
            raise UsageError(f"data.context_length: {problem} {self._context_length:,} tokens; {remedy}")
        return plan

    def average_conversations(self) -> None:
        """Weight the labels of batches so that all conversations have equal weight.

        Raises:
            UsageError: A source is text.
        """
        for name, plan in zip(self._names, self.plans, strict=True):
            if not isinstance(plan, PackedPlan):
                raise UsageError(
                    f"model.loss_average: conversations requires training data of conversations, but {name} is text; "
                    "use trained_tokens"
                )
        self._weighs_conversations = True

    def packed(self) -> Iterator[tuple[str, PackedPlan, Manifest]]:
        """Iterate over the sources of conversations: name of split and source, plan, and manifest."""
        for name, plan, manifest in zip(self._names, self.plans, self._manifests, strict=True):
            if isinstance(plan, PackedPlan):
                yield name, plan, manifest

    def __len__(self) -> int:
        """Return the number of samples of one pass over all sources."""
        return sum(plan.samples_per_pass for plan in self.plans)

    def __getitems__(self, samples: list[int]) -> tuple[Tensor, Tensor | None]:
        """Read the samples of a batch.

        Args:
            samples: Numbers of the samples.

        Returns:
            Tokens, [samples, context_length + 1] int64, with untrained tokens and padding as complements; and a mask of
            the first tokens of documents, bool of the same shape, or None if rows are plain causal ones.
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
                    shards.prefetch(plan.next_chunks(number))
            row[end:] = PADDING
            if isinstance(self.plans[source], PackedPlan) and row_starts is not None:
                row_starts[end::PADDING_LENGTH] = True
        if starts is not None and self._holds_pairs:
            starts |= tokens < REJECTED
        return torch.from_numpy(tokens), None if starts is None else torch.from_numpy(starts)

    def collate(self, samples: tuple[Tensor, Tensor | None], shard: ContextShard | None = None) -> Batch:
        """Create a batch from the result of `__getitems__`: inputs, labels shifted by one, and document bounds."""
        tokens, starts = samples
        input_ids, labels = tokens[:, :-1], tokens[:, 1:]
        if self._has_untrained:
            input_ids = torch.maximum(input_ids, ~input_ids) & ID_BITS
            labels = labels.masked_fill(labels < 0, IGNORE_INDEX)
        if starts is None:
            return Batch.create(input_ids, labels, None, shard=shard)
        # The first token of a document is never a label: the token before it belongs to another document.
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
        """Iterate over the token ids of each document, [tokens] of the shards' dtype, in stored order."""
        for shards in self._shards:
            yield from shards.documents()
