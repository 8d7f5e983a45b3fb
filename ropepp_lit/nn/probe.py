"""Hooks into the scores and weights of attention, which is then computed without fused kernels.

Shapes: B batch, T queries, S keys, H attention heads, K key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropepp_lit.nn.documents import Documents


class Probe:
    """Base class of probes, which read and may change the scores of attention. Memory is quadratic in the context.

    Subclass it and pass an instance to :meth:`~ropepp_lit.nn.decoder.Decoder.probed`. Heads are in the order of the
    layout: with RoPE++ the even ones are real, the odd ones imaginary.
    """

    def scores(self, layer: int, scores: Tensor) -> Tensor:
        """Return the scores to use, given a layer's scores [B, H, T, S]: qᵀk · scale, before the mask."""
        return scores

    def weights(self, layer: int, weights: Tensor) -> None:
        """Process a layer's weights [B, H, T, S] after the softmax."""

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        documents: Documents | None = None,
        mask: Tensor | None = None,
        scale: float,
    ) -> Tensor:
        """Compute the result of :func:`ropepp_lit.nn.kernels.attend`, with the same arguments, and call the hooks."""
        groups = queries.shape[2] // keys.shape[2]
        keys, values = (x.repeat_interleave(groups, dim=2) for x in (keys, values))
        scores = self.scores(layer, torch.einsum("bthd,bshd->bhts", queries, keys) * scale)
        num_queries, num_keys = scores.shape[2:]
        if mask is None:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device)
            mask = mask.tril(num_keys - num_queries)[None, None]
            if documents is not None:
                mask = mask & (documents.ids[:, None, :, None] == documents.ids[:, None, None, :])
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)
        self.weights(layer, weights)
        return torch.einsum("bhts,bshd->bthd", weights, values)
