"""Property tests of head layouts and rotations: the key head that each head reads, and its score."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from plain_schemes import ALL_SCHEMES

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Frequencies, HeadLayout, RoPE, RoPEPP
from ropepp_lit.nn.kernels import attend

KEY_HEADS = st.integers(1, 6)
GROUPS = st.integers(1, 4)
VARIANTS = st.sampled_from(["rope", "ec", "eh"])


def layout_of(scheme, heads, key_heads, head_dim=8):
    return scheme.head_layout(num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_dim)


@given(key_heads=KEY_HEADS, group=GROUPS)
def test_layouts(key_heads, group):
    heads = group * key_heads
    assert layout_of(RoPE(), heads, key_heads) == HeadLayout(heads, heads, key_heads)
    assert layout_of(RoPEPP(variant="ec"), heads, key_heads) == HeadLayout(heads, 2 * heads, key_heads)
    equal_heads = RoPEPP(variant="eh")
    if heads % 2 or key_heads % 2:
        with pytest.raises(UsageError, match=r"model\.decoder\.num_(attention|key_value)_heads"):
            layout_of(equal_heads, heads, key_heads)
    else:
        actual = layout_of(equal_heads, heads, key_heads)
        assert actual == layout_of(RoPEPP(variant="ec"), heads // 2, key_heads // 2)
        assert (actual.num_attention_heads, 2 * actual.num_key_value_heads) == (heads, key_heads)


@given(name=st.sampled_from(sorted(ALL_SCHEMES)), key_heads=KEY_HEADS, group=GROUPS, parts=st.integers(1, 6))
def test_head_groups_are_equal_and_complete(name, key_heads, group, parts):
    scheme, heads = ALL_SCHEMES[name], group * key_heads
    try:
        layout = layout_of(scheme, heads, key_heads)
    except UsageError:
        assume(False)
    if layout.num_key_value_heads % parts:
        with pytest.raises(UsageError, match=r"model\.attention_head_groups"):
            layout.split(parts)
        return
    part = layout.split(parts)
    assert [parts * number for number in part[:3]] == list(layout[:3])
    assert part.extra_dims == layout.extra_dims
    assert part.num_attention_heads * layout.num_key_value_heads == layout.num_attention_heads * (
        part.num_key_value_heads
    )


@given(name=st.sampled_from(sorted(ALL_SCHEMES)), key_heads=KEY_HEADS, group=GROUPS, data=st.data())
def test_every_scheme_returns_the_heads_of_its_layout(name, key_heads, group, data):
    scheme, heads, head_dim = ALL_SCHEMES[name], group * key_heads, 8 * data.draw(st.integers(1, 2))
    try:
        layout = layout_of(scheme, heads, key_heads, head_dim)
    except UsageError:
        assume(False)
    frequencies, positions = Frequencies(), torch.arange(3)[None]
    settings = {"layout": layout, "head_dim": head_dim}
    tables = scheme.tables(positions, frequencies, head_dim=head_dim, dtype=torch.float32)
    tables += tuple(scheme.constants(frequencies, **settings).values())
    tables += tuple(scheme.parameters(frequencies, **settings).values())
    queries = torch.randn(1, 3, layout.num_query_heads, head_dim)
    keys = torch.randn(1, 3, layout.num_key_value_heads, head_dim)
    rotated, turned = scheme.rotate(queries, keys, tables)
    assert rotated.shape == (1, 3, layout.num_attention_heads, head_dim + layout.extra_dims)
    assert turned.shape == (1, 3, layout.num_key_value_heads, head_dim + layout.extra_dims)
    assert rotated.dtype == turned.dtype == torch.float32


@given(
    variant=VARIANTS, key_heads=st.integers(1, 3), group=st.integers(1, 3), pairs=st.integers(1, 4),
    base=st.floats(2, 1e6), first=st.integers(0, 100_000), seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_attention_is_over_the_parts_of_the_complex_score(variant, key_heads, group, pairs, base, first, seed):
    """Head 2i is the real and head 2i + 1 the imaginary part of query i's score with key head i // group."""
    if variant == "eh":
        key_heads *= 2
    scheme = RoPE() if variant == "rope" else RoPEPP(variant=variant)
    heads, head_dim, tokens = group * key_heads, 2 * pairs, 4
    layout = layout_of(scheme, heads, key_heads, head_dim)
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(tokens, layout.num_query_heads, head_dim))
    keys, values = rng.normal(size=(2, tokens, layout.num_key_value_heads, head_dim))
    frequencies, positions = Frequencies(rope_theta=base), torch.arange(first, first + tokens)[None]
    tables = scheme.tables(positions, frequencies, head_dim=head_dim, dtype=torch.float64)
    rotated = scheme.rotate(torch.tensor(queries)[None], torch.tensor(keys)[None], tables)
    actual = attend(*rotated, torch.tensor(values)[None])[0].numpy()

    theta = base ** (-2 * np.arange(pairs) / head_dim)
    kinds = 1 if variant == "rope" else 2
    per_key = layout.num_query_heads // layout.num_key_value_heads
    for head in range(layout.num_attention_heads):
        query, key = head // kinds, head // kinds // per_key
        q = queries[:, query, :pairs] + 1j * queries[:, query, pairs:]
        k = keys[:, key, :pairs] + 1j * keys[:, key, pairs:]
        for t in range(tokens):
            distance = (t - np.arange(t + 1))[:, None]
            score = (q[t] * k[: t + 1].conj() * np.exp(1j * distance * theta)).sum(1)
            part = (score.imag if head % kinds else score.real) / np.sqrt(head_dim)
            weights = np.exp(part - part.max())
            expected = weights @ values[: t + 1, key] / weights.sum()
            np.testing.assert_allclose(actual[t, head], expected, atol=1e-8)
