"""A decoder block: attention and SwiGLU, and what of them the backward pass computes again.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ropepp_lit.nn.attention import Attention
from ropepp_lit.nn.cache import KVCache
from ropepp_lit.nn.config import DecoderConfig
from ropepp_lit.nn.context_parallel import ShardedDocuments
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.positions import PositionScheme
from ropepp_lit.nn.precision import activation_dtype
from ropepp_lit.nn.recomputation import compute_in_chunks, keep_attention


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.chunk_tokens: int | None = None
        """Tokens computed at once, and again in the backward pass; None computes all and keeps what they need."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, hidden_size] to the same."""
        hidden = hidden.to(activation_dtype(hidden))
        if self.chunk_tokens is None or hidden.shape[1] <= self.chunk_tokens:
            return self._compute(hidden)
        if torch.compiler.is_compiling():  # a graph knows by itself what it has computed again
            parts = hidden.split(self.chunk_tokens, dim=1)
            return torch.cat([checkpoint(self._compute, part, use_reentrant=False) for part in parts], dim=1)
        return compute_in_chunks(self, self._compute, hidden, self.chunk_tokens)

    def _compute(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nn.Module):
    """Attention and SwiGLU, each on the normalized residual stream."""

    def __init__(self, config: DecoderConfig, scheme: PositionScheme, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, scheme, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_checkpointed = False
        """Keep the input alone for the backward pass, and compute the rest again there."""
        self.keeps_attention = False
        """Then keep the results of attention too."""
        self.has_dropout = False
        """Whether what is computed again must draw the same random numbers."""
        self.is_offloaded = False
        """Keep that input in the CPU's memory."""

    def forward(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, ...],
        *,
        documents: Documents | ShardedDocuments | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B, T, hidden_size] to the same; the other arguments are those of :meth:`Attention.forward`."""
        if not (self.is_checkpointed and torch.is_grad_enabled()) or cache is not None:
            return self._compute(hidden, tables, documents, cache, mask)
        # A partial, because torch.compile takes no other function here.
        selective: dict[str, Any] = {"context_fn": partial(keep_attention)} if self.keeps_attention else {}
        # Inside the block and not around it, so that parameter names stay as they are.
        with save_on_cpu(pin_memory=True) if self.is_offloaded else nullcontext():
            return checkpoint(
                self._compute,
                hidden,
                tables,
                documents,
                use_reentrant=False,
                preserve_rng_state=self.has_dropout,
                **selective,
            )

    def _compute(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, ...],
        documents: Documents | ShardedDocuments | None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        hidden = hidden + self.self_attn(
            self.input_layernorm(hidden), tables, documents=documents, cache=cache, mask=mask
        )
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
