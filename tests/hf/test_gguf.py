"""GGUF files, read by the package gguf and, if its program is available, run by llama.cpp."""

import json
import os
import re
import subprocess

import others
import pytest
import torch
from small_checkpoints import BYTES, DIGITS, PLAIN, YARN, assign, changed, make, without
from tokenizers import pre_tokenizers

from ropepp_lit.checkpoint import KEY, load_decoder, write_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.export_gguf import export_gguf
from ropepp_lit.hf.folder import read_folder, weights_of
from ropepp_lit.nn import (
    Frequencies,
    Linear,
    Llama3,
    Yarn,
    YarnByRotations,
)
from ropepp_lit.nn.generation import generate
from ropepp_lit.text.tokenizer import TextTokenizer, train_tokenizer

gguf = pytest.importorskip("gguf")


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(checkpoint, folder, dtype=None):
    """Export a checkpoint; return the result, the metadata, and the tensors in float32 by name."""
    written = export_gguf(checkpoint, folder / "model.gguf", dtype=dtype)
    reader = gguf.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    values = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        values[tensor.name] = value, tensor.tensor_type.name
    return written, fields, values


def gguf_name(name):
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def halves(value, heads):
    """Reverse the permutation of rows from halves to adjacent pairs."""
    size = value.shape[0] // heads
    order = [head * size + row for head in range(heads) for row in (*range(0, size, 2), *range(1, size, 2))]
    return value[order]


MODELS = {
    "llama": ({}, "llama", {}),
    "wide heads": ({"head_dim": 32}, "llama", {"attention.key_length": 32, "rope.dimension_count": 32}),
    "tied": ({"tie_word_embeddings": True, "vocab_size": 300}, "llama", {}),
    "biases": ({"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}, "llama", {}),
    "biases of Qwen 2": ({"attention_bias": True}, "llama", {}),
    "norms of Qwen 3": ({"qk_norm": True, "head_dim": 32}, "qwen3", {"attention.value_length": 32}),
    "linear": (
        {"frequencies": Linear(factor=4.0)},
        "llama",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "base": ({"frequencies": Frequencies(rope_theta=5e5)}, "llama", {"rope.freq_base": 5e5}),
    "yarn": (
        {"frequencies": Yarn(**YARN)},
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64},
    ),
    "yarn, other temperature": (
        {"frequencies": Yarn(**YARN, attention_factor=1.0), "qk_norm": True},
        "qwen3",
        {"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 1 / 1.2079441541679836},
    ),
    "yarn, other ramp": (
        {"frequencies": Yarn(**YARN, beta_fast=16.0)},
        "llama",
        {"rope.scaling.attn_factor": 1.2079441541679836},
    ),
    "yarn by rotations": (
        {"frequencies": YarnByRotations(**YARN)},
        "llama",
        {"rope.scaling.attn_factor": 1.2079441541679836},
    ),
    "llama3": ({"frequencies": Llama3(rope_theta=1e4, **YARN)}, "llama", {}),
}
"""Changes of :func:`make`, the architecture in GGUF, and metadata of it."""


@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path, name):
    changes, architecture, expected = MODELS[name]
    checkpoint = make(**changes)
    written, fields, tensors = write(checkpoint, tmp_path)
    config = load_decoder(checkpoint).config
    assert (written.architecture, fields["general.architecture"]) == (architecture, architecture)
    expected = {
        "context_length": 512,
        "vocab_size": config.vocab_size,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 2e-5,
        "rope.freq_base": 1e4,
        **expected,
    }
    for key, value in expected.items():
        assert fields[f"{architecture}.{key}"] == (pytest.approx(value) if isinstance(value, float) else value), key
    if not any(key.startswith("rope.scaling") for key in expected):
        assert not any(".rope.scaling." in key for key in fields)
    frequencies = load_decoder(checkpoint).frequencies
    has_factors = name in ("yarn, other ramp", "yarn by rotations", "llama3")
    assert ("rope_freqs.weight" in tensors) == has_factors
    if has_factors:
        factors, kind = tensors.pop("rope_freqs.weight")
        plain = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        stretched = frequencies.inverse_frequencies(16, dtype=torch.float64)
        torch.testing.assert_close(plain / factors.double(), stretched, rtol=1e-6, atol=0)
        assert kind == "F32"
        assert 1 < factors[-1] <= 8
    weights = weights_of(checkpoint)
    assert ("lm_head.weight" in weights) != config.tie_word_embeddings
    assert tensors.keys() == {gguf_name(key) for key in weights}
    for key, value in weights.items():
        actual, kind = tensors[gguf_name(key)]
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            assert not torch.equal(actual, value)
            actual = halves(actual, 4 if "q_proj" in key else 2)
        assert torch.equal(actual, value), key
        assert kind == "F32"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("stored", "option", "kind", "file_type"),
    [
        (torch.bfloat16, None, "BF16", 32),
        (torch.float16, None, "F16", 1),
        (torch.float32, torch.bfloat16, "BF16", 32),
        (torch.float64, torch.float32, "F32", 0),
    ],
)
def test_dtypes(tmp_path, stored, option, kind, file_type):
    checkpoint = make(dtype=stored, attention_bias=True)
    _, fields, tensors = write(checkpoint, tmp_path, dtype=option)
    assert fields["general.file_type"] == file_type
    for key, value in weights_of(checkpoint).items():
        actual, stored_as = tensors[gguf_name(key)]
        assert stored_as == ("F32" if value.ndim == 1 else kind), key
        if "q_proj" not in key and "k_proj" not in key:
            assert torch.equal(actual, value.to(torch.float32 if value.ndim == 1 else option or stored).float()), key


def test_the_byte_tokenizer(tmp_path):
    _, fields, _ = write(make(vocab_size=264), tmp_path)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:2] == ["<|begin_of_text|>", "<|end_of_text|>"]
    assert [BYTES.tokenizer.token_to_id(token) for token in tokens[:258]] == list(range(258))
    assert types == [3] * 2 + [1] * 256 + [5] * 6
    assert len(fields["tokenizer.ggml.merges"]) == 1  # llama.cpp rejects files without merges; this one never applies
    keys = ("model", "pre", "bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")
    assert [fields[f"tokenizer.ggml.{key}"] for key in keys] == ["gpt2", "gpt-2", 0, 1, True, False]
    assert fields["general.name"] == "model"


