"""RoPE++ model configuration."""

from typing import Any

from transformers import LlamaConfig


class RopePPConfig(LlamaConfig):
    """Configuration of a RoPE++ model (https://arxiv.org/abs/2512.07525), a Llama model with imaginary attention heads.

    Takes the arguments of `LlamaConfig`, and those below. `num_attention_heads` is the number of real and imaginary
    heads, and `num_key_value_heads` the number of heads in the KV cache, so that caches and serving engines allocate
    the correct sizes.
    """

    model_type = "ropepp"

    variant: str = "ec"
    """Variant of the attention: in `ec` and `eh` half of the heads are imaginary, in `rope` none."""

    attention_output_bias: bool = False
    """Whether to use a bias in the output projection of the self-attention."""

    qk_norm: bool = False
    """Whether to apply RMSNorm to each query and key head before the rotary embedding."""

    @property
    def num_query_heads(self) -> int:
        """Number of heads of the query projection."""
        return self.num_attention_heads if self.variant == "rope" else self.num_attention_heads // 2

    def validate_architecture(self) -> None:
        """Replace Llama's validation, which assumes that all heads are real."""
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                f"The number of query heads ({self.num_query_heads}) is not a multiple of the number of key/value "
                f"heads ({self.num_key_value_heads})."
            )

    def _validate_yarn_by_rotations_rope_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Accept the RoPE type `yarn_by_rotations`; `compute_yarn_by_rotations` reads its parameters."""
