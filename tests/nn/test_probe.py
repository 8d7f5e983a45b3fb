"""Scores and weights that a probe reads and changes."""

import pytest
import torch

from ropepp_lit.nn import Decoder, DecoderConfig, Documents, Frequencies, Probe, RoPE, RoPEPP

CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3,
)  # fmt: skip


def decoder_of(scheme):
    torch.manual_seed(0)
    return Decoder(CONFIG, scheme, Frequencies()).double()


@pytest.mark.parametrize("scheme", [RoPE(), RoPEPP(variant="eh"), RoPEPP(variant="ec")])
@torch.no_grad()
def test_probed_attention_equals_attention(scheme):
    decoder = decoder_of(scheme)
    input_ids = torch.randint(0, 50, (2, 40))
    documents = Documents.from_ids((input_ids == 7).cumsum(1))
    plain, packed = decoder(input_ids), decoder(input_ids, documents=documents)
    with decoder.probed(Probe()):
        torch.testing.assert_close(decoder(input_ids), plain)
        torch.testing.assert_close(decoder(input_ids, documents=documents), packed)
        cache = decoder.allocate_cache(batch_size=2, max_tokens=40)
        parts = [decoder(part, cache=cache) for part in input_ids.split([17, 1, 22], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), plain)
    assert torch.equal(decoder(input_ids), plain)


@torch.no_grad()
def test_probed_weights_are_causal_and_sum_to_one():
    seen = {}

    class See(Probe):
        def weights(self, layer, weights):
            seen[layer] = weights

    decoder = decoder_of(RoPEPP(variant="ec"))
    with decoder.probed(See()):
        decoder(torch.randint(0, 50, (1, 12)))
    assert seen.keys() == {0, 1}
    for weights in seen.values():
        assert weights.shape == (1, 8, 12, 12)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 8, 12).double())
        assert not weights.triu(1).any()


@torch.no_grad()
def test_losses_of_single_tokens_are_those_of_the_logits():
    decoder = decoder_of(RoPE())
    input_ids, labels = torch.randint(0, 50, (2, 2, 30))
    labels[0, :5] = -100
    losses = decoder.loss(input_ids, labels, reduction="none")
    logits = decoder(input_ids)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), expected)
    torch.testing.assert_close(losses.sum(), decoder.loss(input_ids, labels, reduction="sum"))
