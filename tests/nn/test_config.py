import pytest
import torch

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPE, RoPEPP

GEOMETRY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# By hand, from the paper's tables. V vocabulary, D hidden, I intermediate, L layers, H query heads, K key/value heads,
# d head size; A attention heads that o_proj reads. Embedding and output layer: 2VD. A layer: q D·Hd, k and v 2·D·Kd,
# o Ad·D, SwiGLU 3·D·I, two norms 2D. The last norm: D.
#   376M: 2·128256·1024 = 262,668,288; SwiGLU 3·1024·3584 = 11,010,048
#     RoPE: q 1,048,576 + k, v 1,048,576 + o 1,048,576 → 8 · (14,155,776 + 2,048) + 1,024 = 113,263,616
#     EH:   q   524,288 + k, v   524,288 + o 1,048,576 → 8 · (13,107,200 + 2,048) + 1,024 = 104,875,008
#     EC:   q 1,048,576 + k, v 1,048,576 + o 2,097,152 → 8 · (15,204,352 + 2,048) + 1,024 = 121,652,224
#   776M: 2·128256·1536 = 394,002,432; SwiGLU 3·1536·5376 = 24,772,608
#     RoPE: q, o 2,359,296 each, k, v 2,359,296 → 12 · (31,850,496 + 3,072) + 1,536 = 382,244,352
#     EH:   q 1,179,648, k, v 1,179,648, o 2,359,296 → 12 · (29,491,200 + 3,072) + 1,536 = 353,932,800
#     EC:   o 4,718,592 → 12 · (34,209,792 + 3,072) + 1,536 = 410,555,904
#   1.5B: 2·128256·2048 = 525,336,576; SwiGLU 3·2048·7168 = 44,040,192
#     RoPE: q, o 4,194,304 each, k, v 2,097,152 → 16 · (54,525,952 + 4,096) + 2,048 = 872,482,816
#     EH:   q 2,097,152, k, v 1,048,576, o 4,194,304 → 16 · (51,380,224 + 4,096) + 2,048 = 822,151,168
#     EC:   o 8,388,608 → 16 · (58,720,256 + 4,096) + 2,048 = 939,591,680
BY_HAND = {
    ("376m", "rope"): 262_668_288 + 113_263_616,
    ("376m", "eh"): 262_668_288 + 104_875_008,
    ("376m", "ec"): 262_668_288 + 121_652_224,
    ("776m", "rope"): 394_002_432 + 382_244_352,
    ("776m", "eh"): 394_002_432 + 353_932_800,
    ("776m", "ec"): 394_002_432 + 410_555_904,
    ("1.5b", "rope"): 525_336_576 + 872_482_816,
    ("1.5b", "eh"): 525_336_576 + 822_151_168,
    ("1.5b", "ec"): 525_336_576 + 939_591_680,
}


@pytest.mark.parametrize(("size", "variant"), BY_HAND)
def test_parameters_of_the_papers_sizes(size, variant):
    with torch.device("meta"):
        scheme = RoPE() if variant == "rope" else RoPEPP(variant=variant)
        decoder = Decoder(DecoderConfig(size=size), scheme, Frequencies())
    print(f"{size} {variant}: {decoder.num_parameters:,} parameters")
    assert decoder.num_parameters == BY_HAND[size, variant]


def test_explicit_fields_override_the_size():
    config = DecoderConfig(size="376M", num_hidden_layers=3, vocab_size=300)
    assert (config.num_hidden_layers, config.vocab_size, config.hidden_size) == (3, 300, 1024)


def test_derived_fields():
    config = DecoderConfig(**{**GEOMETRY, "num_key_value_heads": None})
    assert (config.head_dim, config.num_key_value_heads) == (8, 4)
    assert DecoderConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "7b"}, r"model\.decoder\.size: no size '7b'.*376m, 776m, 1\.5b"),
        ({"vocab_size": None}, r"model\.decoder\.vocab_size: missing"),
        ({"num_hidden_layers": 0}, r"model\.decoder\.num_hidden_layers: 0 must be above 0"),
        ({"hidden_size": 30}, r"model\.decoder\.hidden_size: 30 is not a multiple of num_attention_heads \(4\)"),
        (
            {"num_key_value_heads": 3},
            r"model\.decoder\.num_attention_heads: 4 is not a multiple of num_key_value_heads",
        ),
        ({"head_dim": 7}, r"model\.decoder\.head_dim: 7 is odd"),
        ({"num_key_value_heads": -2}, r"model\.decoder\.num_key_value_heads: -2 must be above 0"),
    ],
)
def test_invalid_geometry(change, message):
    with pytest.raises(UsageError, match=message):
        DecoderConfig(**{**GEOMETRY, **change})


@pytest.mark.parametrize("wrong", [64, -1])
def test_token_ids_outside_the_vocabulary(wrong):
    decoder = Decoder(DecoderConfig(**GEOMETRY), RoPE(), Frequencies())
    with pytest.raises(UsageError, match=rf"token id {wrong} is outside the vocabulary of 64"):
        decoder(torch.tensor([[1, wrong, 2]]))


def test_tied_embeddings_and_biases():
    tied = Decoder(DecoderConfig(**GEOMETRY, tie_word_embeddings=True), RoPE(), Frequencies())
    free = Decoder(DecoderConfig(**GEOMETRY), RoPE(), Frequencies())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert free.num_parameters - tied.num_parameters == 64 * 32
    names = {
        name
        for name, _ in Decoder(
            DecoderConfig(**GEOMETRY, attention_bias=True, attention_output_bias=True, mlp_bias=True),
            RoPE(),
            Frequencies(),
        ).named_parameters()
        if name.endswith("bias")
    }
    assert len(names) == 2 * 7
    assert not any(name.endswith("bias") for name, _ in free.named_parameters())


def test_initial_weights():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**GEOMETRY, "vocab_size": 4096}), RoPEPP(), Frequencies())
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert abs(parameter.std().item() - 0.02) < 0.002, name
