"""Noise on one group of heads, and attention by distance."""

import pytest
import torch

from ropepp_lit.eval.models import load_model
from ropepp_lit.eval.probes import MAP_CELLS, Noise, draw_maps, measure_attention
from ropepp_lit.nn import Probe


@pytest.fixture
def load(small_checkpoints):
    return lambda variant: load_model(str(small_checkpoints[variant]), dtype=torch.float64, device=torch.device("cpu"))


class Record(Probe):
    """Probe that records the scores, after another probe if there is one."""

    def __init__(self, other=None):
        self.other, self.seen = other or Probe(), []

    def scores(self, layer, scores):
        self.seen.append(self.other.scores(layer, scores).clone())
        return self.seen[-1]


def run(model, probe):
    ids = torch.randint(2, 258, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.decoder.probed(probe):
        return model.decoder(ids)


@pytest.mark.parametrize("heads", ["real", "imaginary"])
def test_noise_affects_only_one_group(load, heads):
    model = load("ec")
    plain, noisy = Record(), Record(Noise(groups=model.decoder.scheme.head_kinds, heads=heads, std=0.7, seed=1))
    logits = run(model, plain)
    assert not torch.equal(run(model, noisy), logits)
    first, other = (0, 1) if heads == "real" else (1, 0)
    difference = noisy.seen[0] - plain.seen[0]  # of the first layer, which has equal inputs
    assert not difference[:, other::2].any()
    assert float(difference[:, first::2].std()) == pytest.approx(0.7, rel=0.05)
    assert abs(float(difference[:, first::2].mean())) < 0.05


@pytest.mark.parametrize("variant", ["rope", "eh", "ec"])
def test_noise_of_zero_is_bit_exact(load, variant):
    model = load(variant)
    logits = run(model, Probe())
    for heads in model.decoder.scheme.head_kinds:
        assert torch.equal(
            run(model, Noise(groups=model.decoder.scheme.head_kinds, heads=heads, std=0.0, seed=1)), logits
        )


def test_noise_is_reproducible_by_seed(load):
    model = load("eh")
    noisy = [
        run(model, Noise(groups=model.decoder.scheme.head_kinds, heads="real", std=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_only_ropepp_has_imaginary_heads(load):
    assert load("rope").decoder.scheme.head_kinds == ("real",)
    assert load("eh").decoder.scheme.head_kinds == load("ec").decoder.scheme.head_kinds == ("real", "imaginary")


@pytest.mark.parametrize("variant", ["rope", "ec"])
def test_attention_by_distance_matches_the_weights(load, variant, monkeypatch):
    model = load(variant)
    text = [0, *torch.randint(2, 258, (99,), generator=torch.Generator().manual_seed(0)).tolist()]
    weights = []

    class See(Probe):
        def weights(self, layer, values):
            weights.append(values[0])

    with torch.no_grad(), model.decoder.probed(See()):
        model.decoder(torch.tensor([text]))
    monkeypatch.setattr("ropepp_lit.eval.probes.CHUNK_TOKENS", 37)
    actual, maps = measure_attention(model, [text, text], length=100)
    groups = model.decoder.scheme.head_kinds
    for group, heads in enumerate(groups):
        mean = torch.stack(weights)[:, group :: len(groups)].mean(dim=(0, 1))  # [queries, keys]
        mine = {item.position: item for item in actual if item.heads == heads and not item.part}
        assert list(mine) == [0, 1, 2, 4, 8, 16, 32, 64]
        assert sum(item.value for item in mine.values()) == pytest.approx(100)
        for first, item in mine.items():
            last = max(1, 2 * first)
            inside = sum(float(mean[q, q - d]) for q in range(50, 100) for d in range(first, min(last, q + 1)))
            assert item.value == pytest.approx(2 * inside)
            assert len(item.numerators) == 2
        (on_first,) = [item for item in actual if item.heads == heads and item.part]
        assert on_first.value == pytest.approx(100 * float(mean[50:, 0].mean()))
    assert maps.shape == (2, len(groups), MAP_CELLS, MAP_CELLS)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)))
    assert not maps.triu(1).any()
    assert len(draw_maps(maps, groups, "model").axes) == 2 * len(groups) + 1
