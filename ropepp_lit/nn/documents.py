"""Bounds of the documents in packed rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Bounds of the documents that are packed in the rows of a batch. B batch, T tokens, N documents in total.

    There is no attention between documents. Computed once per batch, on the CPU, to avoid synchronizing with a GPU.
    """

    ids: Tensor
    """[B, T] int32: the document of each token, counted from 0 in each row, non-decreasing."""

    cu_seqlens: Tensor
    """[N + 1] int32: starts of documents in the flattened batch, and its end (FlashAttention's convention)."""

    positions: Tensor
    """[B, T] int64: positions, restarting at 0 with each document."""

    longest: int
    """Tokens of the longest document."""

    @classmethod
    def from_ids(cls, ids: Tensor) -> Documents:
        """Return the bounds of documents given by number.

        Args:
            ids: [B, T] integers: equal for the tokens of one document, which must be consecutive.
        """
        starts = torch.ones_like(ids, dtype=torch.bool)
        torch.ne(ids[:, 1:], ids[:, :-1], out=starts[:, 1:])
        return cls.from_starts(starts)

    @classmethod
    def from_starts(cls, starts: Tensor) -> Documents:
        """Return the bounds of documents given by their first tokens.

        Args:
            starts: [B, T] bool: true where a document starts. The first token of each row always starts one, or
                continues one whose beginning is not in the row.
        """
        starts = starts.clone()
        starts[:, 0] = True
        bounds = starts.flatten().nonzero().flatten()
        cu_seqlens = torch.cat((bounds, bounds.new_tensor([starts.numel()])))
        lengths = cu_seqlens.diff()
        numbers = torch.arange(len(bounds), device=starts.device)
        numbers = numbers - torch.where(bounds % starts.shape[1] == 0, numbers, 0).cummax(dim=0).values
        slots = torch.arange(starts.numel(), device=starts.device)
        return cls(
            ids=numbers.to(torch.int32).repeat_interleave(lengths).view_as(starts),
            cu_seqlens=cu_seqlens.to(torch.int32),
            positions=(slots - bounds.repeat_interleave(lengths)).view_as(starts),
            longest=int(lengths.max()),
        )
