"""Attention: projections, scores over documents, and the cache of keys and values.

Shapes: B batch, T tokens, H attention heads (real and imaginary), K key/value heads, D head size.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from ropepp_lit.nn.config import DecoderConfig
from ropepp_lit.nn.context_parallel import heads_of_rank, heads_to_tokens, tokens_to_heads
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.positions import PositionScheme

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # an extra, for CUDA only
    flash_attn_varlen_func = None

VARLEN_IS_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""From torch 2.12 on."""


class KVCache:
    """Keys and values of every layer for a whole generation, allocated once.

    Its size is what the variant promises: `num_key_value_heads` of the head layout, so EH takes half of RoPE's.
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
            num_tokens: T, how many tokens come.
            document_ids: [B, T] int32, or None where every row is one document.

        Returns:
            The mask [B, 1, T, tokens so far], true where a query sees a key; None where causality alone decides.

        Raises:
            ValueError: the cache is full.
        """
        start, end = self.num_tokens, self.num_tokens + num_tokens
        if end > self.max_tokens:
            raise ValueError(f"the KV cache holds {self.max_tokens} tokens, and {end} are needed")
        self.num_tokens = end
        if document_ids is not None or self.document_ids is not None:
            if self.document_ids is None:
                self.document_ids = self.keys.new_zeros(self.keys.shape[1], self.max_tokens, dtype=torch.int32)
            self.document_ids[:, start:end] = 0 if document_ids is None else document_ids
        elif num_tokens == 1 or start == 0:
            return None
        slots = torch.arange(end, device=self.keys.device)
        mask = (slots <= slots[start:, None])[None, None]
        if self.document_ids is not None:
            ids = self.document_ids[:, :end]
            mask = mask & (ids[:, None, start:, None] == ids[:, None, None, :])
        return mask

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [B, K, T, D]; returns all so far, [B, K, tokens, D]."""
        start = self.num_tokens - keys.shape[2]
        self.keys[layer, :, :, start : self.num_tokens] = keys
        self.values[layer, :, :, start : self.num_tokens] = values
        found = self.keys[layer, :, :, : self.num_tokens], self.values[layer, :, :, : self.num_tokens]
        return found[0].to(keys.dtype), found[1].to(keys.dtype)  # mixed precision computes in another dtype


class Probe:
    """Looks into attention, which is then computed in the open: scores and weights of all queries and keys.

    Subclass it and give it to :meth:`~ropepp_lit.nn.decoder.Decoder.probed`. Heads are in the order of the layout: with
    RoPE++ the even ones are real, the odd ones imaginary.
    """

    def scores(self, layer: int, scores: Tensor) -> Tensor:
        """What attention goes on with, of the scores [B, H, T, S] of a layer: qᵀk / √D, before mask and softmax."""
        return scores

    def weights(self, layer: int, weights: Tensor) -> None:
        """See the weights [B, H, T, S] after the softmax."""


class Attention(nn.Module):
    """Grouped-query self-attention whose head counts and rotation come from the position scheme."""

    def __init__(self, config: DecoderConfig, scheme: PositionScheme, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.rotate, self.scale = scheme.rotate, 1 / math.sqrt(config.head_dim)
        layout = scheme.head_layout(
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads
        )
        self.extra_dims = layout.extra_dims
        self.constants: tuple[str, ...] = ()
        """Names of the buffers with the position scheme's constants."""
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, layout.num_query_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, layout.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, layout.num_key_value_heads * self.head_dim, bias=bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.has_norms = config.qk_norm
        self.context_group: dist.ProcessGroup | None = None
        """Ranks that share the tokens of each row; see :meth:`~ropepp_lit.nn.decoder.Decoder.set_context_group`."""
        self.probe: Probe | None = None
        self.o_proj = nn.Linear(layout.num_attention_heads * self.head_dim, width, bias=config.attention_output_bias)

    @property
    def context_parallel_size(self) -> int:
        """Ranks that share the tokens of a row."""
        return 1 if self.context_group is None else self.context_group.size()

    def set_constants(self, constants: dict[str, Tensor]) -> None:
        """Keep what :meth:`PositionScheme.constants` made, as buffers, so that it is saved with the weights."""
        for name, value in constants.items():
            self.register_buffer(name, value.to(self.q_proj.weight.device))
        self.constants = tuple(constants)

    def forward(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, ...],
        *,
        documents: Documents | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            hidden: [B, T, hidden_size].
            tables: Of the position scheme.
            documents: Bounds of packed documents; None means that every row is one.
            cache: Keys and values so far, already extended by T.
            mask: With a cache, what :meth:`KVCache.extend` returned.

        Returns:
            [B, T, hidden_size].
        """
        queries, keys, values = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.has_norms:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        group = None if cache is not None else self.context_group
        if group is not None:
            # Before the rotation: an imaginary query is made of its real one, so it need not travel.
            queries, keys, values = (tokens_to_heads(x, group) for x in (queries, keys, values))
        constants = [self.get_buffer(name) for name in self.constants]
        if group is not None:
            constants = [heads_of_rank(constant, group) for constant in constants]
        queries, keys = self.rotate(queries, keys, (*tables, *constants))
        if self.extra_dims:
            values = F.pad(values, (0, self.extra_dims))  # kernels of linear memory want one size of all three
        if cache is not None:
            output = self._attend_cached(queries, keys, values, cache, mask)
        elif self.probe is not None:
            output = self._attend_in_the_open(queries, keys, values, _mask_of(queries, documents))
        else:
            output = attend(queries, keys, values, documents, scale=self.scale)
        if self.extra_dims:
            output = output[..., : self.head_dim]
        if group is not None:
            output = heads_to_tokens(output, group)
        return self.o_proj(output.flatten(-2))

    def _attend_cached(
        self, queries: Tensor, keys: Tensor, values: Tensor, cache: KVCache, mask: Tensor | None
    ) -> Tensor:
        """Attention over the cache and the new tokens; [B, T, heads, D] each; returns [B, T, H, D]."""
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        keys, values = cache.update(self.layer, keys, values)
        causal = mask is None and queries.shape[2] == keys.shape[2]
        if self.probe is not None:
            visible = _mask_of(queries.transpose(1, 2), None) if causal else mask
            queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
            return self._attend_in_the_open(queries, keys, values, visible)
        output = F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=causal, scale=self.scale, enable_gqa=True
        )
        return output.transpose(1, 2)

    def _attend_in_the_open(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention through the probe; [B, T, heads, D] each, mask [B or 1, 1, T, S] or None; returns [B, T, H, D]."""
        assert self.probe is not None
        groups = queries.shape[2] // keys.shape[2]
        keys, values = (x.repeat_interleave(groups, dim=2) for x in (keys, values))
        scores = torch.einsum("bthd,bshd->bhts", queries, keys) * self.head_dim**-0.5
        scores = self.probe.scores(self.layer, scores)
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)
        self.probe.weights(self.layer, weights)
        return torch.einsum("bhts,bshd->bthd", weights, values)


