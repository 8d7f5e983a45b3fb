"""RoPE parameters of config.json: each is used, or rejected by name."""

import math
import shlex

import pytest

from ropepp_lit.errors import UsageError
from ropepp_lit.hf.rotary import IMPORT, Rotary, read_frequencies, write_frequencies
from ropepp_lit.nn import Frequencies, Linear, Llama3, Yarn, YarnByRotations

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
BOTH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
THETA = {"rope_theta": 5e5}


def read(config, rotary=Rotary()):  # noqa: B008
    config = {"max_position_embeddings": 256, **config}
    return read_frequencies(config, rotary, name="config.json", default_theta=10_000.0)


READ = {
    "nothing": ({}, {}, Frequencies()),
    "base of transformers 4": (THETA, {}, Frequencies(**THETA)),
    "base of transformers 5": ({"rope_parameters": THETA}, {}, Frequencies(**THETA)),
    "both, equal": ({**THETA, "rope_parameters": {**THETA, "rope_type": "default"}}, {}, Frequencies(**THETA)),
    "integer and float": ({"rope_theta": 10000, "rope_parameters": {"rope_theta": 1e4}}, {}, Frequencies()),
    "null beside a number": ({"rope_theta": None, "rope_parameters": THETA}, {}, Frequencies(**THETA)),
    "null, and the caller's": ({"rope_theta": None}, THETA, Frequencies(**THETA)),
    "two, and the caller's": ({"rope_theta": 1, "rope_parameters": {"rope_theta": 2}}, THETA, Frequencies(**THETA)),
    "null scaling": ({**THETA, "rope_scaling": None, "rope_parameters": None}, {}, Frequencies(**THETA)),
    "type of old": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {}, Linear(factor=4.0)),
    "both types": ({"rope_scaling": {**LINEAR, "type": "linear"}}, {}, Linear(factor=4.0)),
    "both fields": (
        {**THETA, "rope_scaling": LINEAR, "rope_parameters": {**LINEAR, **THETA}}, {}, Linear(factor=4.0, **THETA),
    ),
    "neutral settings": (
        {"rope_scaling": {"factor": 1.0, "attention_factor": None, "original_max_position_embeddings": None}},
        {}, Frequencies(),
    ),
    "context of default": ({"rope_parameters": {"rope_type": "default", "original_max_position_embeddings": 256}}, {},
                           Frequencies()),
    "by layer type, equal": (
        {"rope_parameters": {"full_attention": {**LINEAR, **THETA}, "sliding_attention": {**LINEAR, **THETA}}}, {},
        Linear(factor=4.0, **THETA),
    ),
    "by layer type, one used": (
        {"rope_parameters": {"full_attention": THETA, "sliding_attention": {"rope_theta": 1e4}},
         "layer_types": ["full_attention"] * 2}, {}, Frequencies(**THETA),
    ),
    "by layer type, one null": (
        {"rope_parameters": {"full_attention": THETA, "sliding_attention": None}}, {}, Frequencies(**THETA)
    ),
    "yarn": ({"rope_scaling": {**YARN, "beta_fast": 16, "truncate": False}}, {},
             Yarn(factor=4.0, original_max_position_embeddings=64, beta_fast=16, truncate=False)),
    "yarn's context outside": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64}, {},
        Yarn(factor=4.0, original_max_position_embeddings=64),
    ),
    "temperatures of DeepSeek": (
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, {},
        Yarn(factor=4.0, original_max_position_embeddings=64,
             attention_factor=(0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
    ),
    "temperature": ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, {},
                    Yarn(factor=4.0, original_max_position_embeddings=64, attention_factor=1.5)),
    "llama3": ({**THETA, "rope_scaling": {**LLAMA3, **BOTH}}, {},
               Llama3(factor=8.0, original_max_position_embeddings=64, **THETA, **BOTH)),
    "another factor": ({"rope_scaling": YARN}, {"factor": 8.0}, Yarn(factor=8.0, original_max_position_embeddings=64)),
    "the same scaling": ({"rope_scaling": YARN}, {"scaling": "yarn"},
                         Yarn(factor=4.0, original_max_position_embeddings=64)),
    "another scaling": ({"rope_scaling": YARN}, {"scaling": "linear", "factor": 2.0}, Linear(factor=2.0)),
    "no scaling": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"scaling": "default"}, Frequencies()),
    "type from the caller": ({"rope_scaling": {"factor": 4.0}}, {"scaling": "linear"}, Linear(factor=4.0)),
    "public code": ({"rope_config": {"imag": True, "yarn": True}}, {},
                    YarnByRotations(factor=32, original_max_position_embeddings=4096)),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_supported_parameters(case):
    config, options, expected = READ[case]
    actual = read(config, Rotary(**options))
    assert type(actual) is type(expected)
    assert vars(actual) == pytest.approx(vars(expected))
    written = write_frequencies(actual)
    again = read({"rope_parameters": written, "rope_theta": written["rope_theta"]})
    assert vars(again) == pytest.approx(vars(expected))


