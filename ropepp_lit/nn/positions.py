"""Position schemes: how many heads a variant has, and how queries and keys learn where they stand.

Shapes: B batch, T tokens, H attention heads, K key/value heads, D head size. A head is D/2 complex numbers in the
half-split layout: pair n is dimensions n and n + D/2.

Names of the public RoPE++ code: `imag1` is `RoPEPP(variant="eh")`, `imag2` is `RoPEPP(variant="ec")`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.config import DecoderConfig
from ropepp_lit.nn.frequencies import Frequencies


class HeadLayout(NamedTuple):
    """How many heads of each kind an attention layer really has."""

    num_query_heads: int
    """Heads that the query projection makes."""

    num_attention_heads: int
    """Heads that enter the softmax and the output projection: real and imaginary ones."""

    num_key_value_heads: int
    """Heads that the key and value projections make and the cache keeps."""

    extra_dims: int = 0
    """Dimensions that the scheme adds to queries and keys. Values are padded to the same size; the cache keeps all."""

    kept_elements: int = 0
    """Numbers of each token that the backward pass of `rotate` reads, beside tables: for estimates of memory."""

    def split(self, groups: int) -> HeadLayout:
        """Heads of each of several equal groups.

        Raises:
            UsageError: the key/value heads cannot be split equally.
        """
        if groups < 1 or self.num_key_value_heads % groups:
            raise UsageError(
                f"model.attention_head_groups: {groups} must divide the {self.num_key_value_heads} key/value heads"
            )
        queries, heads, caches = (number // groups for number in self[:3])
        return HeadLayout(queries, heads, caches, self.extra_dims, self.kept_elements // groups)


class PositionScheme(ABC):
    """What a position scheme answers. Subclass it in a file of your own and name it in a recipe.

    A scheme holds settings only, each as an attribute named as its `__init__` argument, so that a checkpoint can
    write the scheme down and make it again.
    """

    uses_frequencies: bool = True
    """Whether base and scaling of the rotary frequencies have an effect."""

    head_kinds: tuple[str, ...] = ("real",)
    """Kinds of attention heads, which alternate."""

    def head_layout(self, *, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> HeadLayout:
        """Head counts for a decoder whose plain RoPE model has these.

        Args:
            num_attention_heads: H of the plain model.
            num_key_value_heads: K of the plain model.
            head_dim: D.

        Raises:
            UsageError: the variant cannot be built with these counts.
        """
        return HeadLayout(num_attention_heads, num_attention_heads, num_key_value_heads)

    def constants(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """Tensors that one attention layer keeps for `rotate`: saved with the weights, never trained.

        Asked for each layer when a decoder is made, after its weights are drawn.

        Args:
            frequencies: Base and scaling.
            layout: What :meth:`head_layout` returned.
            head_dim: D.

        Returns:
            Tensors by name. Their first dimension is heads, attention heads or key/value heads: where heads are shared
            among ranks, `rotate` gets those of its rank.

        Raises:
            UsageError: the scheme cannot be built with heads of this size or these frequencies.
        """
        return {}

    def parameters(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """First values of tensors that one attention layer trains for `rotate`, without weight decay.

        Asked for right after :meth:`constants`, of which all else is true: arguments, dimensions, errors.
        """
        return {}

    @abstractmethod
    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Whatever `rotate` needs of the positions; computed once per forward and shared by all layers.

        Args:
            positions: [B, T], integers; restart at each packed document.
            frequencies: Base and scaling.
            head_dim: D.
            dtype: float32, or float64 in a float64 model, whatever the dtype of the activations: bfloat16 holds no
                position beyond 256, and its cosines break the relativity of scores (arXiv 2411.13476).
        """

    @abstractmethod
    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Give queries and keys their positions.

        Args:
            queries: [B, T, num_query_heads, D].
            keys: [B, T, num_key_value_heads, D].
            tables: What :meth:`tables` returned, and behind it the layer's :meth:`constants` and :meth:`parameters`.

        Returns:
            Queries [B, T, num_attention_heads, D] and keys [B, T, num_key_value_heads, D], D grown by the layout's
            `extra_dims`, in the dtype of the arguments. The heads that share a key/value head are consecutive. Scores
            are divided by the root of `head_dim`, not of the grown size.
        """

    def rotation(self, layer: int) -> Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]:
        """The function that a layer, counted from 0, rotates by: :meth:`rotate`, unless layers differ."""
        return self.rotate

    def __str__(self) -> str:
        return type(self).__name__


def layout_of(config: DecoderConfig, scheme: PositionScheme) -> HeadLayout:
    """Head counts of a scheme with a geometry.

    Raises:
        UsageError: see :meth:`PositionScheme.head_layout`.
    """
    return scheme.head_layout(
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )


class RoPE(PositionScheme):
    """Rotary position embeddings (arXiv 2104.09864): the real part of the complex score."""

    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Cos and sin of position × frequency, each [B, T, 1, D/2] of `dtype`."""
        with torch.autocast(positions.device.type, enabled=False):
            inverse = frequencies.inverse_frequencies(head_dim, dtype=dtype, device=positions.device)
            angles = (positions.to(dtype)[..., None] * inverse).unsqueeze(-2)
            return angles.cos() * frequencies.attention_factor, angles.sin() * frequencies.attention_factor

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """A_re = (R_t q)ᵀ (R_s k)."""
        cos, sin = tables
        return turn(queries, cos, sin), turn(keys, cos, sin)


