"""ALiBi, partial RoPE, FoPE, PoPE and NoPE against plain float64 implementations."""

import math
from types import SimpleNamespace

import pytest
import torch
from plain_schemes import POSITIONS, make, turned
from torch.nn.attention import SDPBackend, sdpa_kernel

from ropepp_lit.checkpoint import describe_architecture, load_decoder, make_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.config import Architecture, write_config
from ropepp_lit.nn import (
    ALiBi,
    Documents,
    FoPE,
    Frequencies,
    Linear,
    NoPE,
    PartialRoPE,
    PoPE,
    Probe,
    RoPE,
    RoPEPP,
    YarnByRotations,
)
from ropepp_lit.nn.context_parallel import heads_of_rank
from ropepp_lit.nn.generation import generate
from ropepp_lit.train.optimizer import AdamW, Muon

SCHEMES = {"alibi": ALiBi(), "partial": PartialRoPE(), "fope": FoPE(context_length=4096), "nope": NoPE(),
           "pope": PoPE(phase_init="uniform")}  # fmt: skip


@pytest.fixture(params=SCHEMES)
def decoder(request):
    return make(SCHEMES[request.param])


def alibi_scores(q, k, slope):
    scores = q @ k.T / math.sqrt(q.shape[1])
    for i, t in enumerate(POSITIONS.tolist()):
        for j, s in enumerate(POSITIONS.tolist()):
            scores[i, j] -= slope * (t - s)
    return scores


def rotated_scores(q, k, pairs):
    return turned(q, pairs) @ turned(k, pairs).T / math.sqrt(q.shape[1])


