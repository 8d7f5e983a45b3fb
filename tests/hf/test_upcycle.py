"""Upcycling of RoPE checkpoints to RoPE++: EC with the same outputs, EH as an approximation."""

import pytest
import torch

from ropepp_lit.checkpoint import KEY, describe_architecture, load_decoder, make_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.upcycle import upcycle
from ropepp_lit.nn import ALiBi, Decoder, DecoderConfig, FoPE, Frequencies, NoPE, PartialRoPE, RoPE, RoPEPP


def make(scheme=None, **changes):
    geometry = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    geometry |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "initializer_range": 0.2}
    config, frequencies = DecoderConfig(**{**geometry, **changes}), Frequencies()
    torch.manual_seed(0)
    decoder = Decoder(config, scheme or RoPE(), frequencies)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    architecture = describe_architecture(config, decoder.scheme, frequencies)
    return make_checkpoint(decoder.state_dict(), architecture=architecture, context_length=64)


GEOMETRIES = [
    {},
    {"tie_word_embeddings": True, "num_attention_heads": 9, "num_key_value_heads": 3},
    {"attention_bias": True, "attention_output_bias": True, "qk_norm": True, "mlp_bias": True},
]


@pytest.mark.parametrize("changes", GEOMETRIES)
@torch.no_grad()
def test_ec_has_the_outputs_of_the_original(changes):
    original = make(**changes)
    input_ids = torch.randint(300, (2, 200))  # beyond the training context
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        old, new = (load_decoder(checkpoint).to(dtype) for checkpoint in (original, upcycle(original, variant="ec")))
        expected = old(input_ids)
        assert (new(input_ids) - expected).abs().max() <= tolerance * expected.abs().max()
    assert new.head_layout.num_attention_heads == 2 * old.head_layout.num_attention_heads
    assert (
        new.allocate_cache(batch_size=1, max_tokens=8).nbytes == old.allocate_cache(batch_size=1, max_tokens=8).nbytes
    )


def test_imaginary_columns_have_gradients_at_the_first_step():
    decoder = load_decoder(upcycle(make(), variant="ec")).train()
    input_ids = torch.randint(300, (2, 40))
    decoder.loss(input_ids[:, :-1], input_ids[:, 1:]).backward()
    for block in decoder.model.layers:
        columns = block.self_attn.o_proj.weight.grad.unflatten(1, (-1, 2, 16))
        assert (columns.norm(dim=(0, 3)) > 0).all()


@torch.no_grad()
def test_eh_is_exact_if_paired_heads_are_equal():
    """Averaging equal heads is exact; `first` is exact if the output columns of the dropped heads are zero."""
    twins = make(num_attention_heads=8, num_key_value_heads=4)
    for name, value in twins["state_dict"].items():
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            groups = value.unflatten(0, (2, 2, -1))
            groups[:, 1] = groups[:, 0]
    input_ids = torch.randint(300, (2, 50))
    expected = load_decoder(twins)(input_ids)
    merged = load_decoder(upcycle(twins, variant="eh", pairs="average"))
    torch.testing.assert_close(merged(input_ids), expected, atol=1e-4, rtol=0)
    for name, value in twins["state_dict"].items():
        if "o_proj" in name:
            value.unflatten(1, (2, 2, -1))[:, :, 1] = 0
    expected = load_decoder(twins)(input_ids)
    first = load_decoder(upcycle(twins, variant="eh", pairs="first"))
    torch.testing.assert_close(first(input_ids), expected, atol=1e-4, rtol=0)
    old, new = (
        load_decoder(twins).allocate_cache(batch_size=1, max_tokens=8),
        merged.allocate_cache(batch_size=1, max_tokens=8),
    )
    assert 2 * new.nbytes == old.nbytes


def test_unsupported_checkpoints():
    with pytest.raises(UsageError, match=r"source: only a checkpoint with plain RoPE can be upcycled to RoPE\+\+"):
        upcycle(make(RoPEPP(variant="ec")), variant="ec")
    for scheme in (ALiBi(), FoPE(), NoPE(), PartialRoPE()):
        with pytest.raises(UsageError, match=f"source: only .*; this one has {type(scheme).__name__}"):
            upcycle(make(scheme), variant="ec")
    with pytest.raises(UsageError, match=r"num_attention_heads: RoPE\+\+ EH halves it, so 9 must be even"):
        upcycle(make(num_attention_heads=9, num_key_value_heads=3), variant="eh")


def test_metadata_is_preserved():
    original = make()
    original[KEY] |= {
        "tokenizer": "T",
        "tokenizer_config": "C",
        "bos_token_id": 5,
        "eos_token_id": 6,
        "origin": "model",
    }
    ours = upcycle(original, variant="eh")[KEY]
    assert [ours[key] for key in ("tokenizer", "tokenizer_config", "bos_token_id", "eos_token_id", "origin")] == [
        "T", "C", 5, 6, "model",
    ]  # fmt: skip
    assert (ours["context_length"], ours["tokens_seen"], ours["optimizer"]) == (64, 0, None)
