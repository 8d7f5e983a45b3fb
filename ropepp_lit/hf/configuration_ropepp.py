"""Configuration of RoPE++ models (arXiv 2512.07525) for transformers; needs nothing but transformers."""

from typing import Any

from transformers import LlamaConfig


class RopePPConfig(LlamaConfig):
    """Llama's configuration with real and imaginary attention heads.

    `num_attention_heads` counts the heads that enter the softmax, real and imaginary ones; `num_key_value_heads` those
    that are cached; `head_dim` is always stated. So caches, tensor parallelism and serving engines size themselves
    rightly.
    """

    model_type = "ropepp"

    variant: str = "ec"
    """`ec` and `eh` have imaginary heads, half of all; `rope` has none."""

    attention_output_bias: bool = False
    """A bias on the output projection of attention."""

    qk_norm: bool = False
    """RMSNorm of each query and key head before the rotation."""

    @property
    def num_query_heads(self) -> int:
        """Heads that the query projection makes."""
        return self.num_attention_heads if self.variant == "rope" else self.num_attention_heads // 2

    def validate_architecture(self) -> None:
        """Check what transformers would check otherwise for Llama, where all heads are real."""
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_query_heads} query heads are no multiple of {self.num_key_value_heads} key/value heads"
            )

    def _validate_yarn_by_rotations_rope_parameters(self, *arguments: Any, **keywords: Any) -> None:
        """The model reads what it needs, and fails by name where something is missing."""
