"""The KV cache of generation.

Shapes: B batch, T new tokens, S tokens so far, K key/value heads, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer.

    Its size is proportional to `num_key_value_heads` of the head layout, so EH needs half of RoPE's memory.

    Args:
        num_layers: Decoder blocks.
        batch_size: B.
        num_key_value_heads: K.
        max_tokens: Capacity of each row in tokens, prompt and completion together.
        head_dim: D, including the position scheme's extra dimensions.
        dtype: Dtype of keys and values.
        device: Device of keys and values.
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
        """Whether the one row packs documents, computed in one forward pass and separated by bounds, not by a mask."""
        self._padding: Tensor | None = None

    @property
    def max_tokens(self) -> int:
        """Capacity of each row in tokens."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Size of keys and values in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def extend(self, num_tokens: int, document_ids: Tensor | None) -> Tensor | None:
        """Reserve the slots of the next tokens; call once per forward pass, before the layers.

        Args:
            num_tokens: T.
            document_ids: [B, T] int32, or None where every row is one document.

        Returns:
            The mask [B or 1, 1, T, S], true where a query attends to a key; None where causality or the bounds of
            documents are enough.

        Raises:
            ValueError: the cache is full.
        """
        start, end = self.num_tokens, self.num_tokens + num_tokens
        if end > self.max_tokens:
            raise ValueError(f"the KV cache has a capacity of {self.max_tokens} tokens, and {end} are needed")
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
        """Store a layer's new keys and values [B, T, K, D]; return all so far, [B, S, K, D], in the same dtype."""
        start = self.num_tokens - keys.shape[1]
        results = []
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cached[:, :, start : self.num_tokens] = new.transpose(1, 2)
            results.append(cached[:, :, : self.num_tokens].transpose(1, 2).to(new.dtype))
        return results[0], results[1]

    def row(self, number: int, padding: int) -> KVCache:
        """Return an empty cache of one row, a view of a row of this one after its first `padding` slots."""
        row = copy.copy(self)
        row.num_tokens, row._padding = 0, None
        row.keys, row.values = (x[:, number : number + 1, :, padding:] for x in (self.keys, self.values))
        return row

    def set_rows(self, num_tokens: int, padding: Sequence[int]) -> None:
        """Set how much of the rows is filled, after they were written through :meth:`row` or directly.

        Args:
            num_tokens: Number of slots in use.
            padding: Number of empty slots at the beginning of each row. Forward passes then accept one token each.
        """
        self.num_tokens = num_tokens
        self._padding = torch.tensor(padding, device=self.keys.device) if any(padding) else None

    def keep_rows(self, numbers: Sequence[int], padding: Sequence[int]) -> None:
        """Drop all other rows, in place, and the leading slots that are empty in all remaining rows.

        Args:
            numbers: Rows to keep, ascending; at least one.
            padding: Number of empty slots at the beginning of each.
        """
        for index, number in enumerate(numbers):
            if index != number:
                self.keys[:, index], self.values[:, index] = self.keys[:, number], self.values[:, number]
        first = min(padding)
        self.keys, self.values = (x[:, : len(numbers), :, first:] for x in (self.keys, self.values))
        self.set_rows(self.num_tokens - first, [slots - first for slots in padding])

    def grow(self, max_tokens: int) -> None:
        """Increase the capacity of each row to at least `max_tokens` tokens; stored keys and values are copied."""
        if max_tokens > self.max_tokens:
            for name, old in (("keys", self.keys), ("values", self.values)):
                new = old.new_zeros(*old.shape[:3], max_tokens, old.shape[4])
                new[:, :, :, : self.num_tokens] = old[:, :, :, : self.num_tokens]
                setattr(self, name, new)