FOREIGN = {"gpt2": "gpt-2", "llama3": "smaug-bpe", "qwen": "qwen2", "chat": "gpt-2"}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_tokenizers(tmp_path, kind):
    checkpoint = read_folder(others.make_folder(kind, tmp_path / "folder"))
    written, fields, _ = write(checkpoint, tmp_path)
    tokenizer = TextTokenizer.from_entry(checkpoint[KEY])
    assert written.pre_tokenizer == fields["tokenizer.ggml.pre"] == FOREIGN[kind]
    assert [tokenizer.tokenizer.token_to_id(token) for token in fields["tokenizer.ggml.tokens"]] == list(
        range(tokenizer.vocab_size)
    )
    merges = json.loads(tokenizer.json)["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] == (kind == "llama3")
    stops = tokenizer.stop_token_ids - {tokenizer.eos_token_id}
    assert fields.get("tokenizer.ggml.eot_token_id") == (min(stops) if kind == "llama3" else None)
    assert ("tokenizer.chat_template" in fields) == (kind == "chat")
    assert [notice[:20] for notice in written.notices] == (["llama.cpp does not a"] if kind == "qwen" else [])


def test_digit_splitting_of_smollm(tmp_path):
    checkpoint = changed(assign("pre_tokenizer", pre_tokenizers.Sequence([DIGITS, PLAIN])))()
    assert write(checkpoint, tmp_path)[0].pre_tokenizer == "smollm"


def test_bytes_without_a_token(tmp_path):
    """As in SmolLM2's tokenizer, which lacks bytes that do not occur in its training texts."""
    checkpoint = changed(without("Ąñ"))()
    written, fields, _ = write(checkpoint, tmp_path)
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert [notice[:55] for notice in written.notices] == ["the tokenizer has no tokens for 2 of the 256 bytes and "]


def test_files_are_written_atomically(tmp_path, monkeypatch):
    calls = []

    def fail(self, tensor, **_):
        calls.append(tensor.nbytes)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
        with pytest.raises(UsageError, match=r"model\.gguf: cannot be written: No space left on device"):
            export_gguf(make(), tmp_path / "model.gguf", dtype=None)
    assert not list(tmp_path.iterdir())
    export_gguf(make(), tmp_path / "new" / "model.gguf", dtype=None)
    with pytest.raises(UsageError, match=r"gguf: .*model\.gguf: already exists; name another file"):
        export_gguf(make(), tmp_path / "new" / "model.gguf", dtype=None)


def test_the_command(tmp_path, run, mistake):
    write_checkpoint(tmp_path / "model.ckpt", make())
    output = run("export", "model.ckpt", "--gguf", "model.gguf", "--dtype", "bfloat16", cwd=tmp_path).stdout
    assert output == "model.gguf is written for llama.cpp: architecture llama, pre-tokenizer gpt-2.\n"
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["general.file_type"].contents() == 32
    checkpoint = str(tmp_path / "model.ckpt")
    for words, message in {
        (): "out: name a folder, or a file by --gguf, or a folder for adapters alone by --adapter",
        ("folder", "--gguf", "a.gguf"): "out: name a folder, or a file by --gguf, or a folder for adapters alone",
        ("a.gguf",): f"out: names a folder; for a GGUF file: ropepp-lit export {checkpoint} --gguf a.gguf",
        ("--gguf", "a.gguf", "--check", "true"): "check: is for folders of a whole model; leave it out with --gguf",
        ("--gguf", "a.gguf", "--max_shard_size", "1GB"): "max_shard_size: is for folders",
        ("--gguf", "s3://bucket/a.gguf"): "gguf: s3://bucket/a.gguf is a URL",
    }.items():
        assert message in mistake(checkpoint, *words, subcommand="export", base=[])


def pieces(tokenizer, ids):
    """Return the bytes of tokens as llama-simple prints them: with special tokens, each up to its first zero byte."""
    alphabet = {character: byte for byte, character in enumerate(byte_characters())}
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    texts = (
        added[index].content.encode() if index in added else bytes(alphabet[c] for c in tokenizer.token(index))
        for index in ids
    )
    return b"".join(text.split(b"\0")[0] for text in texts)


def byte_characters():
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others_ = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others_)) for byte in range(256)]


