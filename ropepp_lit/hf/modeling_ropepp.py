"""RoPE++ models (arXiv 2512.07525) for transformers; needs nothing but torch and transformers.

A RoPE++ layer rotates queries and keys as Llama does. Each rotated query then also gives an imaginary one, turned by
another -90 degrees: a swap of halves and one sign. Real and imaginary heads alternate and read the same keys and
values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_ropepp import RopePPConfig


def compute_yarn_by_rotations(config: RopePPConfig, device: Any = None, **_: Any) -> tuple[torch.Tensor, float]:
    """YaRN with a ramp that is linear in the rotations within the original context.

    Returns:
        Inverse frequencies [head_dim / 2], and the factor on cos and sin.
    """
    rope = getattr(config, "rope_parameters", None) or {**config.rope_scaling, "rope_theta": config.rope_theta}
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    inverse = 1.0 / (rope["rope_theta"] ** pairs)
    rotations = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
    slow, fast = rope.get("beta_slow") or 1.0, rope.get("beta_fast") or 32.0
    keep = ((rotations - slow) / (fast - slow)).clamp(0, 1)
    factor = rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1.0
    return inverse / rope["factor"] * (1 - keep) + inverse * keep, factor


ROPE_INIT_FUNCTIONS.setdefault("yarn_by_rotations", compute_yarn_by_rotations)


class RopePPRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's; the name tells transformers to compute its buffers again after loading."""


class RopePPAttention(nn.Module):
    """Attention with real and imaginary heads."""

    def __init__(self, config: RopePPConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_query_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend causally; arguments are those of Llama's attention."""
        # The cache is called `cache` from transformers 5.24 on, and was called `past_key_values` before.
        caches = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        cache = next((given for given in caches if given is not None), None)
        shape = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*shape, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        if self.config.variant != "rope":
            first, second = query.chunk(2, dim=-1)
            imaginary = torch.cat((second, -first), dim=-1)
            query = torch.stack((query, imaginary), dim=2).flatten(1, 2)  # re, im, re, im, …
        if cache is not None:
            details = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            key, value = cache.update(key, value, self.layer_idx, details)
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class RopePPDecoderLayer(LlamaDecoderLayer):
    """Llama's block with RoPE++ attention."""

    def __init__(self, config: RopePPConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = RopePPAttention(config, layer_idx)


class RopePPPreTrainedModel(LlamaPreTrainedModel):
    """What transformers asks of every model."""

    config_class = RopePPConfig
    _no_split_modules = ["RopePPDecoderLayer"]  # noqa: RUF012 (transformers' convention)
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": RopePPDecoderLayer,
        "attentions": RopePPAttention,
    }


class RopePPModel(RopePPPreTrainedModel, LlamaModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: RopePPConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(RopePPDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.rotary_emb = RopePPRotaryEmbedding(config=config)
        self.post_init()


class RopePPForCausalLM(RopePPPreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: RopePPConfig) -> None:
        super().__init__(config)
        self.model = RopePPModel(config)
        self.post_init()
