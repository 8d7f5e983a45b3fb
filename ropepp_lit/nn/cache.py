"""The cache of keys and values for generation.

Shapes: B batch, T new tokens, S tokens so far, K key/value heads, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for a whole generation, allocated once.

    Its size depends on `num_key_value_heads` of the head layout, so EH takes half of RoPE's.

    Args:
        num_layers: Decoder blocks.
        batch_size: B.
        num_key_value_heads: K.
        max_tokens: Tokens that fit in each row, prompt and answer together.
        head_dim: D, with the position scheme's extra dimensions.
        dtype: Of keys and values.
        device: Of keys and values.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_key_value_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, batch_size, num_key_value_heads, max_tokens, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.document_ids: Tensor | None = None
        self.num_tokens = 0
        self.is_packed = False
        """One row packs documents that are read in one forward; attention keeps them apart by their bounds, not a mask.
        """
        self._padding: Tensor | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens that fit in each row."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def extend(self, num_tokens: int, document_ids: Tensor | None) -> Tensor | None:
        """Make room for the next tokens; call once per forward, before the layers.

        Args:
            num_tokens: T.
            document_ids: [B, T] int32, or None where every row is one document.

        Returns:
            The mask [B or 1, 1, T, S], true where a query sees a key; None where causality alone decides, or documents'
            bounds.

        Raises:
            ValueError: the cache is full.
        """
        start, end = self.num_tokens, self.num_tokens + num_tokens
        if end > self.max_tokens:
            raise ValueError(f"the KV cache holds {self.max_tokens} tokens, and {end} are needed")
        self.num_tokens = end
        if self.is_packed:
            return None
        if self._padding is not None:
            assert num_tokens == 1
            assert document_ids is None
            return (torch.arange(end, device=self.keys.device) >= self._padding[:, None])[:, None, None]
        if document_ids is not None or self.document_ids is not None:
            if self.document_ids is None:
                self.document_ids = self.keys.new_zeros(self.keys.shape[1], self.max_tokens, dtype=torch.int32)
            self.document_ids[:, start:end] = 0 if document_ids is None else document_ids
        else:
            return None
        slots = torch.arange(end, device=self.keys.device)
        mask = (slots <= slots[start:, None])[None, None]
        if self.document_ids is not None:
            ids = self.document_ids[:, :end]
            mask = mask & (ids[:, None, start:, None] == ids[:, None, None, :])
        return mask

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [B, T, K, D]; returns all so far, [B, S, K, D], in the dtype given."""
        start = self.num_tokens - keys.shape[1]
        stored = []
        for whole, new in ((self.keys[layer], keys), (self.values[layer], values)):
            whole[:, :, start : self.num_tokens] = new.transpose(1, 2)
            stored.append(whole[:, :, : self.num_tokens].transpose(1, 2).to(new.dtype))
        return stored[0], stored[1]

    def row(self, number: int, padding: int) -> KVCache:
        """An empty cache of one row, which writes into a row of this one behind its first `padding` slots."""
        row = copy.copy(self)
        row.num_tokens, row._padding = 0, None
        row.keys, row.values = (x[:, number : number + 1, :, padding:] for x in (self.keys, self.values))
        return row

    def set_rows(self, num_tokens: int, padding: Sequence[int]) -> None:
        """Say what the rows hold, which were written by :meth:`row` or from outside.

        Args:
            num_tokens: Slots that are taken.
            padding: Slots at the beginning of each row that hold nothing. Forward passes then take one token each.
        """
        self.num_tokens = num_tokens
        self._padding = torch.tensor(padding, device=self.keys.device) if any(padding) else None

    def keep_rows(self, numbers: Sequence[int], padding: Sequence[int]) -> None:
        """Drop all other rows, in place, and the slots in which the rows that are left hold nothing.

        Args:
            numbers: Rows to keep, ascending; at least one.
            padding: Slots at the beginning of each that hold nothing.
        """
        for place, number in enumerate(numbers):
            if place != number:
                self.keys[:, place], self.values[:, place] = self.keys[:, number], self.values[:, number]
        first = min(padding)
        self.keys, self.values = (x[:, : len(numbers), :, first:] for x in (self.keys, self.values))
        self.set_rows(self.num_tokens - first, [slots - first for slots in padding])

    def grow(self, max_tokens: int) -> None:
        """Make room for at least `max_tokens` tokens in each row; what the cache holds is copied."""
        if max_tokens > self.max_tokens:
            for name, old in (("keys", self.keys), ("values", self.values)):
                new = old.new_zeros(*old.shape[:3], max_tokens, old.shape[4])
                new[:, :, :, : self.num_tokens] = old[:, :, :, : self.num_tokens]
                setattr(self, name, new)
