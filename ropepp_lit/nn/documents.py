"""Where the documents in a packed row begin and end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Bounds of the documents that are packed in the rows of a batch. B batch, T tokens, N documents in all.

    Attention stays inside a document. Made once per batch, on the CPU, so that no GPU has to be asked for the bounds.
    """

    ids: Tensor
    """[B, T] int32: the document of each token, counted from 0 in each row and never falling within it."""

    cu_seqlens: Tensor
    """[N + 1] int32: where documents start in the flattened batch, and its end (FlashAttention's convention)."""

    positions: Tensor
    """[B, T] int64: positions, restarting at 0 with each document."""

    @classmethod
    def from_eos(cls, input_ids: Tensor, eos_token_id: int) -> Documents:
        """Documents that end with `eos_token_id`: one starts at each row's begin and behind each EOS.

        Args:
            input_ids: [B, T] integers.
            eos_token_id: The token that closes a document.
        """
        starts = torch.zeros_like(input_ids, dtype=torch.bool)
        starts[:, 1:] = input_ids[:, :-1] == eos_token_id
        return cls.from_ids(starts.cumsum(dim=1))

    @classmethod
    def from_ids(cls, ids: Tensor) -> Documents:
        """Documents by number.

        Args:
            ids: [B, T] integers: equal for the tokens of one document, which must be consecutive.
        """
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        slots = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        first = torch.where(starts, slots, 0).cummax(dim=1).values
        bounds = starts.flatten().nonzero().flatten()
        return cls(
            ids=ids.to(torch.int32),
            cu_seqlens=torch.cat((bounds, bounds.new_tensor([ids.numel()]))).to(torch.int32),
            positions=slots - first,
        )
