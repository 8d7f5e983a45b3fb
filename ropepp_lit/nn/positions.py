"""Position schemes: RoPE, RoPE++ (arXiv 2512.07525) and the interface that every scheme implements.

Start reading here. The first four functions are the method. With heads as D/2 complex numbers, a query q at position t
and a key k at position s have the score z(t, s) = Σ_n q_n · conj(k_n) · exp(i·θ_n·(s - t)). RoPE uses its real part;
RoPE++ adds heads that use its negative imaginary part:

    real       A_re =  Re z = (R_t q)ᵀ (R_s k)                 :func:`apply_rotary`
    imaginary  A_im = -Im z = (R_t R_{-π/2} q)ᵀ (R_s k)        :func:`imaginary_queries`

R_t rotates pair n by t·θ_n. The classes below are the interface, :class:`PositionScheme`, and its implementations
:class:`RoPE` and :class:`RoPEPP`; other schemes are in :mod:`ropepp_lit.nn.baselines`, :mod:`ropepp_lit.nn.pope` and
:mod:`ropepp_lit.nn.controls`, and θ_n is in :mod:`ropepp_lit.nn.frequencies`. Read :mod:`ropepp_lit.nn.attention` next.

Shapes: B batch, T tokens, Q heads of the query projection, H attention heads (Q for RoPE, 2Q for RoPE++), K key/value
heads, D head size. In the half-split layout pair n is dimensions n and n + D/2: with the sign s - t of the paper it is
x_n - i·x_{n + D/2}; conjugated, x_n + i·x_{n + D/2}, it is multiplied by exp(i·θ_n·t), which is how R_t is computed.

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


def rotary_angles(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Return the angles t·θ_n: positions [B, T] and inverse frequencies [D/2] to [B, T, 1, D/2]."""
    return (positions.to(inverse_frequencies.dtype)[..., None] * inverse_frequencies).unsqueeze(-2)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return R_t x: multiply x_n + i·x_{n + D/2} by cos + i·sin, in the precision of cos and sin.

    x is [B, T, heads, D]; cos and sin are [B, T, 1, D/2]. The result has the shape and the dtype of x.
    """
    first, second = x.chunk(2, dim=-1)  # [B, T, heads, D/2] each: real and imaginary parts
    halves = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([half.to(x.dtype) for half in halves], dim=-1)


def imaginary_queries(rotated: Tensor) -> Tensor:
    """Return R_t R_{-π/2} q from R_t q, [B, T, Q, D].

    Rotations commute, so rotated queries are multiplied by -i: a swap of the halves and one sign, no second rotation.
    """
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


def interleave_heads(real: Tensor, imaginary: Tensor) -> Tensor:
    """Return re(q_0), im(q_0), re(q_1), im(q_1), …: twice [B, T, Q, D] to [B, T, 2Q, D].

    The heads that share a key/value head stay consecutive, as grouped-query attention requires.
    """
    return torch.stack((real, imaginary), dim=-2).flatten(-3, -2)


class HeadLayout(NamedTuple):
    """Head counts of an attention layer."""

    num_query_heads: int
    """Q, heads of the query projection."""

    num_attention_heads: int
    """H, heads of the softmax and of the output projection: real and imaginary ones."""

    num_key_value_heads: int
    """K, heads of the key and value projections and of the KV cache."""

    extra_dims: int = 0
    """Dimensions that the scheme adds to queries and keys. Values are padded to this size; the cache stores all."""

    saved_elements: int = 0
    """Elements per token that `rotate` saves for the backward pass, without its tables; used to estimate memory."""

    def split(self, groups: int) -> HeadLayout:
        """Return the head counts of one of `groups` equal groups.

        Raises:
            UsageError: the number of groups does not divide the key/value heads.
        """
        if groups < 1 or self.num_key_value_heads % groups:
            raise UsageError(
                f"model.attention_head_groups: {groups} must divide the {self.num_key_value_heads} key/value heads"
            )
        queries, heads, key_values = (number // groups for number in self[:3])
        return HeadLayout(queries, heads, key_values, self.extra_dims, self.saved_elements // groups)


class PositionScheme(ABC):
    """Interface of position schemes. Subclass it in a file of your own and name the class in a recipe.

    A scheme stores settings only, each as an attribute with the name of its `__init__` argument, so that a checkpoint
    can store the scheme and rebuild it.
    """

    uses_frequencies: bool = True
    """Whether the base and the scaling of the rotary frequencies have an effect."""

    head_kinds: tuple[str, ...] = ("real",)
    """Kinds of attention heads, which alternate."""

    def head_layout(self, *, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> HeadLayout:
        """Return the head counts for a decoder whose plain RoPE model has the given ones.

        Args:
            num_attention_heads: H of the plain model.
            num_key_value_heads: K of the plain model.
            head_dim: D.

        Raises:
            UsageError: the variant cannot be built with these counts.
        """
        return HeadLayout(num_attention_heads, num_attention_heads, num_key_value_heads)

    def constants(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """Return the buffers that one attention layer passes to `rotate`: saved with the weights, not trained.

        Called for each layer when a decoder is built, after its weights are initialized.

        Args:
            frequencies: Base and scaling.
            layout: Result of :meth:`head_layout`.
            head_dim: D.

        Returns:
            Tensors by name. Their first dimension is attention heads or key/value heads: where heads are sharded among
            ranks, `rotate` gets those of its rank.

        Raises:
            UsageError: the scheme cannot be built with heads of this size or these frequencies.
        """
        return {}

    def parameters(self, frequencies: Frequencies, *, layout: HeadLayout, head_dim: int) -> dict[str, Tensor]:
        """Return initial values of the parameters that one attention layer passes to `rotate`; no weight decay.

        Called right after :meth:`constants`, with the same arguments; dimensions and errors are the same too.
        """
        return {}

    @abstractmethod
    def tables(
        self, positions: Tensor, frequencies: Frequencies, *, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Return the tensors that `rotate` computes from positions; computed once per forward, shared by all layers.

        Args:
            positions: [B, T], integers; restart at each packed document.
            frequencies: Base and scaling.
            head_dim: D.
            dtype: float32, or float64 in a float64 model, whatever the dtype of the activations: bfloat16 represents no
                odd position above 256, and its cosines break the relativity of scores (arXiv 2411.13476).
        """

    @abstractmethod
    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Encode positions in queries and keys.

        Args:
            queries: [B, T, Q, D].
            keys: [B, T, K, D].
            tables: Result of :meth:`tables`, followed by the layer's :meth:`constants` and :meth:`parameters`.

        Returns:
            Queries [B, T, H, D] and keys [B, T, K, D], with D + `extra_dims` of the layout in place of D, in the dtype
            of the arguments. The heads that share a key/value head are consecutive. Scores are divided by √D, without
            the extra dimensions.
        """

    def rotation(self, layer: int) -> Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]:
        """Return the function by which a layer (from 0) rotates: :meth:`rotate`, unless the scheme differs by layer."""
        return self.rotate

    def __str__(self) -> str:
        return type(self).__name__


def layout_of(config: DecoderConfig, scheme: PositionScheme) -> HeadLayout:
    """Return the head counts of a scheme for a geometry.

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
        """Return cos and sin of the angles, times the attention factor, each [B, T, 1, D/2] of `dtype`."""
        with torch.autocast(positions.device.type, enabled=False):
            inverse = frequencies.inverse_frequencies(head_dim, dtype=dtype, device=positions.device)
            angles = rotary_angles(positions, inverse)
            return angles.cos() * frequencies.attention_factor, angles.sin() * frequencies.attention_factor

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return R_t q and R_s k, whose product is A_re."""
        cos, sin = tables
        return apply_rotary(queries, cos, sin), apply_rotary(keys, cos, sin)


Variant = Literal["ec", "eh"]
"""Equal cache or equal heads."""


def check_variant(variant: str) -> Variant:
    """Return the variant, or raise UsageError where it does not exist."""
    if variant not in ("ec", "eh"):
        raise UsageError(f"model.positions.variant: no variant {variant!r}; choose ec or eh")
    return cast(Variant, variant)


def paired_layout(variant: Variant, num_attention_heads: int, num_key_value_heads: int) -> HeadLayout:
    """Return (Q, H, K) of a variant: EC of a plain (H, K) is (H, 2H, K); EH of (H, K) is EC of (H/2, K/2).

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
    """Schemes with two attention heads per query: RoPE++ and its controls (:mod:`ropepp_lit.nn.controls`).

    Both heads read the same keys and values. The first is RoPE's; :meth:`second_queries` computes the second. They
    alternate: first(q_0), second(q_0), first(q_1), second(q_1), …

    Args:
        variant: `ec` (equal cache) doubles the attention heads and keeps the size of the KV cache; `eh` (equal heads)
            keeps the number of attention heads and halves the KV cache.
    """

    head_kinds = ("real", "imaginary")

    def __init__(self, *, variant: Variant = "ec") -> None:
        self.variant = check_variant(variant)

    def head_layout(self, *, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> HeadLayout:
        """Return :func:`paired_layout` of the variant."""
        return paired_layout(self.variant, num_attention_heads, num_key_value_heads)

    @abstractmethod
    def second_queries(self, queries: Tensor, rotated: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Return the queries of the second heads.

        Args:
            queries: [B, T, Q, D], before the rotation.
            rotated: [B, T, Q, D], after the rotation: the queries of the first heads.
            tables: Cos and sin, followed by the layer's :meth:`constants`.

        Returns:
            [B, T, Q, D] of the same dtype.
        """

    def rotate(self, queries: Tensor, keys: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return first and second queries, interleaved, and the rotated keys that both read."""
        rotated, keys = super().rotate(queries, keys, tables[:2])
        return interleave_heads(rotated, self.second_queries(queries, rotated, tables)), keys


class RoPEPP(PairedHeads):
    """RoPE++ (arXiv 2512.07525): the imaginary part of the score as a second group of heads.

    Args:
        variant: `ec` (equal cache) doubles the attention heads and keeps the size of the KV cache; `eh` (equal heads)
            keeps the number of attention heads and halves the KV cache.
    """

    def second_queries(self, queries: Tensor, rotated: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Return the imaginary queries, whose product with the keys is A_im."""
        return imaginary_queries(rotated)

    def __str__(self) -> str:
        return f"RoPE++ {self.variant.upper()}"
