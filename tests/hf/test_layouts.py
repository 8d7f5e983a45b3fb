"""Every layout of weights with every command that takes a Hugging Face folder."""

import json
import re
import resource
import subprocess
import sys

import pytest
import torch
from folders import (
    LAYOUTS,
    in_parts,
    make_folder,
    make_weights,
    put_in_hub_cache,
    save_single,
)
from safetensors.torch import load_file, save_file

from ropepp_lit.checkpoint import KEY, load_decoder, read_checkpoint
from ropepp_lit.cli import main
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.compare import load_in_float32
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import open_checkpoint, read_folder
from ropepp_lit.hf.layouts import LAYOUTS as TABLE
from ropepp_lit.hf.layouts import find_folder
from ropepp_lit.nn.generation import generate


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_weights(tmp_path, layout):
    weights = make_weights()
    actual = read_folder(make_folder(tmp_path / "hf", layout=layout, weights=weights))["state_dict"]
    assert actual.keys() == {f"decoder.{name}" for name in weights}
    assert all(torch.equal(actual[f"decoder.{name}"], value) for name, value in weights.items())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of huggingface_hub, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


COMMANDS = {
    "import": ["{}", "new.ckpt"],
    "upcycle": ["{}", "new.ckpt", "--variant", "ec"],
    "generate": ["{}", "--prompt", "a", "--max_new_tokens", "2"],
    "export": ["{}", "out", "--check", "false"],
    "evaluate": ["{}", "--tasks", "perplexity", "--lengths", "32", "--out", "out", "--text", "text.txt"],
}


@pytest.mark.parametrize("source", ["old .bin", "other name", "org/model", "org/model@v1"])
def test_every_command_supports_every_layout_and_hub_names(tmp_path, monkeypatch, capsys, hub, source):
    layout = {"old .bin": "index of old .bin"}.get(source, "one file of another name")
    folder = make_folder(tmp_path / "hf", layout=layout, tokenizer=True)
    if source.startswith("org"):
        put_in_hub_cache(hub, "org/model", folder, commit="a" * 40, reference=source.partition("@")[2] or "main")
        folder = source
    (tmp_path / "text.txt").write_text("The fox reads. " * 20)
    for command, words in COMMANDS.items():
        (tmp_path / command).mkdir()
        (tmp_path / command / "text.txt").write_text("The fox reads. " * 20)
        monkeypatch.chdir(tmp_path / command)
        main([command, *(word.format(folder) for word in words)])
        assert "error" not in capsys.readouterr().err
    origin = read_checkpoint(tmp_path / "import" / "new.ckpt")[KEY]["origin"]
    assert origin == ("org/model@" + "a" * 40 if source.startswith("org") else "hf")


@pytest.mark.end_to_end
def test_a_run_initialized_from_a_folder_preserves_its_license(tmp_path, run, texts):
    folder = make_folder(tmp_path / "hf", layout="index of old .bin", tokenizer=True)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n")
    run("import", folder, "model.ckpt", cwd=tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{source: {texts}, batch_size: 2, cache_dir: cache}}\n"
        "trainer: {accelerator: cpu, max_steps: 1, limit_val_batches: 1}\nsample: {max_new_tokens: 2}\n"
    )
    out = run(
        "fit", "--config", "recipe.yaml", "--config", "model.yaml", "--trainer.default_root_dir", "run",
        "--model.init_from", folder, cwd=tmp_path,
    ).stdout  # fmt: skip
    assert f"Starting from the weights of {folder}" in out
    card = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")[KEY]["card"]
    assert card == {"license": "mit", "base_model": "org/base"}