Variant = Literal["ec", "eh"]
"""Equal cache, or equal heads."""


def check_variant(variant: str) -> Variant:
    """Raise UsageError where there is no such variant."""
    if variant not in ("ec", "eh"):
        raise UsageError(f"model.positions.variant: no variant {variant!r}; choose ec or eh")
    return cast(Variant, variant)


def paired_layout(variant: Variant, num_attention_heads: int, num_key_value_heads: int) -> HeadLayout:
    """EC of (H, K) is (H, 2H, K); EH of (H, K) is EC of (H/2, K/2).

    Raises:
        UsageError: the heads cannot be halved.
    """
    if variant == "ec":
        return HeadLayout(num_attention_heads, 2 * num_attention_heads, num_key_value_heads)
    for name, value in (("num_attention_heads", num_attention_heads), ("num_key_value_heads", num_key_value_heads)):
        if value % 2:
            raise UsageError(f"model.decoder.{name}: RoPE++ EH halves it, so {value} must be even; use variant ec")
    return HeadLayout(num_attention_heads // 2, num_attention_heads, num_key_value_heads // 2)


class PairedHeads(RoPE):
    """Schemes that make two attention heads of each query: RoPE++ and its controls (:mod:`ropepp_lit.nn.controls`).

    Both read the same keys and values. The first is that of RoPE; :meth:`second_queries` makes the second one. They
    alternate: first(q_0), second(q_0), first(q_1), second(q_1), …

    Args:
        variant: `ec` (equal cache) doubles the attention heads and keeps the KV cache; `eh` (equal heads) keeps the
            attention heads and halves the KV cache.
    """

    head_kinds = ("real", "imaginary")

    def __init__(self, *, variant: Variant = "ec") -> None:
        self.variant = check_variant(variant)

    def head_layout(self, *, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> HeadLayout:
        """EC of (H, K) is (H, 2H, K); EH of (H, K) is EC of (H/2, K/2)."""
        return paired_layout(self.variant, num_attention_heads, num_key_value_heads)

    @abstractmethod
    def second_queries(self, queries: Tensor, rotated: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """The queries of the second heads.

        Args:
            queries: [B, T, num_query_heads, D], before the rotation.
            rotated: The same after it: the queries of the first heads.
            tables: Cos and sin, and behind them the layer's :meth:`constants`.

        Returns:
            Of the same shape and dtype.
        """

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """First and second queries, head by head, and the rotated keys that both read."""
        rotated, keys = super().rotate(queries, keys, tables[:2])
        second = self.second_queries(queries, rotated, tables)
        return torch.stack((rotated, second), dim=-2).flatten(-3, -2), keys


class RoPEPP(PairedHeads):
    """RoPE++ (arXiv 2512.07525): the imaginary part of the score as a second group of heads.

    A_im = (R_t R_{-π/2} q)ᵀ (R_s k). Rotations commute, so the imaginary query is the *rotated* real query turned by
    -90°: a swap of halves and one sign. Real and imaginary heads alternate: re(q_0), im(q_0), re(q_1), im(q_1), …

    Args:
        variant: `ec` (equal cache) doubles the attention heads and keeps the KV cache; `eh` (equal heads) keeps the
            attention heads and halves the KV cache.
    """

    def second_queries(self, queries: Tensor, rotated: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Imaginary queries."""
        first, second = rotated.chunk(2, dim=-1)
        return torch.cat((second, -first), dim=-1)

    def __str__(self) -> str:
        return f"RoPE++ {self.variant.upper()}"


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply the complex numbers of each head by cos + i·sin, in the precision of cos and sin.

    Args:
        x: [B, T, heads, D].
        cos: [B, T, 1, D/2], float32 or float64.
        sin: The same.

    Returns:
        [B, T, heads, D] of the dtype of x.
    """
    first, second = x.chunk(2, dim=-1)
    halves = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([half.to(x.dtype) for half in halves], dim=-1)
