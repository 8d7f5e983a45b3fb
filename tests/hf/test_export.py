"""Exports in transformers, in a process that cannot import ropepp_lit."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ropepp_lit.checkpoint import KEY, describe_architecture, load_decoder, make_checkpoint, read_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import read_folder
from ropepp_lit.nn import (
    Decoder,
    DecoderConfig,
    Frequencies,
    Linear,
    Llama3,
    PositionScheme,
    RoPE,
    RoPEPP,
    Yarn,
    YarnByRotations,
)
from ropepp_lit.text.tokenizer import byte_tokenizer

pytestmark = pytest.mark.end_to_end


def test_logits_match_the_public_code(answers):
    _, io, results = answers
    for name in ("logits", "eager", "static_halves", "base", "compiled", "saved_again"):
        torch.testing.assert_close(results[name], io["logits"], atol=2e-5, rtol=0, msg=name)


def test_greedy_texts_match_the_public_code(answers):
    _, io, results = answers
    for name in ("dynamic", "static", "none", "padded"):
        assert results[f"generated_{name}"].tolist() == io["gen_sequences"].tolist(), name


def test_positions_beyond_the_training_length(answers, exports):
    case, io, results = answers
    decoder = load_decoder(read_checkpoint(exports / f"{case}.ckpt")).float()
    positions = torch.arange(io["input_ids"].shape[1])[None] + 5000
    torch.testing.assert_close(results["shifted"], decoder(io["input_ids"], positions=positions), atol=2e-5, rtol=0)


def test_gradients_with_and_without_checkpointing(answers):
    _, _, results = answers
    torch.testing.assert_close(results["gradient"], results["plain_gradient"], atol=1e-7, rtol=0)


def test_cache_size_of_eh_is_half_and_of_ec_equal(exports):
    rope, eh, ec = (int(load_file(exports / f"{case}_theta1e4.answer")["cache_bytes"]) for case in ("rope", "eh", "ec"))
    assert (2 * eh, ec) == (rope, rope)


def test_plain_rope_is_exported_as_llama(exports):
    folder = exports / "hf" / "rope_theta1e4"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert not list(folder.glob("*.py"))


def test_modeling_files_are_self_contained_and_support_serving_engines():
    """vLLM does not run here, so the file is checked for the requirements of its transformers backend."""
    import transformers

    from ropepp_lit.hf import modeling_ropepp as modeling

    folder = Path(modeling.__file__).parent
    for name in ("configuration_ropepp.py", "modeling_ropepp.py"):
        tree = ast.parse((folder / name).read_text())
        imported = {
            node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level
        }
        imported |= {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        assert imported <= {"__future__", "math", "typing", "torch", "transformers"}
    tree = ast.parse((folder / "modeling_ropepp.py").read_text())
    (attention,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RopePPAttention")
    (forward,) = (node for node in attention.body if isinstance(node, ast.FunctionDef) and node.name == "forward")
    assert forward.args.kwarg is not None
    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call)]
    calls = [node for node in calls if getattr(node.func, "id", "") == "attention_interface"]
    assert len(calls) == 1
    assert any(keyword.arg is None for keyword in calls[0].keywords)  # kwargs are passed on
    assert modeling.RopePPModel._supports_attention_backend
    assert modeling.RopePPConfig.base_model_tp_plan
    assert issubclass(modeling.RopePPModel, transformers.PreTrainedModel)


def make(scheme=None, frequencies=None, tokenizer=None, **changes):
    geometry = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = DecoderConfig(**{**geometry, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})
    scheme, frequencies = scheme or RoPE(), frequencies or Frequencies()
    torch.manual_seed(0)
    decoder = Decoder(config, scheme, frequencies)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.2)
    return make_checkpoint(
        decoder.state_dict(),
        architecture=describe_architecture(config, scheme, frequencies),
        context_length=512,
        tokenizer=tokenizer,
        bos_token_id=0 if tokenizer else None,
        eos_token_id=1 if tokenizer else None,
    )


ARCHITECTURES = {
    "llama": (make, {}),
    "llama with biases": (make, {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}),
    "qwen2": (make, {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3": (make, {"qk_norm": True, "head_dim": 32}),
    "linear": (make, {"frequencies": Linear(factor=4.0)}),
    "yarn": (make, {"frequencies": Yarn(factor=8.0, original_max_position_embeddings=512, rope_theta=50_000.0)}),
    "llama3": (make, {"frequencies": Llama3(factor=8.0, original_max_position_embeddings=512)}),
    "rope by rotations": (make, {"frequencies": YarnByRotations(factor=8.0, original_max_position_embeddings=512)}),
    "ec": (make, {"scheme": RoPEPP(variant="ec"), "tie_word_embeddings": True, "num_attention_heads": 6}),
    "ec with all": (
        make,
        {
            "scheme": RoPEPP(variant="ec"),
            "qk_norm": True,
            "attention_bias": True,
            "mlp_bias": True,
            "attention_output_bias": True,
            "frequencies": Yarn(factor=8.0, original_max_position_embeddings=64),
        },
    ),
    "eh": (
        make,
        {"scheme": RoPEPP(variant="eh"), "frequencies": Llama3(factor=8.0, original_max_position_embeddings=512)},
    ),
}


@pytest.mark.usefixtures("forked_check")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trips_are_bit_exact(tmp_path, name):
    make_it, changes = ARCHITECTURES[name]
    if name == "ec":
        changes = {**changes, "head_dim": 16}
    checkpoint = make_it(**changes)
    check = name in ("qwen2", "qwen3", "yarn", "rope by rotations", "ec with all")  # the others are golden cases
    difference = export(checkpoint, tmp_path / "hf", dtype=None, max_shard_bytes=30_000, check=check)
    assert not check or difference < 2e-5
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    again = read_folder(tmp_path / "hf")
    assert again[KEY]["architecture"] == checkpoint[KEY]["architecture"]
    assert again["state_dict"].keys() == checkpoint["state_dict"].keys()
    for key, value in checkpoint["state_dict"].items():
        assert torch.equal(again["state_dict"][key], value), key


def test_exported_tokenizer_adds_the_same_bos_as_training(tmp_path):
    from transformers import AutoTokenizer

    byte = byte_tokenizer()
    export(
        make(tokenizer=byte.tokenizer.to_str()),
        tmp_path / "hf",
        dtype=torch.bfloat16,
        max_shard_bytes=10**9,
        check=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "naïve 漢字"
    assert tokenizer(text).input_ids == byte.encode_whole(text)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    again = read_folder(tmp_path / "hf")[KEY]
    assert (again["bos_token_id"], again["eos_token_id"], again["context_length"]) == (0, 1, 512)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


class Other(PositionScheme):
    pass


def test_unsupported_models(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    settings = {"dtype": None, "max_shard_bytes": 10**9, "check": True}
    with pytest.raises(UsageError, match=r"out: .*full is not empty"):
        export(make(), tmp_path / "full", **settings)
    with pytest.raises(
        UsageError, match=r"transformers has no family with attention_bias False, attention_output_bias"
    ):
        export(make(attention_output_bias=True), tmp_path / "out", **settings)
    checkpoint = make()
    checkpoint[KEY]["architecture"]["positions"]["class_path"] = "my.Scheme"
    with pytest.raises(UsageError, match=r"my\.Scheme, which is not part of ropepp-lit"):
        export(checkpoint, tmp_path / "out", **settings)
    # Stock Llama refuses a width that the heads do not divide: nothing is left behind.
    with pytest.raises(UsageError, match=r"out: transformers cannot load the export"):
        export(make(num_attention_heads=3, num_key_value_heads=1, head_dim=32), tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
