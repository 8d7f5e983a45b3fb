"""A decoder block: attention and SwiGLU on a pre-norm residual stream, with optional activation checkpointing.

:meth:`Block._compute` is the block; :meth:`Block.forward` only decides whether its activations are saved or recomputed
in the backward pass. Read :mod:`ropepp_lit.nn.decoder` next.

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
        """Tokens per chunk; chunks are recomputed in the backward pass. None computes all tokens at once and recomputes
        nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B, T, hidden_size] to [B, T, hidden_size]."""
        hidden = hidden.to(activation_dtype(hidden))
        if self.chunk_tokens is None or hidden.shape[1] <= self.chunk_tokens:
            return self._compute(hidden)
        if torch.compiler.is_compiling():  # a compiled graph tracks by itself what it has recomputed
            parts = hidden.split(self.chunk_tokens, dim=1)
            return torch.cat([checkpoint(self._compute, part, use_reentrant=False) for part in parts], dim=1)
        return compute_in_chunks(self, self._compute, hidden, self.chunk_tokens)

    def _compute(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class Block(nn.Module):
    """Attention and SwiGLU, each on the normalized residual stream."""

    def __init__(self, config: DecoderConfig, scheme: PositionScheme, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, scheme, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_checkpointed = False
        """Whether only the input is saved for the backward pass, which recomputes the rest."""
        self.keeps_attention = False
        """Whether a checkpointed block saves the outputs of attention too."""
        self.has_dropout = False
        """Whether the recomputation must use the same random numbers."""
        self.is_offloaded = False
        """Whether the saved input is moved to CPU memory."""

    def forward(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, ...],
        *,
        documents: Documents | ShardedDocuments | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map [B, T, hidden_size] to [B, T, hidden_size]; see :meth:`Attention.forward` for the other arguments."""
        if not (self.is_checkpointed and torch.is_grad_enabled()) or cache is not None:
            return self._compute(hidden, tables, documents, cache, mask)
        # A partial, because torch.compile accepts no other callable here.
        selective: dict[str, Any] = {"context_fn": partial(keep_attention)} if self.keeps_attention else {}
        # Inside the block and not around it, so that parameter names do not change.
        with save_on_cpu(pin_memory=True) if self.is_offloaded else nullcontext():
            output: Tensor = checkpoint(
                self._compute,
                hidden,
                tables,
                documents,
                use_reentrant=False,
                preserve_rng_state=self.has_dropout,
                **selective,
            )
        return output

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
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output