REFUSED = {
    "null": ({"rope_theta": None}, {}, "rope_theta is null; specify the base: ropepp-lit import .* --rope_theta N"),
    "null inside": ({"rope_parameters": {"rope_theta": None}}, {}, "rope_theta is null"),
    "a text": ({"rope_theta": "10000"}, {}, "rope_theta '10000' is not a number"),
    "two bases": ({**THETA, "rope_parameters": {"rope_theta": 1e4}}, {},
                  r"rope_theta is 500000\.0, but 10000\.0 in rope_parameters; specify one: .* --rope_theta N"),
    "two factors": ({"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 8.0}}, {},
                    r"factor is 8\.0 in rope_parameters and 4\.0 in rope_scaling"),
    "two scalings": ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, {},
                     "rope_type is 'default' in rope_parameters and 'linear' in rope_scaling"),
    "two types": ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, {}, "has type 'linear' and rope_type"),
    "two contexts": ({"rope_scaling": YARN, "original_max_position_embeddings": 32}, {},
                     "original_max_position_embeddings is 32, but 64 in rope_parameters"),
    "no type": ({"rope_scaling": {"factor": 4.0}}, {}, r"rope_scaling has factor 4\.0 but no rope_type; specify the"),
    "no type, null": ({"rope_scaling": {"rope_type": None, "factor": 4.0}}, {}, "no rope_type"),
    "factor of default": ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, {},
                          r"factor 4\.0 is not supported with rope_type default"),
    "factor alone": ({}, {"factor": 8.0}, "factor: the scaling 'default' does not use it; add --scaling with one"),
    "context alone": ({}, {"original_max_position_embeddings": 8}, "original_max_position_embeddings: the scaling"),
    "context of linear": ({"rope_scaling": LINEAR}, {"original_max_position_embeddings": 8}, "the scaling 'lin"),
    "by layer type": ({"rope_parameters": {"full_attention": THETA, "sliding_attention": {"rope_theta": 1e4}}}, {},
                      r"rope_parameters differs by layer type \(full_attention .*; sliding_attention .*\), which"),
    "layer types and all": ({"rope_parameters": {"full_attention": THETA, "factor": 2.0}}, {}, "mixes settings by lay"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, "'dynamic' is not supported; .*--scaling"),
    "longrope": ({"rope_scaling": {"type": "longrope"}}, {}, "'longrope' is not supported; it has a factor for each"),
    "unknown": ({"rope_scaling": {"type": "xpos"}}, {}, "'xpos' is not supported; supported are default, linear, yarn"),
    "one temperature": ({"rope_scaling": {**YARN, "mscale": 1.0}}, {}, r"mscale 1\.0 is not supported with rope_ty"),
    "yarn that was trained": ({"rope_scaling": {**YARN, "finetuned": True}}, {}, "finetuned True is not supported"),
    "a part of the head": ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, {}, "partial_rotary"),
    "factor as text": ({"rope_scaling": {**LINEAR, "factor": "4"}}, {}, "factor '4' is not a number"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, {}, "factor: config.json does not specify .*--factor N"),
    "no context": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}, "original_max_position_embeddings: con"),
    "neither": ({"rope_scaling": {"rope_type": "yarn"}}, {}, "N --original_max_position_embeddings N"),
    "a factor and no context": ({}, {"scaling": "yarn", "factor": 8.0}, "--scaling yarn --factor 8.0 --original_max"),
    "no object": ({"rope_scaling": "linear"}, {}, "rope_scaling 'linear' is not a JSON object"),
    "public code and more": ({"rope_config": {"factor": 8}, "rope_scaling": YARN}, {}, "rope_config has linear, but "),
    "public code's other": ({"rope_config": {"fourier": True}}, {}, r"rope_config\.fourier is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_parameters(case):
    config, options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        read(config, Rotary(**options))


def test_commands_in_error_messages_work():
    recommended = 0
    for config, options, _ in REFUSED.values():
        with pytest.raises(UsageError) as refusal:
            read(config, Rotary(**options))
        _, actual, arguments = str(refusal.value).partition(IMPORT)
        if actual:
            words = shlex.split(arguments.partition("(")[0])
            named = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
            numbers = {key: 8.0 if value == "N" else float(value) for key, value in named.items() if key != "scaling"}
            read(config, Rotary(**{**named, **numbers}))
            recommended += 1
    assert recommended > 5
