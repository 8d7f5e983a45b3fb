import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Clipped, Frequencies, Linear, Llama3, Yarn, YarnByRotations

HEAD_DIM = 128


def of_transformers(*, rope_theta, **rope_scaling):
    """Return the frequencies of transformers, by arguments of version 4 that 5 accepts too."""
    config = LlamaConfig(
        hidden_size=8 * HEAD_DIM,
        num_attention_heads=8,
        head_dim=HEAD_DIM,
        max_position_embeddings=131_072,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
    )
    return ROPE_INIT_FUNCTIONS[rope_scaling["rope_type"]](config, device="cpu")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Linear(rope_theta=1e4, factor=8), {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}),
        (
            Yarn(rope_theta=1e6, factor=32, original_max_position_embeddings=4096),
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": 32.0, "original_max_position_embeddings": 4096},
        ),
        (
            Yarn(factor=4, original_max_position_embeddings=2048, beta_fast=16, beta_slow=2, truncate=False),
            {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 2048,
                "beta_fast": 16,
                "beta_slow": 2,
                "truncate": False,
            },
        ),
        (
            Llama3(rope_theta=5e5, factor=32, original_max_position_embeddings=8192),
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 32.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
    ],
    ids=["linear", "yarn", "yarn-without-truncation", "llama3"],
)
def test_equal_to_transformers(ours, theirs):
    expected, attention_factor = of_transformers(**theirs)
    torch.testing.assert_close(ours.inverse_frequencies(HEAD_DIM), expected, atol=0, rtol=2e-6)
    assert ours.attention_factor == pytest.approx(attention_factor)


def test_plain_frequencies_are_powers_of_the_base():
    actual = Frequencies(rope_theta=500_000).inverse_frequencies(HEAD_DIM, dtype=torch.float64)
    expected = torch.tensor([500_000 ** (-2 * n / HEAD_DIM) for n in range(HEAD_DIM // 2)], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=0, rtol=1e-14)


def test_the_two_yarns_differ():
    ours = YarnByRotations(factor=32).inverse_frequencies(HEAD_DIM)
    theirs = Yarn(factor=32).inverse_frequencies(HEAD_DIM)
    assert (ours / theirs - 1).abs().max() > 0.5
    # Both keep the fastest pair and divide the slowest by the factor.
    plain = Frequencies().inverse_frequencies(HEAD_DIM)
    for actual in (ours, theirs):
        torch.testing.assert_close(actual[0], plain[0])
        torch.testing.assert_close(actual[-1], plain[-1] / 32)


@pytest.mark.parametrize("taper", [True, False])
@pytest.mark.parametrize(
    ("settings", "first"),
    [({"context_length": 4096}, 46), ({"kept": 0.75}, 48), ({"kept": 0.0}, 0), ({"kept": 1.0}, 64)],
)
def test_clipped_frequencies(settings, first, taper):
    theta = [10_000 ** (-2 * n / 128) for n in range(64)]
    if "context_length" in settings:
        assert sum(4096 * x / (2 * math.pi) >= 1 for x in theta) == first
    expected = []
    for n, x in enumerate(theta):
        factor = 1.0
        if n >= first:
            factor = (1 + math.cos(math.pi * (n - first) / (63 - first))) / 2 if taper else 0.0
        expected.append(x * factor)
    actual = Clipped(**settings, taper=taper).inverse_frequencies(HEAD_DIM, dtype=torch.float64)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-18, rtol=1e-12)
    if first < 64:
        assert actual[-1] < 1e-18


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Frequencies(rope_theta=0), "rope_theta"),
        (lambda: Linear(factor=0.5), "factor"),
        (lambda: Yarn(factor=4, original_max_position_embeddings=0), "original_max_position_embeddings"),
        (lambda: YarnByRotations(factor=4, beta_fast=1, beta_slow=2), "beta_fast"),
        (lambda: Clipped(context_length=0), "context_length"),
        (lambda: Clipped(kept=1.5), "kept"),
        (lambda: Llama3(low_freq_factor=4, high_freq_factor=1), "high_freq_factor"),
    ],
)
def test_invalid_settings(make, name):
    with pytest.raises(UsageError, match=rf"model\.frequencies\.{name}"):
        make()


def test_exclusive_settings():
    for settings in ({}, {"context_length": 512, "kept": 0.5}):
        with pytest.raises(UsageError, match=r"model\.frequencies: Clipped needs either context_length or kept"):
            Clipped(**settings)
