"""`plan`: the arithmetic against plain counts, and what it says of recipes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ropepp_lit.cli import main
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import ALiBi, Decoder, DecoderConfig, FoPE, Frequencies, NoPE, PartialRoPE, RoPE, RoPEPP
from ropepp_lit.train.costs import cache_bytes_per_token, memory_of_step, peak_flops, training_flops_per_token
from ropepp_lit.train.plan import plan

GEOMETRY = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
CONFIG = DecoderConfig(**GEOMETRY, num_attention_heads=4, num_key_value_heads=2)


SCHEMES = [RoPE(), RoPEPP(variant="eh"), RoPEPP(variant="ec"), PartialRoPE(), ALiBi(), NoPE()]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_flops_are_those_that_torch_counts(scheme):
    """Torch counts attention as if it were not causal, so with twice the scores."""
    decoder = Decoder(CONFIG, scheme, Frequencies())
    tokens = torch.randint(500, (1, 129))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        decoder.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    layout = decoder.head_layout
    scores = 12 * 3 * layout.num_attention_heads * (16 + layout.extra_dims) * 128 / 2
    expected = training_flops_per_token(CONFIG, layout, 128) + scores
    assert counter.get_total_flops() / 128 == pytest.approx(expected, rel=1e-9)


def test_cache_is_that_which_is_allocated():
    for scheme in (*SCHEMES, FoPE()):
        decoder = Decoder(CONFIG, scheme, Frequencies())
        cache = decoder.allocate_cache(batch_size=1, max_tokens=10)
        assert cache.nbytes == 10 * cache_bytes_per_token(CONFIG, decoder.head_layout, itemsize=4)


def test_levers_and_devices_lower_the_estimate():
    layout = Decoder(CONFIG, RoPEPP(variant="ec"), Frequencies()).head_layout
    settings = {"num_parameters": 200_000, "rows": 2, "context_length": 4096}
    plain = memory_of_step(CONFIG, layout, **settings)
    for changes in (
        {"activation_checkpointing": 1}, {"activation_checkpointing": 2}, {"mlp_chunk_tokens": 512}, {"itemsize": 2},
        {"activation_checkpointing": 1, "mlp_chunk_tokens": 512}, {"context_parallel_size": 2},
    ):  # fmt: skip
        assert memory_of_step(CONFIG, layout, **settings, **changes).activations < plain.activations
    sharded = memory_of_step(CONFIG, layout, **settings, shards=8)
    assert sharded.optimizer == plain.optimizer / 8
    assert sharded.gradients == plain.gradients / 8
    assert memory_of_step(CONFIG, layout, **settings, shards=8, accumulates=True).gradients == plain.gradients


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Abacus") is None


def options(texts, tmp_path, *more):
    geometry = [f"--model.decoder.{name}={value}" for name, value in GEOMETRY.items()]
    data = ["--data.source", str(texts), "--data.tokenizer", "bytes", "--data.cache_dir", str(tmp_path)]
    return [*geometry, "--model.decoder.num_attention_heads=4", *data, "--trainer.max_steps", "10", *more]


def test_a_plan_shows_the_first_batch_where_data_are_prepared(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan(options(texts, tmp_path, "--device", "A100", "--utilization", "0.5", "--data.context_length", "64"))
    first = capsys.readouterr().out
    assert "The data are not here, or not prepared yet." in first
    main(["fit", *options(texts, tmp_path, "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
                          "--data.context_length", "64", "--trainer.limit_val_batches", "0")])  # fmt: skip
    capsys.readouterr()
    plan(options(texts, tmp_path, "--data.context_length", "64"))
    second = capsys.readouterr().out
    assert "first batch: (8, 64)" in second
    assert "word" in second


def test_a_plan_shows_the_recipes_own_scheme(texts, tmp_path, capsys):
    """Two bytes, three layers, keys and values of four heads of 16, to which ALiBi adds 8."""
    for scheme, size, frequencies in (("ALiBi", 2 * 2 * 3 * 4 * 24, ""), ("PartialRoPE", 2 * 2 * 3 * 4 * 16, ", base")):
        plan([*options(texts, tmp_path), "--model.positions", scheme])
        printed = capsys.readouterr().out
        row = next(line for line in printed.splitlines() if line.startswith(f"| {scheme}"))
        assert f"{size:,} bytes" in row
        assert f"context           512 tokens{frequencies}" in printed
        assert ("base" in printed) == bool(frequencies)


def test_what_would_fit(texts, tmp_path, capsys):
    big = ["--model.decoder.size", "1.5b", "--data.context_length", "65536", "--model.decoder.hidden_size", "2048"]
    plan([*options(texts, tmp_path), *big, "--device_memory", "40GiB"])
    assert "It does not fit. This would, with" in capsys.readouterr().out
    plan([*options(texts, tmp_path), *big, "--device_memory", "1GiB"])
    assert "would not with every lever" in capsys.readouterr().out


def test_what_a_plan_starts_from(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = options(texts, tmp_path, "--data.context_length", "64", "--trainer.accelerator", "cpu")
    main(["fit", *common, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"])
    last, longer = "checkpoints/last.ckpt", ["--data.context_length", "128"]
    capsys.readouterr()
    for more, expected in (
        (["--model.init_from", last, *longer], f"Starting from the weights of {last}: data.context_length 64 → 128"),
        (["--model.init_from", "none.ckpt"], "Not checked: model.init_from none.ckpt does not exist yet"),
        (["--ckpt_path", last], f"Continuing from {last} at step 1 of 10: 9 steps are left"),
        (["--ckpt_path", "auto"], "Continuing from checkpoints/step=1.ckpt at step 1 of 10: 9 steps are left"),
        (["--ckpt_path", "none.ckpt"], "Not checked: ckpt_path none.ckpt does not exist yet"),
    ):
        plan([*common, *more])
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "Abacus"], r"device: 'Abacus' is not known; choose of B200"),
        (["--utilization", "2"], r"utilization: 2\.0 must be above 0"),
        (["--device_memory", "much"], r"device_memory: 'much' is no size"),
        (["--trainer.max_steps", "-1"], r"trainer\.max_steps: give the number"),
        (["--model.decoder.hidden_size", "-5"], r"model\.decoder\.hidden_size: -5 must be above 0"),
        (["--trainer.devices", "3", "--trainer.strategy", "FSDP2Strategy",
          "--trainer.strategy.context_parallel_size", "2"], r"2 must divide the 3 devices"),
    ],
)  # fmt: skip
def test_wrong_recipes(texts, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        plan(options(texts, tmp_path, *more))
