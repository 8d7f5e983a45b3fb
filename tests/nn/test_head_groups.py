"""Attention computed in groups of heads against all heads at once, in float64."""

import pytest
import torch
from plain_schemes import ALL_SCHEMES

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import (
    Decoder,
    DecoderConfig,
    Documents,
    Frequencies,
    RNoPE,
    RoPE,
    RoPEPP,
)

GEOMETRY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
SCHEMES = {**ALL_SCHEMES, "rnope": RNoPE(nope_layers=[1])}
BIASES = {"qk_norm": True, "attention_bias": True, "attention_output_bias": True}


def make(scheme, **changes):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**GEOMETRY, **changes), scheme, Frequencies()).double()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def run(decoder, documents):
    input_ids = torch.arange(2 * 24).view(2, 24) % 64
    decoder.zero_grad()
    loss = decoder.loss(input_ids, input_ids, documents=documents)
    loss.backward()
    return [loss.detach(), decoder(input_ids, documents=documents).detach(), *(p.grad for p in decoder.parameters())]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "norms and biases"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_head_groups_equal_all_heads(scheme, changes, packed):
    documents = Documents.from_ids((torch.arange(24) // 7).expand(2, -1)) if packed else None
    decoder = make(SCHEMES[scheme], **changes)
    expected = run(decoder, documents)
    for settings in ({"attention_head_groups": 2}, {"attention_head_groups": 4, "checkpoint_every": 1}):
        decoder.save_memory(**settings)
        for actual, reference in zip(run(decoder, documents), expected, strict=True):
            torch.testing.assert_close(actual, reference, atol=1e-12, rtol=0)


def test_cache_disables_head_groups():
    decoder = make(RoPEPP(variant="ec"))
    input_ids = torch.arange(12).view(1, 12)
    expected = decoder(input_ids)
    decoder.save_memory(attention_head_groups=4)
    cache = decoder.allocate_cache(batch_size=1, max_tokens=12)
    torch.testing.assert_close(decoder(input_ids, cache=cache), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("groups", [0, 3, 16])
def test_groups_must_divide_the_key_value_heads(groups):
    with pytest.raises(UsageError, match=f"model.attention_head_groups: {groups} must divide the 8 key/value heads"):
        make(RoPE()).save_memory(attention_head_groups=groups)


def kept(decoder):
    """Return the bytes that a layer saves for the backward pass without parameters, and the bytes of its input."""
    layer = decoder.model.layers[0].self_attn
    hidden = torch.randn(1, 64, 32, dtype=torch.float64, requires_grad=True)
    tables = decoder.scheme.tables(torch.arange(64)[None], Frequencies(), head_dim=8, dtype=torch.float64)
    storages = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter) and x._base is None:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(hidden, tables)
    return sum(storages.values()), hidden.nbytes


def test_only_the_input_is_saved():
    decoder = make(RoPEPP(variant="ec"))
    whole, _ = kept(decoder)
    decoder.save_memory(attention_head_groups=4)
    actual, of_input = kept(decoder)
    assert actual == of_input < whole
