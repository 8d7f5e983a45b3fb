"""Controls of RoPE++ against plain float64 implementations, and the tests of every scheme."""

import math

import pytest
import torch
from plain_schemes import POSITIONS, assert_cached_and_packed, make, turned

from ropepp_lit.checkpoint import describe_architecture, load_decoder, make_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.config import Architecture, write_config
from ropepp_lit.nn import (
    Frequencies,
    IndependentQueries,
    MappedQueries,
    Probe,
    RoPEPP,
    TurnedQueries,
    UnrotatedQueries,
)

VARIANTS = ("ec", "eh")
SCHEMES = {
    f"{name}-{variant}": make_it(variant)
    for variant in VARIANTS
    for name, make_it in {
        "copy": lambda variant: TurnedQueries(variant=variant),
        "45": lambda variant: TurnedQueries(variant=variant, angle=45.0),
        "mapped": lambda variant: MappedQueries(variant=variant),
        "unrotated": lambda variant: UnrotatedQueries(variant=variant),
        "independent": lambda variant: IndependentQueries(variant=variant),
    }.items()
}
THETA = [10_000 ** (-2 * n / 16) for n in range(8)]


def rotation(degrees=0.0):
    """Return the complex factors of each rotary pair at POSITIONS, rotated by an angle."""
    turn = -math.radians(degrees)
    return [[complex(math.cos(t * x + turn), math.sin(t * x + turn)) for x in THETA] for t in POSITIONS.tolist()]


def second(name, q, layer, group):
    """Return the query of a second head [T, d], given the unrotated query of its first head."""
    if name == "mapped":
        return turned(q @ layer.query_map[group].T, rotation())
    return q if name == "unrotated" else turned(q, rotation({"copy": 0, "45": 45}[name]))


@pytest.fixture(params=SCHEMES)
def decoder(request):
    return make(SCHEMES[request.param]).double()


@pytest.mark.parametrize("case", SCHEMES)
def test_the_formula(case):
    name, variant = case.rsplit("-", 1)
    decoder = make(SCHEMES[case]).double()
    layer, heads, groups = decoder.model.layers[1].self_attn, *((8, 2) if variant == "ec" else (4, 1))
    hidden = torch.randn(len(POSITIONS), 64, dtype=torch.float64)
    tables = decoder.scheme.tables(POSITIONS[None], Frequencies(), head_dim=16, dtype=torch.float64)
    with torch.no_grad():
        actual = layer(hidden[None], tables)[0]
        q, k, v = (hidden @ part.weight.T for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = (x.unflatten(1, (-1, 16)) for x in (q, k, v))
    assert (q.shape[1], k.shape[1]) == (heads if name == "independent" else heads // 2, groups)
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        if name == "independent":
            query = turned(q[:, head], rotation())
        elif head % 2:
            query = second(name, q[:, head // 2], layer, group)
        else:
            query = turned(q[:, head // 2], rotation())
        scores = query @ turned(k[:, group], rotation()).T / 4
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ v[:, group])
    torch.testing.assert_close(actual, torch.cat(outputs, dim=-1) @ layer.o_proj.weight.T, atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotation_by_90_degrees_is_ropepp(variant):
    ids = torch.randint(0, 64, (2, 40))
    expected = make(RoPEPP(variant=variant)).double()(ids)
    actual = make(TurnedQueries(variant=variant, angle=90.0)).double()(ids)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)
    copy = make(TurnedQueries(variant=variant)).double()(ids)
    assert not torch.allclose(copy, expected, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_controls_share_weights_and_layout_with_ropepp(variant):
    """One seed gives the same weights, heads and cache; only independent queries have more parameters."""
    ours = make(RoPEPP(variant=variant))
    for case, scheme in SCHEMES.items():
        if not case.endswith(variant):
            continue
        other = make(scheme)
        assert other.head_layout[1:] == ours.head_layout[1:]
        one, two = (decoder.allocate_cache(batch_size=1, max_tokens=8) for decoder in (ours, other))
        assert one.keys.shape == two.keys.shape
        if "independent" in case:
            added = sum(block.self_attn.q_proj.weight.numel() for block in ours.blocks)
            assert other.num_parameters - ours.num_parameters == added
            continue
        for (name, value), (_, expected) in zip(other.named_parameters(), ours.named_parameters(), strict=True):
            assert torch.equal(value, expected), name


def test_maps_are_orthogonal_and_differ_by_layer_and_group():
    maps = [matrix for block in make(MappedQueries()).blocks for matrix in block.self_attn.query_map]
    assert len(maps) == 4
    for number, matrix in enumerate(maps):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(16), atol=1e-5, rtol=0)
        assert not any(torch.allclose(matrix, other, atol=0.1) for other in maps[:number])


def test_cache_packing_and_probe(decoder):
    ids = torch.randint(0, 64, (2, 40))
    whole = assert_cached_and_packed(decoder, ids)
    with decoder.probed(Probe()):
        torch.testing.assert_close(decoder(ids), whole, atol=1e-11, rtol=0)


def test_save_load_and_refused_export(decoder):
    architecture = describe_architecture(decoder.config, decoder.scheme, decoder.frequencies)
    again = load_decoder(make_checkpoint(decoder.state_dict(), architecture=architecture))
    ids = torch.randint(0, 64, (1, 30))
    assert vars(again.scheme) == vars(decoder.scheme)
    assert torch.equal(again(ids), decoder(ids))
    with pytest.raises(UsageError, match=f"{type(decoder.scheme).__name__} cannot be exported"):
        write_config(Architecture(decoder.config, decoder.scheme, decoder.frequencies, 512))


def test_invalid_settings():
    for scheme in (TurnedQueries, MappedQueries, UnrotatedQueries, IndependentQueries):
        with pytest.raises(UsageError, match=r"model\.positions\.variant: no variant 'ex'; choose ec or eh"):
            scheme(variant="ex")
        with pytest.raises(UsageError, match="halves it, so 3 must be even"):
            make(scheme(variant="eh"), num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(UsageError, match=r"model\.positions\.angle: nan must be a number of degrees"):
        TurnedQueries(angle=math.nan)