def test_hub_names(tmp_path, hub):
    put_in_hub_cache(hub, "org/model", make_folder(tmp_path / "first"), commit="a" * 40)
    put_in_hub_cache(hub, "org/model", make_folder(tmp_path / "second"), commit="b" * 40, reference="v2")
    for source, revision, commit in (
        ("org/model", None, "a"),
        ("org/model", "v2", "b"),
        ("org/model@v2", None, "b"),
        ("org/model@" + "b" * 40, None, "b"),
    ):
        assert find_folder(source, revision=revision).name == commit * 40
        assert open_checkpoint(source, revision=revision)[KEY]["card"] == {"base_model": "org/model"}
    for source, revision, message in (
        ("org/other", None, "source: org/other: no such local folder, and it cannot be downloaded"),
        ("org/model@v2", "v2", "source: org/model@v2: no such folder"),
        (tmp_path, None, r"no config\.json there; name a folder in Hugging Face's format"),
        (tmp_path, "v2", "revision: .* is a local folder"),
        ("a/b/c", None, "source: a/b/c: no such folder; name one in Hugging Face's format, or ORGANIZATION/MODEL"),
    ):
        with pytest.raises(UsageError, match=message):
            find_folder(source, revision=revision)


def test_downloaded_files_are_those_that_are_read(tmp_path, monkeypatch):
    """The repository has the weights in two formats; only one is downloaded."""
    requested = []
    folder = make_folder(tmp_path / "hf", layout="index of .bin")

    def download(name, *, revision, allow_patterns, ignore_patterns):
        requested.append(allow_patterns[-1])
        assert {"*/*", "consolidated*"} <= set(ignore_patterns)
        assert {"*.json", "README.md", "*.model"} <= set(allow_patterns)
        return folder if requested[-1] == "*.bin" else tmp_path

    monkeypatch.setattr("ropepp_lit.hf.layouts.snapshot_download", download)
    assert find_folder("org/model") == folder
    assert requested == [layout.pattern for layout in TABLE]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def write_index(**places):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return spoil


