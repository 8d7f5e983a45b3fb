"""The attention layer: projections, rotation by the position scheme, softmax attention, output projection.

The layer is grouped-query attention as in Llama, except that the scheme (:mod:`ropepp_lit.nn.positions`) determines the
head counts, and that its `rotate` may return more heads than the query projection has. Each head has its own softmax,
imaginary heads too, and one output projection reads them all. :mod:`ropepp_lit.nn.kernels` computes the softmax
attention. Start with :meth:`Attention._compute`; the rest is memory options. Read :mod:`ropepp_lit.nn.block` next.

Shapes: B batch, T tokens, S tokens including the cached ones, Q heads of the query projection, H attention heads (real
and imaginary), K key/value heads, D head size.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ropepp_lit.nn.cache import KVCache
from ropepp_lit.nn.config import DecoderConfig
from ropepp_lit.nn.context_parallel import (
    ContextGroup,
    ShardedDocuments,
    attend_to_gathered,
    heads_of_rank,
    heads_to_tokens,
    tokens_to_heads,
)
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.frequencies import Frequencies
from ropepp_lit.nn.kernels import attend
from ropepp_lit.nn.positions import PositionScheme, layout_of
from ropepp_lit.nn.precision import activation_dtype
from ropepp_lit.nn.probe import Probe

INITIAL_SCORE_SCALE = 0.168
"""Initial value of s: 1 / the mean of ln n over 1,024 tokens, as in the paper of SSMax."""


class _Gate(nn.Linear):
    """A linear layer that uses no random numbers when it is constructed, so that a gate changes no other weights."""

    def reset_parameters(self) -> None:
        """Do nothing; the decoder initializes the weights."""


class Attention(nn.Module):
    """Grouped-query self-attention whose head counts and rotation come from the position scheme."""

    def __init__(self, config: DecoderConfig, scheme: PositionScheme, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.rotate, self.scale = scheme.rotation(layer), 1 / math.sqrt(config.head_dim)
        self.layout = layout = layout_of(config, scheme)
        self.extra_dims = layout.extra_dims
        self.scheme_tensors: tuple[str, ...] = ()
        """Names of the position scheme's constants (buffers) and parameters."""
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, layout.num_query_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, layout.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, layout.num_key_value_heads * self.head_dim, bias=bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.has_norms = config.qk_norm
        self.output_gate: nn.Linear | None = None
        if config.attention_gate is not None:
            size = 1 if config.attention_gate == "head" else self.head_dim
            self.output_gate = _Gate(width, layout.num_attention_heads * size, bias=False)
        self.score_scale: nn.Parameter | None = None
        if config.score_scaling is not None:
            self.score_scale = nn.Parameter(torch.empty(layout.num_attention_heads))
        self.o_proj = nn.Linear(layout.num_attention_heads * self.head_dim, width, bias=config.attention_output_bias)
        self.head_groups = 1
        """Groups of heads, computed sequentially and recomputed in the backward pass; a divisor of K. 1 computes all
        heads at once, without recomputation."""
        self.context_group: ContextGroup | None = None
        """Ranks that shard the tokens of each row; see :meth:`~ropepp_lit.nn.decoder.Decoder.set_context_group`."""
        self.implementation: str | None = None
        """Implementation that :func:`~ropepp_lit.nn.kernels.attend` uses; None chooses by device and dtype."""
        self.probe: Probe | None = None
        """Hooks into the scores; see :meth:`~ropepp_lit.nn.decoder.Decoder.probed`."""

    def set_scheme_tensors(self, scheme: PositionScheme, frequencies: Frequencies) -> None:
        """Register the position scheme's constants and the initial values of its parameters."""
        device, layout, head_dim = self.q_proj.weight.device, self.layout, self.head_dim
        constants = scheme.constants(frequencies, layout=layout, head_dim=head_dim)
        parameters = scheme.parameters(frequencies, layout=layout, head_dim=head_dim)
        for name, value in constants.items():
            self.register_buffer(name, value.to(device))
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.to(device)))
        self.scheme_tensors = (*constants, *parameters)

    def forward(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, ...],
        *,
        documents: Documents | ShardedDocuments | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute causal self-attention.

        Queries and keys are cast to the dtype of the values, since autocast, the norms and the position scheme may
        return another one.

        Args:
            hidden: [B, T, hidden_size].
            tables: Tables of the position scheme; with `score_scaling`, followed by ln n [B, T, 1, 1], where n is the
                number of tokens that each token attends to.
            documents: Bounds of packed documents; None means that every row is one document. Where ranks gather keys
                and values, the bounds that this rank attends to.
            cache: Keys and values so far, already extended by T.
            mask: With a cache, the result of :meth:`KVCache.extend`.

        Returns:
            [B, T, hidden_size].
        """
        hidden = hidden.to(activation_dtype(hidden))
        if self.head_groups == 1 or cache is not None or self.probe is not None:
            return self._compute(hidden, tables, documents, cache, mask)
        output = None if self.o_proj.bias is None else self.o_proj.bias.to(hidden.dtype)
        for part in range(self.head_groups):
            added = checkpoint(
                self._compute, hidden, tables, documents, part=part, use_reentrant=False, preserve_rng_state=False
            )
            output = added if output is None else output + added
        assert output is not None
        return output

    def _compute(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, ...],
        documents: Documents | ShardedDocuments | None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        part: int | None = None,
    ) -> Tensor:
        """Return the output of all heads, or the summand of one group of heads (without the output projection's bias).

        A group has Q, K and H divided by the number of groups; so has a rank in the context-parallel mode `heads`.
        """
        queries, keys, values = (
            self._project(projection, hidden, part).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, T, Q, D], [B, T, K, D], [B, T, K, D]
        if self.has_norms:
            queries, keys = self.q_norm(queries).to(values.dtype), self.k_norm(keys).to(values.dtype)
        group = self.context_group if cache is None else None
        exchanges_heads = group is not None and group.mode == "heads"
        head_tensors: list[Tensor] = [getattr(self, name) for name in self.scheme_tensors]
        log_counts: Tensor | None = None
        if self.score_scale is not None:
            tables, log_counts = tables[:-1], tables[-1]
            head_tensors.append(self.score_scale)
        if part is not None:
            head_tensors = [value.chunk(self.head_groups)[part] for value in head_tensors]
        if group is not None and exchanges_heads:
            # Before the rotation: imaginary queries are computed from real ones, so they need not be sent.
            queries, keys, values = (tokens_to_heads(x, group) for x in (queries, keys, values))
            head_tensors = [heads_of_rank(value, group) for value in head_tensors]
        score_scale = head_tensors.pop() if self.score_scale is not None else None
        queries, keys = self.rotate(queries, keys, (*tables, *head_tensors))  # [B, T, H, D], [B, T, K, D]
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        if score_scale is not None and log_counts is not None:
            queries = queries * (score_scale[:, None] * log_counts).to(queries.dtype)
        if self.extra_dims:
            values = F.pad(values, (0, self.extra_dims))  # memory-efficient kernels need equal sizes of all three
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)  # [B, S, K, D]
            documents = documents if cache.is_packed else None  # otherwise the mask separates documents
        if isinstance(documents, ShardedDocuments):
            assert group is not None
            output = attend_to_gathered(
                queries, keys, values, documents, group, scale=self.scale, implementation=self.implementation
            )
        else:
            run = partial(attend, implementation=self.implementation)
            if self.probe is not None:
                run = partial(self.probe.attend, self.layer)
            output = run(queries, keys, values, documents=documents, mask=mask, scale=self.scale)  # [B, T, H, D]
        if self.extra_dims:
            output = output[..., : self.head_dim]
        if group is not None and exchanges_heads:
            output = heads_to_tokens(output, group)
        if self.output_gate is not None:
            gates = self._project(self.output_gate, hidden, part).sigmoid()
            output = output * gates.unflatten(-1, (output.shape[2], -1))
        output = output.flatten(-2)  # [B, T, H · D]
        if part is not None:
            return F.linear(output, self.o_proj.weight.chunk(self.head_groups, dim=1)[part])
        projected: Tensor = self.o_proj(output)
        return projected

    def _project(self, projection: nn.Linear, hidden: Tensor, part: int | None) -> Tensor:
        """Return `projection(hidden)`, or its output for one group of heads."""
        if part is None:
            projected: Tensor = projection(hidden)
            return projected
        bias = None if projection.bias is None else projection.bias.chunk(self.head_groups)[part]
        return F.linear(hidden, projection.weight.chunk(self.head_groups)[part], bias)
