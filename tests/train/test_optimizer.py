import pytest
import torch

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPEPP
from ropepp_lit.train.optimizer import AdamW, Muon, split_parameters


def make_decoder(**changes):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    return Decoder(config, RoPEPP(), Frequencies())


def descend(decoder, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        input_ids = torch.randint(0, 64, (2, 16), generator=generator)
        decoder.loss(input_ids, input_ids.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def names_of(decoder, parameters):
    by_id = {id(parameter): name for name, parameter in decoder.named_parameters()}
    return {by_id[id(parameter)] for parameter in parameters}


@pytest.mark.parametrize("tied", [False, True])
def test_norms_biases_and_embeddings_are_not_matrices(tied):
    decoder = make_decoder(attention_bias=True, tie_word_embeddings=tied)
    for output_layer_is_matrix in (True, False):
        matrices, rest = split_parameters(decoder, output_layer_is_matrix=output_layer_is_matrix)
        assert len(matrices) + len(rest) == len(list(decoder.parameters()))
        names = names_of(decoder, matrices)
        assert all("_proj.weight" in name or name == "lm_head.weight" for name in names)
        assert sum("_proj.weight" in name for name in names) == 2 * 7
        assert ("lm_head.weight" in names) == (output_layer_is_matrix and not tied)


@pytest.mark.parametrize(("decay_all", "expected"), [(False, [0.3, 0.0]), (True, [0.3, 0.3])])
def test_parameters_with_weight_decay(decay_all, expected):
    optimizer = AdamW(weight_decay=0.3, decay_all=decay_all).build(make_decoder())
    assert [group["weight_decay"] for group in optimizer.param_groups] == expected
    assert all(group["fused"] for group in optimizer.param_groups)


def test_muon_equals_separate_optimizers():
    together, apart = make_decoder(), make_decoder()
    optimizer = Muon(lr=0.01, adamw_lr=0.003, weight_decay=0.1).build(together)
    matrices, rest = split_parameters(apart, output_layer_is_matrix=False)
    muon = torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    descend(together, optimizer, 3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        input_ids = torch.randint(0, 64, (2, 16), generator=generator)
        apart.loss(input_ids, input_ids.roll(-1, 1)).backward()
        for part in (muon, adamw):
            part.step()
            part.zero_grad()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [AdamW(lr=0.01), Muon(lr=0.01)])
def test_a_loaded_state_continues_bit_for_bit(settings, tmp_path):
    decoder = make_decoder()
    optimizer = settings.build(decoder)
    descend(decoder, optimizer, 3)
    torch.save((decoder.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    again = make_decoder()
    resumed = settings.build(again)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    descend(decoder, optimizer, 3)
    descend(again, resumed, 3)
    for one, other in zip(decoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [AdamW(lr=0.01), Muon(lr=0.01)])
def test_a_schedule_applies_to_every_group(settings):
    optimizer = settings.build(make_decoder())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert scheduler.get_last_lr() == [0.005, 0.005]
    if isinstance(settings, Muon):
        assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.005, 0.005]


def test_invalid_learning_rates():
    with pytest.raises(UsageError, match=r"model\.optimizer\.lr: 0 must be above 0"):
        AdamW(lr=0)
    with pytest.raises(UsageError, match=r"model\.optimizer\.adamw_lr: -1 must be above 0"):
        Muon(adamw_lr=-1)
