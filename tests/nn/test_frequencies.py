import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Frequencies, Linear, Llama3, Yarn, YarnByRotations

HEAD_DIM = 128


def of_transformers(**rope_parameters):
    config = LlamaConfig(
        hidden_size=8 * HEAD_DIM,
        num_attention_heads=8,
        head_dim=HEAD_DIM,
        max_position_embeddings=131_072,
        rope_parameters=rope_parameters,
    )
    return ROPE_INIT_FUNCTIONS[rope_parameters["rope_type"]](config, device="cpu")


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
    found = Frequencies(rope_theta=500_000).inverse_frequencies(HEAD_DIM, dtype=torch.float64)
    expected = torch.tensor([500_000 ** (-2 * n / HEAD_DIM) for n in range(HEAD_DIM // 2)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-14)


def test_the_two_yarns_differ():
    ours = YarnByRotations(factor=32).inverse_frequencies(HEAD_DIM)
    theirs = Yarn(factor=32).inverse_frequencies(HEAD_DIM)
    assert (ours / theirs - 1).abs().max() > 0.5
    # Both keep the fastest pair and divide the slowest by the factor.
    plain = Frequencies().inverse_frequencies(HEAD_DIM)
    for found in (ours, theirs):
        torch.testing.assert_close(found[0], plain[0])
        torch.testing.assert_close(found[-1], plain[-1] / 32)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Frequencies(rope_theta=0), "rope_theta"),
        (lambda: Linear(factor=0.5), "factor"),
        (lambda: Yarn(factor=4, original_max_position_embeddings=0), "original_max_position_embeddings"),
        (lambda: YarnByRotations(factor=4, beta_fast=1, beta_slow=2), "beta_fast"),
        (lambda: Llama3(low_freq_factor=4, high_freq_factor=1), "high_freq_factor"),
    ],
)
def test_settings_that_cannot_be(make, name):
    with pytest.raises(UsageError, match=rf"model\.frequencies\.{name}"):
        make()
