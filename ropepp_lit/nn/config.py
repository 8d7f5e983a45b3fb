"""Geometry of a decoder, and the paper's model sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ropepp_lit.errors import UsageError

# Model sizes of arXiv 2512.07525; the vocabulary is that of Llama 3's tokenizer.
SIZES: dict[str, dict[str, int]] = {
    "376m": {
        "vocab_size": 128256,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "776m": {
        "vocab_size": 128256,
        "hidden_size": 1536,
        "intermediate_size": 5376,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 128,
    },
    "1.5b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}

_FROM_SIZE: Any = None

_MAX_WIDTH = 2**28
"""Exclusive limit of widths, so that the number of elements of a matrix does not overflow."""

_LIMITS: dict[str, float] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), _MAX_WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), _MAX_WIDTH),
    "num_hidden_layers": 10_000,
    "rms_norm_eps": 1,
}
"""Exclusive upper limits."""


@dataclass(kw_only=True, frozen=True)
class DecoderConfig:
    """Geometry of a Llama-like decoder.

    Head counts are those of the plain RoPE model, as in the paper's tables; the position scheme derives those of its
    variant from them (:class:`~ropepp_lit.nn.positions.HeadLayout`). After construction every field except `size` has a
    value.

    Raises:
        UsageError: a size that does not exist, a field that is missing or not positive, head counts that do not
            divide, an odd head size.
    """

    size: str | None = None
    """A size of the paper: `376m`, `776m` or `1.5b`. It sets the fields that are empty; other values override it."""

    vocab_size: int = _FROM_SIZE
    """Rows of the embedding; at least the largest token id + 1."""

    hidden_size: int = _FROM_SIZE
    """Width of the residual stream."""

    intermediate_size: int = _FROM_SIZE
    """Width of the SwiGLU layers."""

    num_hidden_layers: int = _FROM_SIZE
    """Number of decoder blocks."""

    num_attention_heads: int = _FROM_SIZE
    """Query heads H of the plain RoPE model."""

    num_key_value_heads: int = _FROM_SIZE
    """Key/value heads K of the plain RoPE model; H must be a multiple of it. Empty means H (no grouping)."""

    head_dim: int = _FROM_SIZE
    """Size of one head, even. Empty means hidden_size / num_attention_heads."""

    attention_bias: bool = False
    """Biases on the query, key and value projections."""

    attention_output_bias: bool = False
    """A bias on the output projection of attention."""

    mlp_bias: bool = False
    """Biases on the three projections of SwiGLU."""

    qk_norm: bool = False
    """RMSNorm of each query and key head before the rotation, as in Qwen 3."""

    attention_gate: Literal["head", "element"] | None = None
    """Sigmoid gate on the output of attention, before the output projection: one value per attention `head`, or per
    `element` of it, from a projection of the layer's input (arXiv 2505.06708). Empty means none."""

    score_scaling: Literal["log"] | None = None
    """`log`: scores of a query that attends to n tokens are multiplied by s · ln n, s trained for each attention head
    (SSMax, arXiv 2501.19399). Empty means no factor."""

    tie_word_embeddings: bool = False
    """Use the embedding as the output layer."""

    rms_norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""

    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size.lower() not in SIZES:
            raise UsageError(f"model.decoder.size: no size {self.size!r}; choose one of {', '.join(SIZES)}")
        for name, value in SIZES.get((self.size or "").lower(), {}).items():
            self._fill(name, value)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) is None:
                raise UsageError(f"model.decoder.{name}: missing; set it, or choose a size ({', '.join(SIZES)})")
        self._require_positive("hidden_size", "num_attention_heads")
        self._fill("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"model.decoder.hidden_size: {self.hidden_size} is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}); change one of them or set head_dim"
            )
        self._fill("head_dim", self.hidden_size // self.num_attention_heads)
        self._require_positive(
            "vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps"
        )
        if not self.initializer_range >= 0:
            raise UsageError(f"model.decoder.initializer_range: {self.initializer_range} must be 0 or more")
        if self.num_attention_heads * self.head_dim >= _MAX_WIDTH:
            raise UsageError(
                f"model.decoder.head_dim: {self.num_attention_heads:,} heads of {self.head_dim:,} must be below "
                f"{_MAX_WIDTH:,} together"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"model.decoder.num_attention_heads: {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise UsageError(f"model.decoder.head_dim: {self.head_dim} is odd; rotary pairs need an even head size")

    def to_dict(self) -> dict[str, int | float | bool | str | None]:
        """Return all fields except `size` as plain values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "size"}

    def _fill(self, name: str, value: int | None) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < _LIMITS[name]:
                value = str(getattr(self, name))[:50]
                raise UsageError(f"model.decoder.{name}: {value} must be above 0 and below {_LIMITS[name]:,}")
