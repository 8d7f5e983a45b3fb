"""PyTorch RoPE++ model (https://arxiv.org/abs/2512.07525)."""

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
    """Compute the inverse frequencies of YaRN, with a ramp that is linear in the number of rotations.

    The number of rotations of a frequency is counted over `original_max_position_embeddings` positions.

    Returns:
        Inverse frequencies of shape `(head_dim / 2,)`, and the scaling factor of cos and sin.
    """
    rope = getattr(config, "rope_parameters", None) or {**config.rope_scaling, "rope_theta": config.rope_theta}
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    inv_freq = 1.0 / (rope["rope_theta"] ** exponents)
    rotations = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    beta_slow, beta_fast = rope.get("beta_slow") or 1.0, rope.get("beta_fast") or 32.0
    extrapolation = ((rotations - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
    attention_factor = rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1.0
    return inv_freq / rope["factor"] * (1 - extrapolation) + inv_freq * extrapolation, attention_factor


ROPE_INIT_FUNCTIONS.setdefault("yarn_by_rotations", compute_yarn_by_rotations)


class RopePPRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding; transformers recomputes the buffers of a class with this name after loading."""


class RopePPAttention(nn.Module):
    """Multi-headed attention with real and imaginary heads.

    Queries and keys are rotated as in Llama. Each rotated query also yields an imaginary query, which is rotated by
    another -90 degrees: its halves are swapped and one is negated. Real and imaginary heads alternate and use the same
    keys and values.
    """

    def __init__(self, config: RopePPConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        hidden_size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden_size, config.num_query_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(
            config.num_attention_heads * self.head_dim, hidden_size, bias=config.attention_output_bias
        )
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
        """Compute causal self-attention; takes the arguments of `LlamaAttention.forward`."""
        # The argument is called `cache` since transformers 5.24, and `past_key_values` in earlier versions.
        caches = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        cache = next((candidate for candidate in caches if candidate is not None), None)
        input_shape = hidden_states.shape[:-1]
        query_states, key_states, value_states = (
            projection(hidden_states).view(*input_shape, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states = query_states.transpose(1, 2)
        key_states = key_states.transpose(1, 2)
        value_states = value_states.transpose(1, 2)
        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        if self.config.variant != "rope":
            first_half, second_half = query_states.chunk(2, dim=-1)
            imaginary_states = torch.cat((second_half, -first_half), dim=-1)
            # Interleave: real, imaginary, real, imaginary, …
            query_states = torch.stack((query_states, imaginary_states), dim=2).flatten(1, 2)
        if cache is not None:
            cache_kwargs = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, cache_kwargs)
        attention_interface = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class RopePPDecoderLayer(LlamaDecoderLayer):
    """Llama decoder layer with RoPE++ attention."""

    def __init__(self, config: RopePPConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = RopePPAttention(config, layer_idx)


class RopePPPreTrainedModel(LlamaPreTrainedModel):
    """Base class of RoPE++ models."""

    config_class = RopePPConfig
    _no_split_modules = ["RopePPDecoderLayer"]  # noqa: RUF012 (transformers' convention)
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": RopePPDecoderLayer,
        "attentions": RopePPAttention,
    }


class RopePPModel(RopePPPreTrainedModel, LlamaModel):
    """RoPE++ model without a head."""

    def __init__(self, config: RopePPConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            RopePPDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.rotary_emb = RopePPRotaryEmbedding(config=config)
        self.post_init()


class RopePPForCausalLM(RopePPPreTrainedModel, LlamaForCausalLM):
    """RoPE++ model with a language modeling head."""

    def __init__(self, config: RopePPConfig) -> None:
        super().__init__(config)
        self.model = RopePPModel(config)
        self.post_init()
