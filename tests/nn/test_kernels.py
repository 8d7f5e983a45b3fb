"""Choice of the attention implementation; test_on_fake_cuda.py tests the arguments of each."""

import pytest
import torch

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import kernels
from ropepp_lit.nn.kernels import describe, select_implementation

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Function that mocks packages and a GPU of a compute capability; returns the list of activated implementations."""
    activated = []

    def machine(*, capability, installed, is_grouped=True):
        monkeypatch.setattr(kernels, "_is_installed", lambda module: module in installed)
        monkeypatch.setattr(kernels, "flash_attn_varlen_func", "flash_attn" in installed or None)
        monkeypatch.setattr(kernels, "VARLEN_IS_GROUPED", is_grouped)
        monkeypatch.setattr(kernels, "activate_flash_attention_impl", activated.append)
        monkeypatch.setattr(kernels, "current_flash_attention_impl", lambda: activated[-1] if activated else None)
        monkeypatch.setattr(kernels, "restore_flash_attention_impl", lambda: activated.append(None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of capability {capability}")
        return activated

    return machine


FA3, FA4 = "flash_attn_interface", "flash_attn.cute"


@pytest.mark.parametrize(
    ("capability", "installed", "is_grouped", "chosen", "activated"),
    [
        (8, {"flash_attn"}, True, "varlen", []),
        (8, {"flash_attn"}, False, "flash_attn", []),
        (8, set(), False, "varlen", []),
        (8, {FA3, FA4}, True, "varlen", []),  # for other GPUs
        (9, {FA3, FA4}, True, "fa3", ["FA3"]),
        (9, {"flash_attn"}, True, "varlen", []),
        (10, {FA3, FA4}, True, "fa4", ["FA4"]),
        (12, {FA3, FA4, "flash_attn"}, True, "varlen", []),
    ],
)
def test_default_implementation(machine, capability, installed, is_grouped, chosen, activated):
    seen = machine(capability=capability, installed=installed, is_grouped=is_grouped)
    assert select_implementation(None, CUDA) == chosen
    assert seen == activated


@pytest.mark.parametrize(
    ("name", "device", "capability", "installed", "message"),
    [
        ("fast", CPU, 9, set(), "model.attention: no implementation 'fast'; choose one of sdpa, varlen"),
        ("varlen", CPU, 9, set(), "model.attention: varlen needs a CUDA device"),
        ("flash_attn", CUDA, 9, set(), "model.attention: flash_attn is not installed; pip install"),
        ("fa3", CUDA, 9, set(), "model.attention: fa3 needs the module flash_attn_interface"),
        ("fa3", CUDA, 8, {FA3}, "model.attention: fa3 does not run on GPU of capability 8"),
        ("fa4", CUDA, 8, {FA4}, "model.attention: fa4 does not run on GPU of capability 8"),
    ],
)
def test_refused_implementations(machine, name, device, capability, installed, message):
    seen = machine(capability=capability, installed=installed)
    with pytest.raises(UsageError, match=message):
        select_implementation(name, device)
    assert seen == []


@pytest.mark.parametrize("name", [None, "fa3"])
@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_error_of_a_broken_package(machine, monkeypatch, name, error):
    machine(capability=9, installed={FA3})

    def fail(implementation):
        raise error("undefined symbol:\n  _ZN3c10")

    monkeypatch.setattr(kernels, "activate_flash_attention_impl", fail)
    message = r"model.attention: flash_attn_interface cannot be used \(undefined symbol: _ZN3c10\); choose varlen"
    with pytest.raises(UsageError, match=message):
        select_implementation(name, CUDA)


def test_explicit_implementation(machine):
    seen = machine(capability=9, installed={FA4, "flash_attn"})
    assert [select_implementation(name, CUDA) for name in ("fa4", "flash_attn", "sdpa")] == [
        "fa4",
        "flash_attn",
        "sdpa",
    ]
    assert seen == ["FA4", None]  # what torch activated is left again
    assert select_implementation("sdpa", CPU) == select_implementation(None, CPU) == "sdpa"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "words"),
    [
        ("varlen", CUDA, torch.bfloat16, "varlen (torch.nn.attention.varlen) in bfloat16"),
        ("fa3", CUDA, torch.float16, "fa3 (FlashAttention 3 by torch) in float16"),
        ("fa3", CUDA, torch.float32, "sdpa (scaled_dot_product_attention) in float32"),
        ("sdpa", CPU, torch.bfloat16, "sdpa (scaled_dot_product_attention) in bfloat16"),
    ],
)
def test_description(name, device, dtype, words):
    assert describe(name, device, dtype) == words
