"""Folders of other families with every command that reads text: texts and losses match transformers."""

import json

import numpy as np
import others
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.plan import ChunkSlice
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.data.verify import verify

pytestmark = pytest.mark.end_to_end

PROMPT = "The quick brown fox"
TEXT = others.LONG[:1500]


@pytest.fixture(scope="module", params=others.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def work(kind, run, tmp_path_factory):
    """Folder with a model of a kind, its import, and a text."""
    path = tmp_path_factory.mktemp(kind)
    others.make_folder(kind, path / "model")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    run("import", "model", "model.ckpt", cwd=path)
    return path


@pytest.fixture(scope="module")
def theirs(work):
    """Load model and tokenizer in transformers."""
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(work / "model")


@pytest.mark.parametrize("source", ["model", "model.ckpt"])
def test_greedy_text(run, work, theirs, source):
    model, tokenizer = theirs
    prompt_ids = torch.tensor([tokenizer(PROMPT).input_ids])
    written = model.generate(prompt_ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, prompt_ids.shape[1] :]
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    ids = [token for token in written.tolist() if token not in stops]
    begin = tokenizer.decode(prompt_ids[0], skip_special_tokens=True)
    expected = PROMPT + tokenizer.decode(prompt_ids[0].tolist() + ids, skip_special_tokens=True)[len(begin) :]
    options = ["--prompt", PROMPT, "--max_new_tokens", 40, "--temperature", 0]
    assert run("generate", source, *options, cwd=work).stdout == expected + "\n"


def test_perplexity(run, work, theirs):
    model, tokenizer = theirs
    ids = torch.tensor(tokenizer(TEXT).input_ids)
    assert len(ids) > 64
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum")
            for window in (ids[start : start + 257] for start in range(0, len(ids) - 1, 256))
        ]
    options = ["--tasks", "perplexity", "--lengths", "256", "--text", "text.txt", "--out", "out"]
    run("evaluate", "A=model", "B=model.ckpt", *options, cwd=work)
    rows = json.loads((work / "out" / "results.json").read_text())["scores"]
    actual = {
        (row["model"], row["metric"]): row["value"]
        for row in rows
        if row["task"] == "perplexity" and row["position"] is None
    }
    loss = float(sum(losses))
    for name in ("A", "B"):
        assert actual[name, "loss"] == pytest.approx(loss / (len(ids) - 1), abs=1e-4)
        assert actual[name, "bits_per_byte"] == pytest.approx(loss / len(TEXT.encode()) / np.log(2), abs=1e-4)


def test_prepared_tokens(run, work, theirs):
    """With the checkpoint's tokenizer; tests/text compares tokenizers of folders and files."""
    _, tokenizer = theirs
    run("prepare", "text.txt", "--out", "shards", "--tokenizer", "model.ckpt", cwd=work)
    folder, manifest = work / "shards", Manifest.read(work / "shards")
    tokens = np.empty(manifest.splits["train"].tokens, dtype=np.int64)
    TokenShards(folder, manifest, "train").read([ChunkSlice(0, 0, len(tokens))], tokens)
    assert tokens.tolist() == [*tokenizer(TEXT).input_ids, tokenizer.eos_token_id]
    assert verify(folder) == []


def test_an_export_tokenizes_like_its_source(run, kind, work, theirs):
    model, tokenizer = theirs
    run("export", "model.ckpt", "exported", "--check", kind == "llama2", cwd=work)
    exported = AutoTokenizer.from_pretrained(work / "exported")
    for text in (TEXT, PROMPT, ""):
        assert exported(text).input_ids == tokenizer(text).input_ids
    assert (exported.bos_token, exported.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    assert exported.chat_template == tokenizer.chat_template
    generation = json.loads((work / "exported" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == model.generation_config.eos_token_id
    weights, before = (load_file(work / name / "model.safetensors") for name in ("exported", "model"))
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_a_model_trained_with_another_bos(run, kind, work, theirs, tiny_fit):
    """Training texts started with EOS by an option, and so do those of the export."""
    if kind not in ("llama3", "qwen"):
        pytest.skip("one tokenizer that names a BOS and one that does not are enough")
    _, tokenizer = theirs
    eos = tokenizer.eos_token
    run("prepare", "text.txt", "--out", "opened", "--tokenizer", "model", "--bos_token", eos, cwd=work)
    run("fit", *tiny_fit, "--data.source", "opened", "--data.validation", json.dumps({"v": "opened"}), cwd=work)
    run("export", "run/checkpoints/last.ckpt", "trained", "--check", "false", cwd=work)
    exported = AutoTokenizer.from_pretrained(work / "trained")
    expected = [tokenizer.eos_token_id, *tokenizer(PROMPT, add_special_tokens=False).input_ids]
    assert exported(PROMPT).input_ids == expected


@pytest.fixture(scope="module")
def tiny_fit():
    """Return the options of a run with two steps."""
    model = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return [
        "--model.decoder", json.dumps({**model, "num_attention_heads": 2, "num_key_value_heads": 1}),
        "--trainer.max_steps", 2, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", "run",
        "--data.context_length", 64, "--data.batch_size", 1, "--sample.max_new_tokens", 4,
    ]  # fmt: skip