def _mask_of(queries: Tensor, documents: Documents | None) -> Tensor:
    """[B or 1, 1, T, T], true where a query sees a key; queries are [B, T, H, D]."""
    num_tokens = queries.shape[1]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=queries.device).tril()[None, None]
    if documents is None:
        return causal
    return causal & (documents.ids[:, None, :, None] == documents.ids[:, None, None, :])


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None, *, scale: float | None = None
) -> Tensor:
    """Causal attention over whole rows, or inside each document.

    Args:
        queries: [B, T, H, D].
        keys: [B, T, K, D].
        values: [B, T, K, D].
        documents: Bounds of packed documents; None means that every row is one.
        scale: Of the scores; None means 1 / √D.

    Returns:
        [B, T, H, D].
    """
    if documents is not None:
        return attend_within_documents(queries, keys, values, documents, scale=scale)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    output = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    return output.transpose(1, 2)


def attend_within_documents(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Documents, *, scale: float | None = None
) -> Tensor:
    """Causal attention that stays inside each document.

    On CUDA in half precision the package flash-attn where it is installed, else torch's `varlen_attn`; in other
    precisions on a GPU one call with a mask, on the CPU one call per document. All agree.

    Args:
        queries: [B, T, H, D].
        keys: [B, T, K, D].
        values: [B, T, K, D].
        documents: Bounds of the documents.
        scale: Of the scores; None means 1 / √D.

    Returns:
        [B, T, H, D].
    """
    if queries.is_cuda and queries.dtype in (torch.float16, torch.bfloat16):
        bounds, longest = documents.cu_seqlens, queries.shape[1]  # an upper bound: to know better costs a wait
        q, k, v = (x.flatten(0, 1) for x in (queries, keys, values))
        if flash_attn_varlen_func is not None:
            output = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True)
        else:
            grouped: dict[str, Any] = {"enable_gqa": True} if VARLEN_IS_GROUPED else {}
            if not VARLEN_IS_GROUPED:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            # Causal is a window with nothing to its right.
            output = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **grouped)
        return output.view_as(queries)
    if queries.device.type != "cpu":
        mask = _mask_of(queries, documents)
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        output = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=True)
        return output.transpose(1, 2)
    # One call per document skips what a mask would only hide.
    lengths = documents.cu_seqlens.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in zip(
            *(x.flatten(0, 1).transpose(0, 1)[None].split(lengths, dim=2) for x in (queries, keys, values)), strict=True
        )
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).unflatten(0, queries.shape[:2])
