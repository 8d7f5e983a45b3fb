"""Attention gates and score scaling against a plain float64 implementation, with every scheme."""

import math

import pytest
import torch
from plain_schemes import ALL_SCHEMES, POSITIONS, assert_cached_and_packed, make

from ropepp_lit.checkpoint import describe_architecture, load_decoder, make_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.config import Architecture, write_config
from ropepp_lit.nn import Frequencies, RoPE, RoPEPP
from ropepp_lit.train.costs import matrix_parameters

SWITCHES = {
    "head": {"attention_gate": "head"},
    "element": {"attention_gate": "element"},
    "log": {"score_scaling": "log"},
    "both": {"attention_gate": "element", "score_scaling": "log", "qk_norm": True},
}


def switched(scheme, **changes):
    """Build a decoder with random gates and scales, as after training."""
    decoder = make(scheme, **changes).double()
    with torch.no_grad():
        for block in decoder.blocks:
            if block.self_attn.score_scale is not None:
                block.self_attn.score_scale.uniform_(0.1, 0.6)
    return decoder


@pytest.mark.parametrize("switch", ["head", "element", "log"])
@pytest.mark.parametrize("scheme", [RoPE(), RoPEPP(variant="ec"), RoPEPP(variant="eh")], ids=str)
def test_the_formula(scheme, switch):
    decoder = switched(scheme, **SWITCHES[switch])
    layer, frequencies = decoder.model.layers[1].self_attn, Frequencies()
    hidden = torch.randn(1, len(POSITIONS), 64, dtype=torch.float64)
    tables = scheme.tables(POSITIONS[None], frequencies, head_dim=16, dtype=torch.float64)
    counts = POSITIONS.double() + 1
    with torch.no_grad():
        behind = (counts.log()[None, :, None, None],) if switch == "log" else ()
        actual = layer(hidden, (*tables, *behind))
        q, k, v = (part(hidden).unflatten(-1, (-1, 16)) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = scheme.rotate(q, k, tables)
        outputs = []
        for head in range(q.shape[2]):
            group = head * k.shape[2] // q.shape[2]
            scores = q[0, :, head] @ k[0, :, group].T / 4
            if switch == "log":
                for t, count in enumerate(counts.tolist()):
                    scores[t] *= layer.score_scale[head] * math.log(count)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            output = scores.softmax(-1) @ v[0, :, group]
            if switch != "log":
                size = 1 if switch == "head" else 16
                weight = layer.output_gate.weight[head * size : (head + 1) * size]
                output = output / (1 + torch.exp(-hidden[0] @ weight.T))
            outputs.append(output)
        expected = torch.cat(outputs, dim=-1) @ layer.o_proj.weight.T
    torch.testing.assert_close(actual[0], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_cache_packing_and_head_groups(scheme, switch):
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4}
    decoder = switched(ALL_SCHEMES[scheme], **changes, **SWITCHES[switch])
    ids = torch.randint(0, 64, (2, 40))
    assert_cached_and_packed(decoder, ids)
    decoder.loss(ids, ids).backward()
    expected = [parameter.grad for parameter in decoder.parameters()]
    assert all(gradient is not None for gradient in expected)
    decoder.zero_grad()
    decoder.save_memory(attention_head_groups=2, checkpoint_every=1)
    decoder.loss(ids, ids).backward()
    for parameter, gradient in zip(decoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("switch", SWITCHES)
def test_weights_and_costs(switch):
    """Other weights have the same initial values as without the switch; FLOPs include the gate."""
    plain, decoder = make(RoPEPP()), make(RoPEPP(), **SWITCHES[switch])
    known = dict(plain.named_parameters())
    for name, parameter in decoder.named_parameters():
        if name in known:
            assert torch.equal(parameter, known[name]), name
        elif name.endswith("score_scale"):
            assert parameter.tolist() == pytest.approx([0.168] * 8)
    config, embedding = decoder.config, 64 * 64
    others = sum(value.numel() for value in decoder.parameters() if value.ndim == 1)
    assert matrix_parameters(config, decoder.head_layout) == decoder.num_parameters - embedding - others


@pytest.mark.parametrize("switch", SWITCHES)
def test_save_load_and_refused_export(switch):
    decoder = switched(RoPE(), **SWITCHES[switch])
    architecture = describe_architecture(decoder.config, decoder.scheme, decoder.frequencies)
    again = load_decoder(make_checkpoint(decoder.state_dict(), architecture=architecture))
    ids = torch.randint(0, 64, (1, 30))
    assert torch.equal(again(ids), decoder(ids))
    with pytest.raises(UsageError, match=r"model\.decoder\.(attention_gate|score_scaling): \w+ cannot be exported"):
        write_config(Architecture(decoder.config, decoder.scheme, decoder.frequencies, 512))
