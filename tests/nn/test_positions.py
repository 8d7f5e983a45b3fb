import pytest
import torch

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, HeadLayout, PositionScheme, RoPE, RoPEPP

GEOMETRY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_imaginary_query_equals_the_second_rotation_bit_for_bit(dtype):
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 50, 3, 16, dtype=dtype), torch.randn(2, 50, 3, 16, dtype=dtype)
    positions = torch.randint(0, 100_000, (2, 50))
    scheme = RoPEPP()
    tables = scheme.tables(positions, Frequencies(), head_dim=16, dtype=dtype)
    actual, _ = scheme.rotate(queries, keys, tables)
    # The reference turns the query by -90 degrees first, R_{-π/2} q, and rotates that by the position.
    first, second = queries.chunk(2, dim=-1)
    expected, _ = RoPE().rotate(torch.cat((second, -first), dim=-1), keys, tables)
    assert torch.equal(actual[:, :, 1::2], expected)
    assert torch.equal(actual[:, :, 0::2], RoPE().rotate(queries, keys, tables)[0])


@pytest.mark.parametrize("scheme", [RoPE(), RoPEPP(variant="ec")])
def test_rotation_in_bfloat16_is_the_exact_one_rounded_once(scheme):
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 1, 400, 2, 64, dtype=torch.bfloat16)
    positions = torch.randint(0, 1000, (1, 400))

    def rotated(tables_dtype, dtype):
        tables = scheme.tables(positions, Frequencies(), head_dim=64, dtype=tables_dtype)
        return scheme.rotate(queries.to(dtype), keys.to(dtype), tables)[0]

    actual = rotated(torch.float32, torch.bfloat16)
    assert actual.dtype == torch.bfloat16
    # Angles of float32 change few roundings; cosines of bfloat16 would change about half of them.
    assert (actual == rotated(torch.float64, torch.float64).bfloat16()).double().mean() > 0.99


@pytest.mark.parametrize("scheme", [RoPE(), RoPEPP(variant="ec"), RoPEPP(variant="eh")])
def test_scores_in_bfloat16_depend_only_on_distance(scheme):
    torch.manual_seed(0)
    distance, tokens, shift = 37, 64, 100_000
    queries, keys = torch.randn(2, 1, 1, 1, 64, dtype=torch.bfloat16).expand(-1, -1, tokens, -1, -1)

    def scores(first):
        """Return the score of query first + distance + i and key first + i."""
        rotated = []
        for x, start in ((queries, first + distance), (keys, first)):
            tables = scheme.tables(
                torch.arange(start, start + tokens)[None], Frequencies(), head_dim=64, dtype=torch.float32
            )
            rotated.append(scheme.rotate(x, x, tables))
        return torch.einsum("bthd,btkd->bth", rotated[0][0].double(), rotated[1][1].double()) / 8

    near, far = scores(0), scores(shift)
    assert near.std(dim=1).max() < 0.02
    torch.testing.assert_close(near.mean(1), far.mean(1), atol=0.02, rtol=0)
    torch.testing.assert_close(near, far, atol=0.08, rtol=0)


def test_tables_follow_base_and_scaling():
    positions = torch.arange(8)[None]
    tables = [RoPE().tables(positions, Frequencies(rope_theta=t), head_dim=16, dtype=torch.float32) for t in (1e4, 5e5)]
    assert not torch.equal(tables[0][0], tables[1][0])


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [(RoPE(), (8, 8, 4)), (RoPEPP(variant="eh"), (4, 8, 2)), (RoPEPP(variant="ec"), (8, 16, 4))],
)
def test_head_layouts_of_the_376m_model(scheme, expected):
    assert scheme.head_layout(num_attention_heads=8, num_key_value_heads=4, head_dim=128) == HeadLayout(*expected)


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "name"),
    [(3, 3, "num_attention_heads"), (9, 3, "num_attention_heads"), (4, 1, "num_key_value_heads"), (6, 3, "num_key")],
)
def test_eh_refuses_what_it_cannot_halve(heads, key_value_heads, name):
    config = DecoderConfig(
        **{**GEOMETRY, "hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    )
    with pytest.raises(UsageError, match=rf"model\.decoder\.{name}"):
        Decoder(config, RoPEPP(variant="eh"), Frequencies())
    Decoder(config, RoPEPP(variant="ec"), Frequencies())


def test_unknown_variant():
    with pytest.raises(UsageError, match=r"model\.positions\.variant"):
        RoPEPP(variant="imag2")


@pytest.mark.parametrize(("variant", "share"), [("rope", 1.0), ("ec", 1.0), ("eh", 0.5)])
def test_cache_size_of_variants(variant, share):
    scheme = RoPE() if variant == "rope" else RoPEPP(variant=variant)
    cache = Decoder(DecoderConfig(**GEOMETRY), scheme, Frequencies()).allocate_cache(batch_size=3, max_tokens=50)
    layers, key_value_heads, head_dim, float32 = 2, 2, 8, 4
    assert cache.nbytes == share * 2 * layers * 3 * key_value_heads * 50 * head_dim * float32


class Backwards(PositionScheme):
    """A custom scheme that rotates by negative positions and is not a subclass of RoPE."""

    def tables(self, positions, frequencies, *, head_dim, dtype):
        inverse = frequencies.inverse_frequencies(head_dim, dtype=dtype)
        angles = -positions.to(dtype)[..., None, None] * inverse
        return angles.cos(), angles.sin()

    def rotate(self, queries, keys, tables):
        return RoPE().rotate(queries, keys, tables)


def test_custom_scheme():
    torch.manual_seed(0)
    own = Decoder(DecoderConfig(**GEOMETRY), Backwards(), Frequencies())
    rope = Decoder(DecoderConfig(**GEOMETRY), RoPE(), Frequencies())
    rope.load_state_dict(own.state_dict())
    input_ids = torch.randint(0, 64, (1, 12))
    flipped = rope(input_ids, positions=-torch.arange(12)[None])
    torch.testing.assert_close(own(input_ids), flipped)
    assert not torch.allclose(own(input_ids), rope(input_ids))
