"""`plan`: FLOPs, memory and devices, and its output for recipes."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ropepp_lit.cli import main
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import ALiBi, Decoder, DecoderConfig, FoPE, Frequencies, NoPE, PartialRoPE, PoPE, RoPE, RoPEPP
from ropepp_lit.train.costs import cache_bytes_per_token, training_flops_per_token
from ropepp_lit.train.devices import DEVICES, find_device, peak_flops
from ropepp_lit.train.memory import StepMemory
from ropepp_lit.train.plan import plan
from ropepp_lit.train.step_setup import Setup

GEOMETRY = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
CONFIG = DecoderConfig(**GEOMETRY, num_attention_heads=4, num_key_value_heads=2)


SCHEMES = [RoPE(), RoPEPP(variant="eh"), RoPEPP(variant="ec"), PartialRoPE(), ALiBi(), NoPE(), PoPE()]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_flops_equal_torchs_counter(scheme):
    """Torch does not account for causality, so it counts twice the scores."""
    decoder = Decoder(CONFIG, scheme, Frequencies())
    tokens = torch.randint(500, (1, 129))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        decoder.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    layout = decoder.head_layout
    scores = 12 * 3 * layout.num_attention_heads * (16 + layout.extra_dims) * 128 / 2
    expected = training_flops_per_token(CONFIG, layout, 128) + scores
    assert counter.get_total_flops() / 128 == pytest.approx(expected, rel=1e-9)


def test_cache_size_equals_the_allocated_bytes():
    for scheme in (*SCHEMES, FoPE()):
        decoder = Decoder(CONFIG, scheme, Frequencies())
        cache = decoder.allocate_cache(batch_size=1, max_tokens=10)
        assert cache.nbytes == 10 * cache_bytes_per_token(CONFIG, decoder.head_layout, itemsize=4)


def test_memory_options_and_devices_lower_the_estimate():
    layout = Decoder(CONFIG, RoPEPP(variant="ec"), Frequencies()).head_layout

    def parts(**changes):
        setup = Setup(**{"rows": 2, "context_length": 4096, **changes})
        return StepMemory(CONFIG, layout, setup, num_parameters=200_000).peak().parts

    plain = parts()
    for changes in (
        {"activation_checkpointing": 1}, {"activation_checkpointing": 2}, {"mlp_chunk_tokens": 512},
        {"activation_checkpointing": "attention"}, {"precision": "bf16-true"}, {"rows": 1},
        {"activation_checkpointing": 1, "mlp_chunk_tokens": 512},
        {"strategy": "fsdp2", "devices": 8, "context_parallel_size": 2},
    ):  # fmt: skip
        assert parts(**changes)["activations"] < plain["activations"], changes
    sharded = {"strategy": "fsdp2", "devices": 8}
    assert parts(**sharded)["optimizer"] == plain["optimizer"] / 8
    accumulated = {**sharded, "accumulate_grad_batches": 2}
    unreduced = parts(**accumulated, reduce_each_micro_batch=False)["gradients"]
    assert unreduced - parts(**accumulated)["gradients"] == pytest.approx(4 * 200_000 * 7 / 8)


# Names returned by torch.cuda.get_device_name, peak in 10¹² operations per second, memory in GiB.
NAMES = {
    "NVIDIA H100 80GB HBM3": (989, 80),
    "NVIDIA H100 PCIe": (756, 80),
    "NVIDIA H100 NVL": (835, 94),
    "NVIDIA H200": (989, 141),
    "NVIDIA H200 NVL": (835, 141),
    "NVIDIA GH200 480GB": (989, 96),
    "NVIDIA B200": (2250, 180),
    "NVIDIA GB200": (2500, 186),
    "NVIDIA A100-SXM4-80GB": (312, 80),
    "NVIDIA A100-SXM4-40GB": (312, 40),
    "NVIDIA A100-PCIE-40GB": (312, 40),
    "NVIDIA A100 80GB PCIe": (312, 80),
    "NVIDIA A10": (125, 24),
    "NVIDIA A10G": (70, 24),
    "NVIDIA L4": (121, 24),
    "NVIDIA L40": (181, 48),
    "NVIDIA L40S": (362, 48),
    "NVIDIA RTX A6000": (155, 48),
    "NVIDIA GeForce RTX 4090": (165, 24),
    "NVIDIA GeForce RTX 3090": (71, 24),
    "AMD Instinct MI300X": (1307, 192),
}
UNKNOWN = [
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A1000",
    "NVIDIA RTX 4000 Ada Generation",
    "Tesla V100-SXM2-32GB",
    "Abacus",
    "",
]


def test_devices_by_names_that_torch_reports():
    devices = {name: find_device(name) for name in NAMES}
    assert devices == NAMES
    assert all(peak_flops(name) is None for name in UNKNOWN)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert {name: find_device(name) for name in DEVICES} == DEVICES


def options(texts, tmp_path, *more):
    geometry = [f"--model.decoder.{name}={value}" for name, value in GEOMETRY.items()]
    data = ["--data.source", str(texts), "--data.tokenizer", "bytes", "--data.cache_dir", str(tmp_path)]
    return [*geometry, "--model.decoder.num_attention_heads=4", *data, "--trainer.max_steps", "10", *more]


def test_a_plan_shows_the_first_batch_of_prepared_data(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan(options(texts, tmp_path, "--device", "A100", "--utilization", "0.5", "--data.context_length", "64"))
    first = capsys.readouterr().out
    assert "The data are not on this machine, or not prepared yet." in first
    main(["fit", *options(texts, tmp_path, "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
                          "--data.context_length", "64", "--trainer.limit_val_batches", "0")])  # fmt: skip
    capsys.readouterr()
    plan(options(texts, tmp_path, "--data.context_length", "64"))
    second = capsys.readouterr().out
    assert "first batch: (8, 64)" in second
    assert re.search(r"\ncheckpoint: [\d.]+ MiB of weights and optimizer state; 2 are kept, and one more while", second)
    assert "word" in second


def test_a_plan_shows_the_scheme_of_the_recipe(texts, tmp_path, capsys):
    """Two bytes, three layers, keys and values of four heads of 16, to which ALiBi adds 8."""
    for scheme, size, frequencies in (("ALiBi", 2 * 2 * 3 * 4 * 24, ""), ("PartialRoPE", 2 * 2 * 3 * 4 * 16, ", base")):
        plan([*options(texts, tmp_path), "--model.positions", scheme])
        printed = capsys.readouterr().out
        row = next(line for line in printed.splitlines() if line.startswith(f"| {scheme}"))
        assert f"{size:,} bytes" in row
        assert f"context           512 tokens{frequencies}" in printed
        assert ("base" in printed) == bool(frequencies)


def test_advice_on_memory(texts, tmp_path, capsys):
    big = ["--model.decoder.size", "1.5b", "--data.context_length", "65536", "--model.decoder.hidden_size", "2048"]
    plan([*options(texts, tmp_path), *big, "--device_memory", "40GiB"])
    assert "It does not fit. This would, with" in capsys.readouterr().out
    plan([*options(texts, tmp_path), *big, "--device", "L4"])
    assert "of 24 GiB" in capsys.readouterr().out
    plan([*options(texts, tmp_path), *big, "--device_memory", "1GiB"])
    assert "would not with all memory options" in capsys.readouterr().out


def test_a_plan_reports_the_initial_checkpoint(texts, tmp_path, capsys, monkeypatch):
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
        (["--device", "Abacus"], r"device: 'Abacus' is not known; choose one of GB200"),
        (["--trainer.precision", "transformer-engine"], r"trainer\.precision: the memory of transformer-engine is not"),
        (["--simulate", "yes"], r"simulate: 'yes' must be true or false"),
        (["--trainer.devices", "2", "--trainer.strategy", "deepspeed"], r"strategy: the memory of deepspeed is"),
        (["--utilization", "2"], r"utilization: 2\.0 must be above 0"),
        (["--device_memory", "much"], r"device_memory: 'much' is not a size"),
        (["--trainer.max_steps", "-1"], r"trainer\.max_steps: give the number"),
        (["--model.decoder.hidden_size", "-5"], r"model\.decoder\.hidden_size: -5 must be above 0"),
        (["--trainer.devices", "3", "--trainer.strategy", "FSDP2Strategy",
          "--trainer.strategy.context_parallel_size", "2"], r"2 must divide the 3 devices"),
    ],
)  # fmt: skip
def test_invalid_recipes(texts, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        plan(options(texts, tmp_path, *more))
