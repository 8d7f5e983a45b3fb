"""The decoder against logits, losses, gradients and greedy texts of the public RoPE++ code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, Linear, RoPE, RoPEPP, YarnByRotations
from ropepp_lit.nn.generation import generate

GOLDENS = Path(__file__).parent.parent / "goldens"
CASES = ["rope_theta1e4", "eh_theta1e4", "ec_theta1e4", "ec_theta5e5", "ec_yarn32", "eh_pi8"]


def load_golden(case):
    folder = GOLDENS / case
    settings = json.loads((folder / "case.json").read_text())
    values, rope = settings["config"], settings["rope_config"]
    theta = values["rope_theta"]
    if rope.get("yarn"):
        frequencies = YarnByRotations(rope_theta=theta, factor=rope["factor"], original_max_position_embeddings=4096)
    elif rope.get("factor"):
        frequencies = Linear(rope_theta=theta, factor=rope["factor"])
    else:
        frequencies = Frequencies(rope_theta=theta)
    scheme = RoPEPP(variant={"imag1": "eh", "imag2": "ec"}[rope["imag_mode"]]) if rope.get("imag") else RoPE()
    config = DecoderConfig(**{name: values[name] for name in DecoderConfig.__dataclass_fields__ if name in values})
    decoder = Decoder(config, scheme, frequencies)
    decoder.load_state_dict({name: value.float() for name, value in load_file(folder / settings["weights"]).items()})
    return decoder, load_file(folder / "io.safetensors")


@pytest.fixture(params=CASES)
def golden(request):
    return load_golden(request.param)


def test_logits(golden):
    decoder, io = golden
    torch.testing.assert_close(decoder(io["input_ids"]), io["logits"], atol=2e-5, rtol=0)


def test_loss_and_gradients(golden):
    decoder, io = golden
    labels = torch.nn.functional.pad(io["labels_shifted"], (0, 1), value=-100)
    loss = decoder.loss(io["input_ids"], labels)
    torch.testing.assert_close(loss[None], io["loss"], atol=1e-5, rtol=0)
    loss.backward()
    gradients = {name.removeprefix("grad."): value for name, value in io.items() if name.startswith("grad.")}
    assert len(gradients) == 3
    for name, expected in gradients.items():
        torch.testing.assert_close(decoder.get_parameter(name).grad, expected, atol=2e-6, rtol=0)


def test_inverse_frequencies(golden):
    decoder, io = golden
    actual = decoder.frequencies.inverse_frequencies(decoder.config.head_dim)
    torch.testing.assert_close(actual, io["inv_freq"], atol=0, rtol=2e-7)
    factor = torch.full_like(io["rope_scaling_vec"], decoder.frequencies.attention_factor)
    torch.testing.assert_close(factor, io["rope_scaling_vec"])


def test_greedy_text_with_cache(golden):
    decoder, io = golden
    prompt, expected = io["gen_prompt"], io["gen_sequences"]
    made = list(generate(decoder, prompt, max_new_tokens=expected.shape[1] - prompt.shape[1]))
    assert torch.cat([prompt, torch.stack(made, dim=1)], dim=1).tolist() == expected.tolist()


def test_greedy_text_without_cache(golden):
    decoder, io = golden
    sequence, expected = io["gen_prompt"], io["gen_sequences"]
    with torch.no_grad():
        while sequence.shape[1] < expected.shape[1]:
            sequence = torch.cat([sequence, decoder(sequence)[:, -1:].argmax(-1)], dim=1)
    assert sequence.tolist() == expected.tolist()
