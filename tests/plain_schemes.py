"""Small decoders with any position scheme, and plain rotations."""

import torch

from ropepp_lit.nn import (
    ALiBi,
    Decoder,
    DecoderConfig,
    Documents,
    FoPE,
    Frequencies,
    IndependentQueries,
    MappedQueries,
    NoPE,
    PartialRoPE,
    PoPE,
    RoPE,
    RoPEPP,
    TurnedQueries,
    UnrotatedQueries,
)

ALL_SCHEMES = {
    "rope": RoPE(), "eh": RoPEPP(variant="eh"), "ec": RoPEPP(variant="ec"), "partial": PartialRoPE(),
    "fope": FoPE(context_length=64), "alibi": ALiBi(), "nope": NoPE(), "turned": TurnedQueries(angle=45.0),
    "mapped": MappedQueries(variant="eh"), "unrotated": UnrotatedQueries(), "independent": IndependentQueries(),
    "pope": PoPE(phase_init="uniform"),
}  # fmt: skip
"""For what every scheme must do."""

POSITIONS = torch.tensor([0, 1, 2, 3, 255, 256, 500, 4095, 4096, 5000, 5001, 32_767, 65_536, 99_999, 100_000])


def make(scheme, frequencies=None, **changes):
    geometry = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**{**geometry, **changes}), scheme, frequencies or Frequencies())


def turned(x, pairs):
    """Multiply pair n of token t of a head [T, d], as x_n + i x_{n+d/2}, by the complex number pairs[t][n]."""
    half = x.shape[1] // 2
    result = x.clone()
    for t in range(len(x)):
        for n, factor in enumerate(pairs[t]):
            z = complex(x[t, n], x[t, n + half]) * factor
            result[t, n], result[t, n + half] = z.real, z.imag
    return result


def assert_cached_and_packed(decoder, ids):
    """Compare logits with a cache, and of separate documents, with those of full rows [2, 40]; return the latter."""
    whole = decoder(ids)
    cache = decoder.allocate_cache(batch_size=2, max_tokens=40)
    parts = [decoder(part, cache=cache) for part in ids.split([17, 1, 9, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-11, rtol=0)
    documents = Documents.from_ids(torch.tensor([[0] * 9 + [1] + [2] * 30, [0] * 40]))
    alone = torch.cat([decoder(part) for part in ids[:1].split([9, 1, 30], dim=1)], dim=1)
    torch.testing.assert_close(decoder(ids, documents=documents)[:1], alone, atol=1e-11, rtol=0)
    return whole