def instead(name, content=b"x"):
    """Return a function that replaces model.safetensors by another file."""

    def spoil(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return spoil


def add(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    in_parts(torch.save, "pytorch_model", "bin")(folder, load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model-00002-of-00003.bin"
    path.write_bytes(path.read_bytes()[:-300])


def lose_a_part(folder):
    in_parts(save_file, "model", "safetensors", index=False)(folder, load_file(folder / "model.safetensors"))
    for name in ("model.safetensors", "model-00002-of-00003.safetensors"):
        (folder / name).unlink()


def quantize(folder):
    weights = load_file(folder / "model.safetensors")
    save_single(folder, {**weights, "model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.int8)})


def nest(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": weights, "step": 3}, folder / "pytorch_model.bin")


REFUSED = {
    "config.json as a pointer": (add("config.json", LFS.encode()), r"config\.json: a git-lfs pointer.*git lfs pull"),
    "weights as a pointer": (add("model.safetensors", LFS.encode()), r"model\.safetensors: a git-lfs pointer"),
    ".bin as a pointer": (instead("pytorch_model.bin", LFS.encode()), r"pytorch_model\.bin: a git-lfs pointer"),
    "index as a pointer": (instead("model.safetensors.index.json", LFS.encode()), r"index\.json: a git-lfs pointer"),
    "an empty file": (instead("model.safetensors", b""), r"model\.safetensors: empty; download the file again"),
    "Meta's format": (instead("consolidated.00.pth"), r"consolidated\.00\.pth: is in the original format of Meta"),
    "Mistral's format": (instead("consolidated.safetensors"), "is in the original format of Meta or Mistral"),
    "GGUF": (instead("model-q4.gguf"), r"model-q4\.gguf: is GGUF"),
    "TensorFlow": (instead("tf_model.h5"), "is TensorFlow's"),
    "Flax": (instead("flax_model.msgpack"), "is Flax's"),
    "an adapter": (instead("adapter_model.safetensors"), r"stores an adapter without its base model; merge it"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights in a supported layout: model"),
    "training's own files": (instead("training_args.bin"), "no weights in a supported layout"),
    "two models": (
        lambda folder: (instead("a.safetensors")(folder), add("b.safetensors", b"x")(folder)),
        r"multiple files of weights without an index \(a\.safetensors, b\.safetensors\)",
    ),
    "a part lost": (lose_a_part, "file 2 of 3 of model is missing"),
    "a part cut": (cut, r"pytorch_model-00002-of-00003\.bin: damaged or truncated; download it again"),
    "absolute name": (write_index(a="/etc/passwd"), r"index\.json: '/etc/passwd' is not a file name inside its"),
    "name outside": (write_index(a="../model.safetensors"), r"index\.json: '\.\./model\.safetensors' is not a file"),
    "name of Windows": (write_index(a="C:\\x.safetensors"), r"is not a file name inside its folder"),
    "a number for a name": (write_index(a=3), "index.json: 3 is not a file name inside its folder"),
    "an index of nothing": (write_index(), r"index\.json: it has no weight_map"),
    "a missing file": (write_index(a="b.safetensors"), r"b\.safetensors: missing, but listed in model"),
    "int8": (quantize, r"mlp\.up_proj\.weight is int8; quantized weights are not supported"),
    "a training checkpoint": (nest, r"not a dict of tensors"),
    "no JSON": (add("config.json", b"{"), r"config\.json: not JSON"),
    "a list": (add("config.json", b"[]"), r"config\.json: not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unreadable_folders_are_rejected_with_the_reason(tmp_path, case):
    spoil, message = REFUSED[case]
    folder = make_folder(tmp_path / "hf")
    spoil(folder)
    with pytest.raises(UsageError, match=message):
        read_folder(folder)


def narrow(weights, wide):
    return {name: value if re.search(wide, name) else value.bfloat16() for name, value in weights.items()}


@pytest.mark.parametrize(
    ("wide", "tied"), [("norm", False), ("lm_head", False), ("embed_tokens|lm_head", True), ("layers.0", False)]
)
def test_mixed_dtypes(tmp_path, capsys, wide, tied):
    weights = narrow(make_weights(num_hidden_layers=4, tie_word_embeddings=tied), wide)
    if tied:
        del weights["lm_head.weight"]
    folder = make_folder(
        tmp_path / "hf", weights=weights, tokenizer=True, num_hidden_layers=4, tie_word_embeddings=tied
    )
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        weights[name] = weights[name] + 0.001 if weights[name].dtype == torch.float32 else weights[name]
    save_single(folder, weights)
    main(["import", str(folder), str(tmp_path / "model.ckpt")])
    assert "the weights are bfloat16, with tensors in float32" in capsys.readouterr().out
    main(["generate", str(folder), "--max_new_tokens", "2"])
    assert "the weights are bfloat16, with tensors in float32" in capsys.readouterr().err
    checkpoint = read_checkpoint(tmp_path / "model.ckpt")
    decoder = load_decoder(checkpoint)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    assert len(list(generate(decoder, torch.tensor([[1, 2, 3]]), max_new_tokens=4))) == 4
    exact = load_in_float32(checkpoint)
    input_ids = torch.arange(20)[None]
    wide_decoder = load_decoder(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(exact(input_ids), wide_decoder(input_ids))
        torch.testing.assert_close(exact(input_ids), wide_decoder(input_ids))  # the hooks restored the weights
    settings = {"max_shard_bytes": 10**9, "check": False}
    export(checkpoint, tmp_path / "same", dtype=None, **settings)
    exported = load_file(tmp_path / "same" / "model.safetensors")
    for name, value in exported.items():
        assert value.dtype == weights[name].dtype
        assert torch.equal(value, weights[name]), name
    assert json.loads((tmp_path / "same" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    export(checkpoint, tmp_path / "half", dtype=torch.bfloat16, **settings)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.bfloat16}


def test_weights_are_memory_mapped(tmp_path):
    """Import and export of 200 MB, in processes whose private memory grows by much less."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128}
    weights = {name: value.bfloat16() for name, value in make_weights(num_hidden_layers=6, **wide).items()}
    size = sum(value.nbytes for value in weights.values())
    assert size > 150e6
    folder = make_folder(tmp_path / "hf", weights=weights, num_hidden_layers=6, **wide)
    del weights
    code = """
import sys
from pathlib import Path
import torch
from ropepp_lit.checkpoint import read_checkpoint, write_checkpoint
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import read_folder

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def peak(step):
    import threading
    done, found = threading.Event(), [private()]
    def watch():
        while not done.wait(0.002):
            found.append(private())
    thread = threading.Thread(target=watch)
    thread.start()
    step()
    done.set()
    thread.join()
    return max(found) - found[0]

folder, root = Path(sys.argv[1]), Path(sys.argv[2])
print(peak(lambda: write_checkpoint(root / "model.ckpt", read_folder(folder))))
checkpoint = read_checkpoint(root / "model.ckpt")
print(peak(lambda: export(checkpoint, root / "out", dtype=None, max_shard_bytes=30_000_000, check=False)))
"""
    finished = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported, exported = (int(line) for line in finished.stdout.split())
    assert imported < 0.25 * size
    assert exported < 0.4 * size


CARDS = {
    "plain": ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Model\n", {"license": "apache-2.0"}),
    "other licence": (
        "---\nlicense: other\nlicense_name: 'name: with colon'\nlicense_link: https://x\nbase_model: org/base\n---\n",
        {"license": "other", "license_name": "name: with colon", "license_link": "https://x", "base_model": "org/base"},
    ),
    "no front matter": ("# Model\n---\nlicense: mit\n---\n", {}),
    "damaged": ("---\nlicense: [\n---\n", {}),
    "none": (None, {}),
}


@pytest.mark.parametrize("case", CARDS)
def test_model_cards(tmp_path, case):
    from huggingface_hub import ModelCard

    text, expected = CARDS[case]
    folder = make_folder(tmp_path / "hf", tokenizer=True)
    if text is not None:
        (folder / "README.md").write_text(text)
    export(read_folder(folder), tmp_path / "out", dtype=None, max_shard_bytes=10**9, check=False)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert {key: data[key] for key in ("license", "license_name", "license_link", "base_model") if key in data} == (
        expected
    )
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert "target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']" in card.text


@pytest.mark.parametrize(
    ("finished", "message"),
    [
        ((-9, ""), r"was killed \(SIGKILL\), probably because it ran out of memory; .* --check false"),
        ((1, ""), r"transformers cannot load the export \(exit status 1\)"),
        ((1, "Traceback\nValueError: no\n"), r"transformers cannot load the export \(ValueError: no\)"),
    ],
)
def test_a_failing_check(tmp_path, monkeypatch, finished, message):
    code, errors = finished
    monkeypatch.setattr("ropepp_lit.hf.export.CHECK", f"import os, sys\nsys.stderr.write({errors!r})\n"
                        + (f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"))  # fmt: skip
    with pytest.raises(UsageError, match=message):
        export(
            read_folder(make_folder(tmp_path / "hf")),
            tmp_path / "out",
            dtype=None,
            max_shard_bytes=10**9,
            check=True,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("limit", [0, 3_000, 60_000])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("import", ["new.ckpt"]),
        ("upcycle", ["new.ckpt", "--variant", "eh"]),
        ("export", ["out", "--check", "false"]),
    ],
)
def test_a_full_disk_leaves_no_files(tmp_path, mistake, limit, command, words):
    """A file size limit causes the same write errors as a full disk."""
    folder = make_folder(tmp_path / "hf")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = mistake(folder, *words, subcommand=command, base=[])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in line


def test_export_into_the_current_folder_is_rejected(tmp_path, tmp_path_factory, mistake):
    folder = make_folder(tmp_path_factory.mktemp("source") / "hf")
    for out in (".", tmp_path):
        line = mistake(folder, out, "--check", "false", subcommand="export", base=[])
        assert "is the current folder; name a folder inside it" in line


def test_folder_options_are_rejected_for_checkpoints(tmp_path, mistake):
    folder = make_folder(tmp_path / "hf")
    main(["import", str(folder), str(tmp_path / "model.ckpt")])
    line = mistake("model.ckpt", "new.ckpt", "--variant", "ec", "--rope_theta", "5", subcommand="upcycle", base=[])
    assert "model.ckpt is not a Hugging Face folder" in line
    line = mistake(folder, "x.ckpt", "--revision", "v1", subcommand="import", base=[])
    assert "is a local folder" in line
