"""Preparation of a decoder for training; checks that require multiple processes are in `on_ranks.py`."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPEPP
from ropepp_lit.train.build import build_decoder
from ropepp_lit.train.fsdp import FSDP2Strategy

CHECKS = ["first_weights", "gradients", "dtypes", "shards", "muon", "ranks_and_meshes", "generation", "loss_averages"]


def make():
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Decoder(config, RoPEPP(), Frequencies())


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Run checks on a number of ranks, once; returns the failures by check and rank."""
    done = {}

    def on_ranks(ranks, checks):
        if ranks not in done:
            folder = tmp_path_factory.mktemp("ranks")
            command = [sys.executable, Path(__file__).parent / "on_ranks.py", folder, str(ranks), *checks]
            subprocess.run(command, check=True, timeout=300)
            done[ranks] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
        return done[ranks]

    return on_ranks


@pytest.mark.end_to_end
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(on_ranks, check):
    for failures in on_ranks(2, CHECKS):
        assert not failures[check], failures[check]


@pytest.mark.end_to_end
@pytest.mark.slow
def test_muon_on_three_ranks(on_ranks):
    for failures in on_ranks(3, ["muon"]):
        assert not failures["muon"], failures["muon"]


@pytest.mark.end_to_end
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_on_four_ranks(on_ranks, check):
    for failures in on_ranks(4, CHECKS):
        assert not failures[check], failures[check]


class _NoRandomNumbers(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        assert not is_random or arguments[0].is_meta, function
        return function(*arguments, **(keywords or {}))


def test_weights_loaded_from_a_checkpoint_are_not_initialized(tmp_path):
    """Nor are they read from `init_from`, which need not exist any more."""
    with _NoRandomNumbers():
        decoder = build_decoder(
            make, device=torch.device("cpu"), init_from=str(tmp_path / "gone.ckpt"), loads_checkpoint=True
        )
    weights = make().state_dict()
    assert {name: value.shape for name, value in decoder.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert all(parameter.device.type == "cpu" for parameter in decoder.parameters())
    decoder.load_state_dict(weights)
    with pytest.raises(AssertionError), _NoRandomNumbers():
        build_decoder(make, device=torch.device("cpu"))


def test_blocks_are_compiled_by_default_on_cuda_only():
    for device, settings, expected in (
        ("cuda", {}, True),
        ("cuda", {"compile": False}, False),
        ("cuda", {"activation_checkpointing": 1, "offload_activations": True}, False),
        ("cpu", {}, False),
        ("cpu", {"compile": True}, True),
    ):
        decoder = build_decoder(make, device=torch.device(device), **settings)
        is_compiled = {block._compiled_call_impl is not None for block in decoder.model.layers}
        assert is_compiled == {expected}, (device, settings)


def trainer(strategy, **settings):
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, **settings}
    return pl.Trainer(strategy=strategy, **settings)


@pytest.mark.parametrize("strategy", [lambda: "fsdp2", FSDP2Strategy], ids=["name", "object"])
def test_fsdp2_casts_parameters_without_autocast(strategy):
    made = trainer(strategy(), precision="bf16-mixed")
    assert made.precision == "bf16-mixed"
    assert not isinstance(made.precision_plugin, MixedPrecision)
    with made.precision_plugin.forward_context():
        assert not torch.is_autocast_enabled("cpu")
    assert trainer(strategy(), precision="32-true").precision == "32-true"


def test_fsdp2_refuses_a_precision_that_scales_gradients(mistake):
    expected = "trainer.precision: 16-mixed does not work with fsdp2; use bf16-mixed"
    strategy = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.replicate_size", 1]
    assert expected in mistake(*strategy, "--trainer.precision", "16-mixed")
    with pytest.raises(UsageError, match=expected):  # like Lightning for the name fsdp2 on a GPU
        FSDP2Strategy().precision_plugin = MixedPrecision("16-mixed", "cpu")


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_ddp_stores_each_gradient_once(strategy):
    made = trainer(strategy, devices=2).strategy
    assert isinstance(made, DDPStrategy)
    assert made._ddp_kwargs["gradient_as_bucket_view"]
