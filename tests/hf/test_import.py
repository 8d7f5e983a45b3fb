"""Import of Hugging Face folders, and rejection of unsupported ones."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from folders import make_folder, make_weights, old_format
from safetensors.torch import load_file, save_file

from ropepp_lit.checkpoint import KEY, load_decoder, read_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.folder import read_folder
from ropepp_lit.hf.rotary import Rotary
from ropepp_lit.nn import RoPEPP, Yarn, YarnByRotations
from ropepp_lit.text.tokenizer import byte_tokenizer

GOLDENS = Path(__file__).parent.parent / "goldens"
CASES = ["rope_theta1e4", "eh_theta1e4", "ec_theta1e4", "ec_theta5e5", "ec_yarn32", "eh_pi8"]


GEOMETRY = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": False}


@pytest.fixture
def folder(tmp_path):
    """A small Hugging Face folder."""
    return write(tmp_path / "llama")


def write(path, layout="model.safetensors"):
    return make_folder(path, layout=layout, weights=make_weights(**GEOMETRY), **GEOMETRY)


def change(folder, file="config.json", **values):
    path = folder / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize("case", CASES)
def test_official_folders(tmp_path, official_folder, case):
    decoder = load_decoder(read_folder(official_folder(case, tmp_path / case))).float()
    io = load_file(GOLDENS / case / "io.safetensors")
    torch.testing.assert_close(decoder(io["input_ids"]), io["logits"], atol=2e-5, rtol=0)


def test_official_folders_without_rope_config(tmp_path, official_folder):
    """The shapes determine the variant; the scaling must be specified."""
    folder = official_folder("eh_pi8", tmp_path / "eh")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_config"]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = read_folder(folder, variant="eh", rotary=Rotary(scaling="linear", factor=8.0))
    decoder = load_decoder(checkpoint).float()
    assert isinstance(decoder.scheme, RoPEPP)
    io = load_file(GOLDENS / "eh_pi8" / "io.safetensors")
    torch.testing.assert_close(decoder(io["input_ids"]), io["logits"], atol=2e-5, rtol=0)
    with pytest.raises(UsageError, match=r"variant: ec was specified, but the shapes of the weights are those of eh"):
        read_folder(folder, variant="ec")
    with pytest.raises(UsageError, match=r"factor: .* does not specify the factor by which linear extends the context"):
        read_folder(folder, rotary=Rotary(scaling="linear"))
    with pytest.raises(UsageError, match=r"original_max_position_embeddings: .* --original_max_position_embeddings N"):
        read_folder(folder, rotary=Rotary(scaling="yarn", factor=4.0))
    yarn = Rotary("yarn", 4.0, 4096, 20_000.0)
    assert isinstance(load_decoder(read_folder(folder, rotary=yarn)).frequencies, Yarn)
    by_rotations = load_decoder(read_folder(folder, rotary=yarn._replace(scaling="yarn_by_rotations"))).frequencies
    assert isinstance(by_rotations, YarnByRotations)
    assert by_rotations.rope_theta == 20_000.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported; it has LayerNorm"),
        ({"model_type": "new"}, r"model_type 'new' is not supported; supported are llama, mistral"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported"),
        ({"sliding_window": 16}, r"sliding_window 16 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types \[.*'sliding_attention'\] is not"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config .* is not supported"),
        ({"attention_dropout": 0.1}, r"attention_dropout 0\.1 is not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported"),
        ({"logit_scale": 0.5, "depth": 3, "rope_interleaved": True, "temperature": 0.6},
         r"rope_interleaved True is not supported; unknown fields: logit_scale 0\.5, depth 3$"),
        ({"logit_scale": 0.5, "depth": 3, "attention_dropout": 0.1, "sliding_window": 16},
         r"to you: ropepp-lit import FOLDER model\.ckpt --ignore \S*attention_dropout\S*,logit_scale,depth$"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, r"rope_type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0,
                              "original_max_position_embeddings": 9}},
         r"mscale 1\.0 is not supported with rope_type yarn"),
        ({"rope_config": {"imag": True, "imag_mode": "imag2"}}, r"rope_config has imag True, .* those of rope"),
        ({"rope_config": {"fourier": True}}, r"rope_config\.fourier is not supported"),
        ({"num_attention_heads": 8, "head_dim": 16}, r"q_proj has 64 .* fits no variant with 8 heads of 16"),
        ({"num_key_value_heads": 1}, r"k_proj.weight has the shape \(32, 64\), but by config.json it must be \(16,"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers is 3, and there is no weight of layer 2"),
        ({"num_hidden_layers": 1}, r"the decoder has no tensor model\.layers\.1\.\S+ \(9 unexpected tensors\)"),
        ({"attention_bias": True}, r"the tensor model\.layers\.0\.self_attn\.q_proj\.bias is missing"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is true, but lm_head\.weight differs from the embedding"),
    ],
)  # fmt: skip
def test_unsupported_fields_are_rejected_by_name(folder, values, message):
    change(folder, **values)
    with pytest.raises(UsageError, match=message):
        read_folder(folder)


def test_unknown_fields_can_be_ignored(folder):
    change(folder, unsloth_version="2026.1")
    read_folder(folder, ignore=("unsloth_version",))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_pickles_are_loaded_with_weights_only(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    again = read_folder(folder)["state_dict"]
    assert all(torch.equal(again[f"decoder.{name}"], value) for name, value in weights.items())
    more = r"stores objects other than weights \(posix\.mkdir\), which are not loaded"
    for dump, reason in (
        (torch.save, more),
        (old_format, more),
        (lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)), "not a PyTorch file|objects"),
    ):
        dump({**weights, "evil": Evil(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
        with pytest.raises(UsageError, match=rf"pytorch_model\.bin: {reason}"):
            read_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_damaged_folders(tmp_path):
    folder = write(tmp_path / "sharded", layout="index of safetensors")
    shards = sorted(folder.glob("model-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-100])
    with pytest.raises(UsageError, match=rf"{shards[1].name}: damaged or not safetensors"):
        read_folder(folder)
    shards[1].unlink()
    with pytest.raises(UsageError, match=rf"{shards[1].name}: missing, but listed in model\.safetensors\.index\.json"):
        read_folder(folder)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(UsageError, match=r"index\.json: it lists \S+, which none of the files has"):
        read_folder(folder)
    (folder / "model.safetensors.index.json").unlink()
    shards[1].unlink()
    with pytest.raises(UsageError, match=r"file 2 of \d of model is missing"):
        read_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json: not JSON"):
        read_folder(folder)


def test_old_buffers_are_dropped(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / "model.safetensors")
    assert len(read_folder(folder)["state_dict"]) == len(weights)


def test_special_tokens_and_tokenizer_settings(folder):
    byte_level = byte_tokenizer().tokenizer
    byte_level.save(str(folder / "tokenizer.json"))
    ours = read_folder(folder)[KEY]
    assert (ours["bos_token_id"], ours["eos_token_id"]) == (0, 1)  # not 1 and 2, transformers' defaults in config.json
    settings = {"bos_token": None, "eos_token": {"content": "<|begin_of_text|>"}, "chat_template": "{{ x }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = read_folder(folder)[KEY]
    assert (ours["bos_token_id"], ours["eos_token_id"], ours["opening"]) == (0, 0, [0])
    assert json.loads(ours["tokenizer_config"]) == settings


@pytest.mark.end_to_end
def test_the_command(run, mistake, tmp_path):
    folder = write(tmp_path / "llama")
    first = run("import", folder, "model.ckpt", cwd=tmp_path).stdout
    assert "model.ckpt: RoPE, base 10000," in first
    assert "Notice:" in first
    assert "has no tokenizer" in first
    assert read_checkpoint(tmp_path / "model.ckpt")[KEY]["origin"] == "llama"
    (tmp_path / "model.ckpt").unlink()  # as if the command was killed between the recipe and the checkpoint
    run("import", folder, "model.ckpt", cwd=tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {}\n")
    out = run("export", "model.ckpt", "hf", "--dtype", "bfloat16", cwd=tmp_path).stdout
    assert "hf is written; loaded by transformers, its logits differ by" in out
    assert "stores no tokenizer, so the folder has none" in out
    assert {value.dtype for value in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    for (subcommand, *arguments), message in (
        (("import", folder, "model.ckpt"), "out: model.ckpt: already exists; name another file"),
        (("import", folder, "mine.ckpt"), "out: mine.yaml: already exists; name another file"),
        (("import", folder, "model.pt"), "out: model.pt: name a file that ends with .ckpt"),
        (("import", tmp_path, "other.ckpt"), "no config.json there; name a folder in Hugging Face's format"),
        (("export", "model.ckpt", "hf"), "hf is not empty; name an empty or a new folder"),
        (("export", "none.ckpt", "hf2"), "none.ckpt: no such checkpoint"),
        (("export", "model.ckpt", "hf2", "--max_shard_size", "big"), "max_shard_size: 'big' is not a size"),
        (
            ("upcycle", "model.ckpt", "ec.ckpt", "--variant", "ec", "--text", "none.txt"),
            "text: the checkpoint stores no",
        ),
        (("generate", "model.ckpt"), "model.ckpt: the checkpoint stores no tokenizer"),
        (("validate", "--ckpt_path", "model.ckpt"), "error:"),
    ):
        assert message in mistake(*arguments, subcommand=subcommand, base=[])