def assert_attention_is(decoder, score):
    """Compare the second layer's attention at POSITIONS with `score(q, k, h, group, layer)`, q and k [T, d] each."""
    decoder = decoder.double()
    config, layer = decoder.config, decoder.model.layers[1].self_attn
    d, num_tokens = config.head_dim, len(POSITIONS)
    hidden = torch.randn(num_tokens, config.hidden_size, dtype=torch.float64)
    tables = decoder.scheme.tables(POSITIONS[None], decoder.frequencies, head_dim=d, dtype=torch.float64)
    with torch.no_grad():
        actual = layer(hidden[None], tables)[0]
        q, k, v = (
            (hidden @ part.weight.T).view(num_tokens, -1, d) for part in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
    outputs = []
    for h in range(q.shape[1]):
        group = h * k.shape[1] // q.shape[1]
        scores = score(q[:, h], k[:, group], h, group, layer)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ v[:, group])
    expected = torch.cat(outputs, dim=-1) @ layer.o_proj.weight.T
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("key_value_heads", "slopes"),
    [
        (4, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        (2, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
        (3, [*(2**-h for h in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
        (1, [1 / 256]),
    ],
    ids=lambda value: f"{len(value)} heads" if isinstance(value, list) else "",
)  # fmt: skip
def test_alibi(key_value_heads, slopes):
    decoder = make(ALiBi(), num_attention_heads=len(slopes), num_key_value_heads=key_value_heads)
    assert_attention_is(decoder, lambda q, k, h, group, layer: alibi_scores(q, k, slopes[h]))


@pytest.mark.parametrize("frequencies", [Frequencies(), Frequencies(rope_theta=5e5), Linear(factor=8)], ids=str)
@pytest.mark.parametrize(("factor", "rotary_dim"), [(0.25, 4), (0.5, 8), (1.0, 16)])
def test_partial_rope(frequencies, factor, rotary_dim):
    decoder = make(PartialRoPE(partial_rotary_factor=factor), frequencies)
    divisor = getattr(frequencies, "factor", 1)
    theta = [frequencies.rope_theta ** (-2 * n / rotary_dim) / divisor for n in range(rotary_dim // 2)]
    pairs = [[complex(math.cos(t * x), math.sin(t * x)) for x in theta] for t in POSITIONS.tolist()]

    def score(q, k, h, group, layer):
        first = rotated_scores(q[:, :rotary_dim], k[:, :rotary_dim], pairs) * math.sqrt(rotary_dim)
        return (first + q[:, rotary_dim:] @ k[:, rotary_dim:].T) / math.sqrt(16)

    assert_attention_is(decoder, score)


@pytest.mark.parametrize(
    ("frequencies", "context_length", "kept"),
    [(Frequencies(), 4096, 6), (Frequencies(), 512, 4), (Frequencies(), 60, 2), (Frequencies(rope_theta=5e5), 4096, 4),
     (Linear(factor=8), 4096, 4)],
)  # fmt: skip
def test_fope(frequencies, context_length, kept):
    theta = [frequencies.rope_theta ** (-2 * n / 16) / getattr(frequencies, "factor", 1) for n in range(8)]
    theta = [x for x in theta if x >= 2 * math.pi / context_length]
    assert len(theta) == kept
    width = min(kept, 4)

    def score(q, k, h, group, layer):
        a, b = layer.cos_coef[group].tolist(), layer.sin_coef[group].tolist()
        pairs = []
        for t in POSITIONS.tolist():
            cos = [sum(a[n][w] * math.cos(t * theta[n]) for n in range(kept)) for w in range(width)]
            sin = [sum(b[n][w] * math.sin(t * theta[n]) for n in range(kept)) for w in range(width)]
            pairs.append([complex(c, s) for c, s in zip(cos, sin, strict=True)] + [1 + 1j] * (8 - width))
        return rotated_scores(q, k, pairs)

    assert_attention_is(make(FoPE(context_length=context_length), frequencies), score)


@pytest.mark.parametrize("frequencies", [Frequencies(), Frequencies(rope_theta=5e5), Linear(factor=8)], ids=str)
def test_pope(frequencies):
    decoder = make(PoPE(phase_init="uniform"), frequencies).double()
    theta = [frequencies.rope_theta ** (-c / 16) / getattr(frequencies, "factor", 1) for c in range(16)]
    bias = decoder.model.layers[1].self_attn.phase_bias
    with torch.no_grad():
        bias[1, :2] = torch.tensor([0.5, -7.0])  # beyond the ends

    def score(q, k, h, group, layer):
        scores = torch.zeros(len(POSITIONS), len(POSITIONS), dtype=torch.float64)
        for c, delta in enumerate(bias[group].tolist()):
            delta = min(0.0, max(-2 * math.pi, delta))
            phases = [[math.cos((s - t) * theta[c] + delta) for s in POSITIONS.tolist()] for t in POSITIONS.tolist()]
            magnitudes = (1 + q[:, c].exp()).log()[:, None] * (1 + k[:, c].exp()).log()
            scores += magnitudes * torch.tensor(phases, dtype=torch.float64)
        return scores / math.sqrt(16)

    assert_attention_is(decoder, score)


def test_the_phase_biases_of_pope_are_trained_without_weight_decay():
    input_ids = torch.randint(0, 64, (2, 20))
    for block in (decoder := make(PoPE())).blocks:
        assert (block.self_attn.phase_bias == 0).all()
    decoder.loss(input_ids, input_ids).backward()
    assert all(block.self_attn.phase_bias.grad.abs().min() > 0 for block in decoder.blocks)
    decoder = make(PoPE(phase_init="uniform"))
    biases = {id(block.self_attn.phase_bias): block.self_attn.phase_bias for block in decoder.blocks}
    drawn = torch.stack(list(biases.values()))
    assert drawn.shape == (2, 2, 16)
    assert -2 * math.pi <= drawn.min() < -5
    assert -1 < drawn.max() <= 0
    assert decoder.num_parameters == make(RoPE()).num_parameters + drawn.numel()
    for optimizer in (AdamW(weight_decay=0.1), Muon(weight_decay=0.1)):
        groups = optimizer.build(decoder).param_groups
        actual = [group for group in groups if biases.keys() & {id(parameter) for parameter in group["params"]}]
        assert [group["weight_decay"] for group in actual] == [0.0]


def test_nope():
    assert_attention_is(make(NoPE()), lambda q, k, h, group, layer: q @ k.T / math.sqrt(q.shape[1]))


def test_cached_logits_equal_uncached_ones(decoder):
    decoder = decoder.double()
    input_ids = torch.randint(0, 64, (2, 40))
    whole = decoder(input_ids)
    cache = decoder.allocate_cache(batch_size=2, max_tokens=40)
    parts = [decoder(part, cache=cache) for part in input_ids.split([17, 1, 9, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-11, rtol=0)


def test_packed_documents_equal_documents_alone(decoder):
    decoder = decoder.double()
    lengths = [[9, 1, 20], [30]]
    rows = [[torch.randint(0, 64, (length,)) for length in row] for row in lengths]
    packed = torch.stack([torch.cat(row) for row in rows])
    ids = torch.tensor([[0] * 9 + [1] + [2] * 20, [0] * 30])
    documents = Documents.from_ids(ids)
    actual = decoder(packed, documents=documents)
    expected = torch.stack([torch.cat([decoder(document[None])[0] for document in row]) for row in rows])
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)
    assert not torch.allclose(actual, decoder(packed), atol=1e-3)
    made = torch.stack(list(generate(decoder, packed, max_new_tokens=10, documents=documents)), 1)
    for row, tokens in zip(rows, made, strict=True):
        assert tokens.tolist() == [int(token) for token in generate(decoder, row[-1][None], max_new_tokens=10)]


def test_probed_attention_equals_attention(decoder):
    decoder, input_ids = decoder.double(), torch.randint(0, 64, (2, 40))
    plain = decoder(input_ids)
    with decoder.probed(Probe()):
        torch.testing.assert_close(decoder(input_ids), plain, atol=1e-11, rtol=0)


@torch.no_grad()
def test_a_probe_sees_the_biases_of_alibi():
    seen = []

    class See(Probe):
        def scores(self, layer, scores):
            seen.append(scores[0])
            return scores

    decoder = make(ALiBi(), num_attention_heads=12, num_hidden_layers=1).double()
    decoder.model.layers[0].self_attn.q_proj.weight.zero_()
    with decoder.probed(See()):
        decoder(torch.randint(0, 64, (1, len(POSITIONS))), positions=POSITIONS[None])
    slopes = torch.tensor([*(2**-h for h in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], dtype=torch.float64)
    distances = (POSITIONS[:, None] - POSITIONS[None]).double()
    torch.testing.assert_close(seen[0], -slopes[:, None, None] * distances, atol=1e-8, rtol=0)


def test_memory_efficient_kernel_for_every_scheme(decoder):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it is not to be had
        decoder.loss(torch.randint(0, 64, (1, 300)), torch.randint(0, 64, (1, 300))).backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("heads", [8, 12])
@torch.no_grad()
def test_alibi_is_the_same_at_position_20_000_as_at_0(dtype, tolerance, heads):
    decoder = make(ALiBi(), num_attention_heads=heads, num_key_value_heads=4).to(dtype)
    input_ids = torch.randint(0, 64, (1, 600))
    expected = decoder(input_ids)
    actual = decoder(input_ids, positions=torch.arange(20_000, 20_600)[None])
    assert (actual - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("scheme", [ALiBi(), PoPE(phase_init="uniform")], ids=str)
@torch.no_grad()
def test_bfloat16_at_20_000_stays_near_float32(scheme):
    """Attention only, since other layers of a bfloat16 decoder round too."""
    attention = make(scheme, num_attention_heads=8).model.layers[0].self_attn.bfloat16()
    positions = torch.cat((torch.arange(0, 20_000, 37), torch.arange(20_000, 20_400)))[None]
    hidden = torch.randn(1, positions.shape[1], 64).bfloat16()
    tables = scheme.tables(positions, Frequencies(), head_dim=16, dtype=torch.float32)
    actual = attention(hidden, tables)[:, -400:].float()
    expected = attention.float()(hidden.float(), tables)[:, -400:]
    assert (actual - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("scheme", "frequencies"),
    [(RoPE(), Frequencies()), (RoPEPP(variant="eh"), Frequencies()), (RoPEPP(variant="ec"), Linear(factor=8))],
    ids=["rope", "eh", "ec"],
)
def test_rope_and_ropepp_have_no_extra_tensors(scheme, frequencies):
    decoder = make(scheme, frequencies)
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names = {f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts}
    assert decoder.state_dict().keys() == names | {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_one_seed_gives_all_schemes_the_same_weights():
    expected = dict(make(RoPE()).named_parameters())
    for scheme in SCHEMES.values():
        for name, parameter in make(scheme).named_parameters():
            assert torch.equal(parameter, expected.get(name, parameter)), name


def test_fope_of_the_376m_model():
    decoder = make(
        FoPE(), num_attention_heads=8, num_key_value_heads=4, head_dim=128, hidden_size=32, num_hidden_layers=1
    )
    attention = decoder.model.layers[0].self_attn
    identity = torch.zeros(46, 32)
    for column in range(23):
        identity[2 * column, column] = 1
    for matrices in (attention.cos_coef, attention.sin_coef):
        assert matrices.shape == (4, 46, 32)
        noise = matrices - identity
        assert noise.std() == pytest.approx(0.3 * math.sqrt(2 / (32 * (46 + 4))), rel=0.05)
        assert noise.abs().max() < 0.06
    decoder = make(FoPE(context_length=60))
    assert torch.allclose(decoder.model.layers[0].self_attn.cos_coef, torch.eye(2), atol=0.6)


def test_fope_matrices_differ_and_are_not_trained():
    decoder = make(FoPE())
    matrices = [
        matrix for block in decoder.model.layers for part in ("cos_coef", "sin_coef")
        for matrix in getattr(block.self_attn, part)
    ]  # fmt: skip
    assert len(matrices) == 2 * 2 * 2
    assert not any(torch.equal(one, other) for n, one in enumerate(matrices) for other in matrices[:n])
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    optimizer = AdamW(lr=0.1).build(decoder)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in decoder.parameters()}
    assert not held & {id(buffer) for buffer in decoder.buffers()}
    input_ids = torch.randint(0, 64, (2, 20))
    decoder.loss(input_ids[:, :-1], input_ids[:, 1:]).backward()
    optimizer.step()
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, before[name]) == ("coef" in name), name
    assert not any(buffer.requires_grad for buffer in decoder.buffers())


@pytest.mark.parametrize(
    "frequencies",
    [Linear(factor=8), YarnByRotations(factor=8, original_max_position_embeddings=512)],
    ids=["linear", "yarn"],
)
def test_fope_keeps_as_many_frequencies_in_a_scaled_context(frequencies):
    changes = {"head_dim": 64, "num_hidden_layers": 1}
    short, long = make(FoPE(context_length=512), **changes), make(FoPE(context_length=4096), frequencies, **changes)
    long.load_state_dict(short.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(FoPE(context_length=4096), **changes).load_state_dict(short.state_dict())


@pytest.mark.parametrize("name", SCHEMES)
def test_saved_and_loaded(name, tmp_path):
    decoder = make(SCHEMES[name])
    architecture = describe_architecture(decoder.config, decoder.scheme, decoder.frequencies)
    torch.save(make_checkpoint(decoder.state_dict(), architecture=architecture), tmp_path / "model.ckpt")
    again = load_decoder(torch.load(tmp_path / "model.ckpt", weights_only=True))
    input_ids = torch.randint(0, 64, (1, 30))
    assert vars(again.scheme) == vars(decoder.scheme)
    assert torch.equal(again(input_ids), decoder(input_ids))
    for one, other in zip(again.buffers(), decoder.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("heads", "parts"),
    [(4, [[0, 1], [2, 3]]), (1, [[0], [0]]), (2, [[0], [0], [1], [1]]), (3, [[0, 0, 1], [1, 2, 2]])],
)
def test_constants_are_sharded_with_heads(heads, parts):
    """As `tokens_to_heads` repeats key/value heads that ranks cannot share equally."""
    for rank, expected in enumerate(parts):
        group = SimpleNamespace(size=lambda: len(parts), rank=lambda rank=rank: rank)
        assert heads_of_rank(torch.arange(heads), group).tolist() == expected


def test_cache_size_includes_extra_dims():
    cache = make(ALiBi()).allocate_cache(batch_size=3, max_tokens=50)
    assert cache.nbytes == 2 * 2 * 3 * 2 * 50 * (16 + 8) * 4
    assert make(PoPE()).allocate_cache(batch_size=3, max_tokens=50).nbytes == 2 * 2 * 3 * 2 * 50 * 32 * 4
    for scheme in (PartialRoPE(), FoPE(), NoPE()):
        assert make(scheme).allocate_cache(batch_size=3, max_tokens=50).nbytes == 2 * 2 * 3 * 2 * 50 * 16 * 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PartialRoPE(partial_rotary_factor=0), r"model\.positions\.partial_rotary_factor: 0 must be above 0"),
        (lambda: PartialRoPE(partial_rotary_factor=1.5), r"model\.positions\.partial_rotary_factor: 1\.5 must be"),
        (lambda: make(PartialRoPE(partial_rotary_factor=0.1)), r"0\.1 of 16 dimensions is 1\.6; it must be an even"),
        (lambda: make(PartialRoPE(partial_rotary_factor=0.0625)), r"0\.0625 of 16 dimensions is 1; it must be an even"),
        (lambda: make(PartialRoPE(), head_dim=12), r"0\.25 of 12 dimensions is 3; it must be an even number"),
        (lambda: PoPE(phase_init="one"), r"model\.positions\.phase_init: 'one' does not exist; choose zero or uniform"),
        (lambda: FoPE(context_length=0), r"model\.positions\.context_length: 0 must be above 0"),
        (
            lambda: make(FoPE(context_length=6)),
            r"model\.positions\.context_length: no frequency completes a rotation in 6 tokens",
        ),
        (lambda: make(FoPE(), head_dim=2), r"model\.decoder\.head_dim: 2 is too small; FoPE needs 4 or more"),
    ],
)
def test_invalid_arguments(build, message):
    with pytest.raises(UsageError, match=message):
        build()


@pytest.mark.parametrize("name", SCHEMES)
def test_export_error_names_the_scheme(name):
    scheme, config = SCHEMES[name], make(SCHEMES[name]).config
    with pytest.raises(UsageError, match=rf"model\.positions: {type(scheme).__name__} cannot be exported"):
        write_config(Architecture(config, scheme, Frequencies(), 4096))
