"""Property tests of rotary frequencies against their formulas in plain floats."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropepp_lit.nn import Clipped, Frequencies, Linear, Llama3, Yarn, YarnByRotations

HEAD_DIMS = st.integers(1, 40).map(lambda pairs: 2 * pairs)
BASES = st.floats(1.5, 1e8)
FACTORS = st.floats(1, 256)
CONTEXTS = st.integers(1, 2**20)
BETAS = st.tuples(st.floats(0.05, 8), st.floats(0.1, 64)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def plain(base, head_dim):
    return [base ** (-2 * n / head_dim) for n in range(head_dim // 2)]


def assert_between(actual, low, high):
    """Check that frequencies decrease, and that each is between two bounds."""
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(actual))
    for lower, value, upper in zip(low, actual, high, strict=True):
        assert lower * (1 - 1e-12) <= value <= upper * (1 + 1e-12)


def read(frequencies, head_dim):
    single = frequencies.inverse_frequencies(head_dim)
    double = frequencies.inverse_frequencies(head_dim, dtype=torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert single.shape == double.shape == (head_dim // 2,)
    return double.tolist()


@given(base=BASES, head_dim=HEAD_DIMS, factor=FACTORS)
def test_plain_and_linear(base, head_dim, factor):
    expected = plain(base, head_dim)
    assert read(Frequencies(rope_theta=base), head_dim) == pytest.approx(expected, rel=1e-12)
    divided = [value / factor for value in expected]
    assert read(Linear(rope_theta=base, factor=factor), head_dim) == pytest.approx(divided, rel=1e-12)


@given(base=BASES, head_dim=HEAD_DIMS, factor=FACTORS, context=CONTEXTS, betas=BETAS)
def test_yarn_by_rotations(base, head_dim, factor, context, betas):
    slow, fast = betas
    frequencies = YarnByRotations(
        rope_theta=base, factor=factor, original_max_position_embeddings=context, beta_slow=slow, beta_fast=fast
    )
    expected = []
    for value in plain(base, head_dim):
        ramp = (context * value / (2 * math.pi) - slow) / (fast - slow)
        keep = min(max(ramp, 0.0), 1.0)
        expected.append(value / factor * (1 - keep) + value * keep)
    actual = read(frequencies, head_dim)
    assert actual == pytest.approx(expected, rel=1e-9)
    assert_between(actual, [value / factor for value in plain(base, head_dim)], plain(base, head_dim))
    assert frequencies.attention_factor == pytest.approx(0.1 * math.log(factor) + 1)
    assert frequencies.reach == round(factor * context)


def of_transformers(head_dim, *, rope_theta, **rope_scaling):
    """Return the frequencies of transformers, by arguments of version 4 that 5 accepts too."""
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_theta=rope_theta, rope_scaling=rope_scaling
    )
    return ROPE_INIT_FUNCTIONS[rope_scaling["rope_type"]](config, device="cpu")


@given(base=BASES, head_dim=HEAD_DIMS, factor=FACTORS, context=CONTEXTS, betas=BETAS, truncate=st.booleans())
def test_yarn(base, head_dim, factor, context, betas, truncate):
    settings = {"rope_theta": base, "factor": factor, "original_max_position_embeddings": context}
    settings |= {"beta_slow": betas[0], "beta_fast": betas[1], "truncate": truncate}
    ours = Yarn(**settings)
    expected, attention_factor = of_transformers(head_dim, rope_type="yarn", **settings)
    torch.testing.assert_close(ours.inverse_frequencies(head_dim), expected, atol=0, rtol=1e-5)
    assert ours.attention_factor == pytest.approx(attention_factor)
    assert_between(read(ours, head_dim), [value / factor for value in plain(base, head_dim)], plain(base, head_dim))


@given(base=BASES, head_dim=HEAD_DIMS, factor=FACTORS, context=CONTEXTS, bounds=BETAS)
def test_llama3(base, head_dim, factor, context, bounds):
    settings = {"rope_theta": base, "factor": factor, "original_max_position_embeddings": context}
    settings |= {"low_freq_factor": bounds[0], "high_freq_factor": bounds[1]}
    ours = Llama3(**settings)
    expected, attention_factor = of_transformers(head_dim, rope_type="llama3", **settings)
    torch.testing.assert_close(ours.inverse_frequencies(head_dim), expected, atol=0, rtol=1e-4)
    assert ours.attention_factor == attention_factor == 1
    actual = read(ours, head_dim)
    assert_between(actual, [value / factor for value in plain(base, head_dim)], plain(base, head_dim))
    for value, stretched in zip(plain(base, head_dim), actual, strict=True):
        rotations = context * value / (2 * math.pi)
        if rotations < bounds[0] * (1 - 1e-9):
            assert stretched == pytest.approx(value / factor, rel=1e-9)
        elif rotations > bounds[1] * (1 + 1e-9):
            assert stretched == pytest.approx(value, rel=1e-9)


@given(
    base=BASES, head_dim=HEAD_DIMS, by=st.one_of(CONTEXTS, st.floats(0, 1)), taper=st.booleans()
)  # fmt: skip
def test_clipped(base, head_dim, by, taper):
    values = plain(base, head_dim)
    if isinstance(by, int):
        frequencies = Clipped(rope_theta=base, context_length=by, taper=taper)
        first = sum(by * value >= 2 * math.pi for value in values)
    else:
        frequencies, first = Clipped(rope_theta=base, kept=by, taper=taper), round(by * len(values))
    expected, last = [], len(values) - 1
    for n, value in enumerate(values):
        share = 0.0 if n < first else (n - first) / (last - first) if last > first else 0.0
        factor = (1 + math.cos(math.pi * share)) / 2
        expected.append(value * (factor if taper else float(n < first)))
    actual = read(frequencies, head_dim)
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert_between(actual, [0.0] * len(values), values)