def trained():
    return train_tokenizer(others.TEXTS, vocab_size=330)


IN_LLAMA_CPP = {
    **{name: lambda folder, changes=model[0]: make(**changes) for name, model in MODELS.items()},
    "tied": lambda folder: make(tie_word_embeddings=True),
    "trained BPE": lambda folder: make(tokenizer=trained()),
    **{kind: lambda folder, kind=kind: read_folder(others.make_folder(kind, folder / "folder")) for kind in FOREIGN},
}
TOKENS = 100
PROMPT = "The fox: 漢字 + 4096 isn't  naïve\n\n  \tand THEY'RE 🙂 "


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_greedy_text_matches_llama_cpp(tmp_path, name):
    program = os.environ.get("LLAMA_SIMPLE")
    if not program:
        pytest.skip("LLAMA_SIMPLE does not name llama.cpp's program llama-simple")
    checkpoint = IN_LLAMA_CPP[name](tmp_path)
    export_gguf(checkpoint, tmp_path / "model.gguf", dtype=None)
    tokenizer, decoder = TextTokenizer.from_entry(checkpoint[KEY]), load_decoder(checkpoint).float()
    prompt = tokenizer.encode_prompt(PROMPT)
    ids = []
    for row in generate(decoder, torch.tensor([prompt]), max_new_tokens=TOKENS):
        if int(row) in tokenizer.stop_token_ids:
            break
        ids.append(int(row))
    command = [program, "-m", str(tmp_path / "model.gguf"), "-n", str(TOKENS), PROMPT]
    finished = subprocess.run(command, capture_output=True, check=True)
    if finished.stdout == pieces(tokenizer, prompt + ids) + b"\n":
        assert int(re.search(rb"decoded (\d+) tokens", finished.stderr)[1]) == len(ids)
        return
    # llama.cpp caches keys and values in float16, which decides near-ties of random models otherwise; no other token.
    starts = [finished.stdout.startswith(pieces(tokenizer, prompt + ids[:count])) for count in range(len(ids) + 1)]
    same = starts.index(False) - 1
    assert same >= 0  # the prompt is the same
    with torch.no_grad():
        logits = decoder(torch.tensor([prompt + ids[:same]]))[0, -1]
    first, second = logits.topk(2).values
    assert first - second < 0.02 * logits.abs().max()
