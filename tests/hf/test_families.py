"""Model families: logits match transformers, and unsupported families are rejected by name."""

import json

import pytest
import torch
import transformers
from folders import make_folder

from ropepp_lit.checkpoint import KEY, load_decoder, read_checkpoint, write_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.export import export
from ropepp_lit.hf.families import UNSUPPORTED
from ropepp_lit.hf.folder import read_folder

GEOMETRY = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64}
MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625}

READ = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}}),
    "llama, yarn": ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}),
    "llama, DeepSeek's yarn": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "llama, llama3": ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window as long as the context": ("mistral", {"sliding_window": 256}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows beyond its layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "phi3": ("phi3", {}),
    "phi3, tied": ("phi3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "granite": ("granite", {**MULTIPLIERS, "logits_scaling": 8.0}),
    "granite, tied, odd": ("granite", {**MULTIPLIERS, "logits_scaling": 6.0, "tie_word_embeddings": True}),
    "granite without multipliers": ("granite", {"attention_multiplier": 0.25, "attention_bias": True}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
    "smollm3 with its own list": ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
}


def write(folder, family, changes):
    if "rope_parameters" in changes:  # names of transformers 4, which transformers 5 supports too
        rotary = dict(changes["rope_parameters"])
        changes = {**changes, "rope_theta": rotary.pop("rope_theta"), "rope_scaling": rotary}
        del changes["rope_parameters"]
    config = transformers.AutoConfig.for_model(family, **{**GEOMETRY, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("case", READ)
@torch.no_grad()
def test_logits_match_transformers(tmp_path, case):
    family, changes = READ[case]
    model = write(tmp_path / "hf", family, changes)
    write_checkpoint(tmp_path / "model.ckpt", read_folder(tmp_path / "hf"))
    checkpoint = read_checkpoint(tmp_path / "model.ckpt")
    input_ids = torch.randint(260, (2, 80))
    expected = model(input_ids).logits
    tolerance = 2e-5 * expected.abs().max()
    assert (load_decoder(checkpoint)(input_ids) - expected).abs().max() <= tolerance
    export(checkpoint, tmp_path / "out", dtype=None, max_shard_bytes=10**9, check=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert (again(input_ids).logits - expected).abs().max() <= tolerance


REFUSED = {
    "mistral's windows": ("mistral", {"sliding_window": 16}, r"sliding_window 16 is not supported \(attention is the"),
    "qwen's windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
                       "use_sliding_window True is not supported; .*sliding_window 16 is not supported"),
    "longrope": ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
    "phi's yarn": ("phi3", {"rope_scaling": {**YARN}}, "rope_type 'yarn' is not supported: transformers reads it"),
    "a part of each head": ("phi3", {"partial_rotary_factor": 0.75}, r"partial_rotary_factor 0\.75 is not supported"),
    "gemma": ("gemma", {}, "model_type 'gemma' is not supported; it has GeGLU"),
    "olmo2": ("olmo2", {}, "model_type 'olmo2' is not supported; it normalizes"),
    "experts": ("mixtral", {}, "model_type 'mixtral' is not supported; it has mixture-of-experts layers"),
    "unknown": ("other", {}, "model_type 'other' is not supported; supported are llama"),
    "none": (None, {}, "model_type None is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_families_and_fields(tmp_path, case):
    family, changes, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        read_folder(make_folder(tmp_path / "hf", model_type=family, **changes))


def test_default_window_of_mistral(tmp_path):
    folder = make_folder(tmp_path / "hf", model_type="mistral", max_position_embeddings=32_768)
    with pytest.raises(UsageError, match=r"sliding_window 4096 is not supported .* --ignore sliding_window"):
        read_folder(folder)
    assert read_folder(folder, ignore=("sliding_window",))[KEY]["context_length"] == 4096


@pytest.mark.skipif(transformers.__version__ < "5", reason="some families came with transformers 5")
def test_families_exist_in_transformers(tmp_path):
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    assert set(UNSUPPORTED) <= set(known)


HARMLESS = {
    "max_length": 20, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "num_beams": 4,
    "repetition_penalty": 1.1, "length_penalty": 1.0, "typical_p": 1.0, "diversity_penalty": 0.5, "max_new_tokens": 9,
    "no_repeat_ngram_size": 3, "num_return_sequences": 1, "suppress_tokens": [1], "bad_words_ids": [[1]],
    "torch_dtype": "bfloat16", "use_cache": True, "_name_or_path": "x/y", "_attn_implementation_autoset": True,
    "pretraining_tp": 1, "tokenizer_class": "X", "id2label": {"0": "A"}, "chunk_size_feed_forward": 0,
    "pruned_heads": {}, "is_encoder_decoder": False, "tie_encoder_decoder": False, "torchscript": False,
}  # fmt: skip


def test_generation_fields_are_ignored(tmp_path):
    folder = make_folder(tmp_path / "hf", **HARMLESS)
    read_folder(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["temperature"]
    for name in ("hidden_size", "temperature"):
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(UsageError, match=f"ignore: .*{name}"):
            read_folder(folder, ignore=(name,))


def test_all_fields_of_transformers_4_are_supported(tmp_path):
    """All fields of a configuration's to_dict, which transformers 4 saved completely."""
    values = transformers.LlamaConfig(**GEOMETRY).to_dict()
    folder = make_folder(tmp_path / "hf")
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **own, "rope_parameters": None}))
    read_folder(folder)


def test_a_context_length_beyond_the_scaling_is_preserved(tmp_path, capsys):
    """Llama 3.1 has 8 × 8,192 tokens by its scaling, but 131,072 in max_position_embeddings."""
    from ropepp_lit.cli import main

    scaling = {**LLAMA3, "original_max_position_embeddings": 8192}
    del scaling["rope_theta"]
    folder = make_folder(tmp_path / "hf", rope_scaling=scaling, max_position_embeddings=131_072)
    main(["import", str(folder), str(tmp_path / "model.ckpt")])
    out = capsys.readouterr().out
    assert "context length 131,072 tokens" in out
    assert (
        "Notice: the model states 131,072 tokens, more than factor × original_max_position_embeddings (65,536)" in out
    )
    assert read_checkpoint(tmp_path / "model.ckpt")[KEY]["context_length"] == 131_072
