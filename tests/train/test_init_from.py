"""Training initialized from the weights of another model."""

import re

import pytest
import torch

from ropepp_lit.checkpoint import KEY, decoder_weights, read_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.train.plan import plan

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def rope(run, tiny, tmp_path_factory):
    """Folder of a short run of plain RoPE."""
    folder = tmp_path_factory.mktemp("rope")
    run(
        "fit",
        *tiny,
        "--model.positions",
        "RoPE",
        "--trainer.max_steps",
        4,
        "--trainer.default_root_dir",
        "rope",
        cwd=folder,
    )
    return folder


def test_upcycle_train_export_and_import(run, tiny, rope, tmp_path):
    """Train, upcycle, train further with another base, export, import, and generate from both."""
    text = tmp_path / "text.txt"
    text.write_text("word1 word2 word3 " * 40)
    last = rope / "rope" / "checkpoints" / "last.ckpt"
    out = run("upcycle", last, "ec.ckpt", "--variant", "ec", "--text", text, cwd=tmp_path).stdout
    assert float(re.search(r"Logits of 256 random tokens differ by (\S+) of the largest", out)[1]) < 1e-5
    before, after = re.search(r"tokens: (\S+) before, (\S+) after, in nats per token", out).groups()
    assert before == after
    out = run("upcycle", last, "eh.ckpt", "--variant", "eh", "--text", text, cwd=tmp_path).stdout
    assert "after, in nats per token" in out
    options = ["--model.frequencies.rope_theta", 50000, "--trainer.max_steps", 2, "--data.context_length", 32]
    fitted = run(
        "fit", *tiny, "--config", "ec.yaml", *options, "--trainer.default_root_dir", "run", cwd=tmp_path
    ).stdout
    assert "Starting from the weights of ec.ckpt: model.frequencies.rope_theta 10000.0 → 50000" in fitted
    assert "data.context_length 64 → 32" in fitted
    assert "RoPE++ EC, base 50000" in fitted
    made = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert made[KEY]["origin"] == "ec.ckpt"
    assert made["global_step"] == 2
    start = decoder_weights(read_checkpoint(tmp_path / "ec.ckpt"))
    for name, value in decoder_weights(made).items():
        assert 0 < (value - start[name]).abs().max() < 0.1, name
    out = run("export", "run/checkpoints/last.ckpt", "hf", cwd=tmp_path).stdout
    assert "loaded by transformers" in out
    card = (tmp_path / "hf" / "README.md").read_text()
    for expected in ("Held-out text of", "bits_per_byte", "init_from: ec.ckpt", "trained on", "initialized from ec."):
        assert expected in card
    run("import", "hf", "again.ckpt", cwd=tmp_path)
    again = decoder_weights(read_checkpoint(tmp_path / "again.ckpt"))
    assert all(torch.equal(again[name], value) for name, value in decoder_weights(made).items())
    texts = {
        run("generate", path, "--temperature", 0, "--max_new_tokens", 20, cwd=tmp_path).stdout
        for path in ("hf", "again.ckpt", "run/checkpoints/last.ckpt")
    }
    assert len(texts) == 1


def test_the_run_reports_changes_at_a_longer_context(run, tiny, rope, tmp_path):
    options = ["--model.positions", "RoPE", "--model.init_from", rope / "rope" / "checkpoints" / "last.ckpt"]
    options += ["--data.context_length", 256, "--data.batch_size", 1, "--trainer.max_steps", 1]
    printed = run("fit", *tiny, *options, "--model.frequencies.rope_theta", 50000, cwd=tmp_path).stdout
    changes = "model.frequencies.rope_theta 10000.0 → 50000.0, data.context_length 64 → 256, tokens per step 128 → 256"
    assert changes in printed


def test_weights_that_do_not_fit(run, mistake, tiny, rope, tmp_path):
    last = rope / "rope" / "checkpoints" / "last.ckpt"
    printed = mistake("--model.init_from", last)
    assert "its weights do not fit the recipe's model (model.positions RoPE → RoPEPP" in printed
    assert "none.ckpt: no such checkpoint" in mistake("--model.init_from", "none.ckpt")
    run("upcycle", last, "ec.ckpt", "--variant", "ec", cwd=tmp_path)
    printed = mistake("--ckpt_path", "ec.ckpt")
    assert "ckpt_path: ec.ckpt stores weights only; start from them by --model.init_from ec.ckpt" in printed
    checked = run("validate", *tiny, "--ckpt_path", "ec.ckpt", cwd=tmp_path).stdout
    assert "bits per byte" in checked


@pytest.mark.parametrize(
    "base", ["file", *(pytest.param(base, marks=pytest.mark.slow) for base in ("file, fsdp2", "shards"))]
)
def test_rotations_are_dropped_and_norms_added(base, run, tiny, rope, tmp_path, monkeypatch):
    """NoPE is initialized from RoPE; query and key norms start at 1, and are refused with adapters."""
    last = path = rope / "rope" / "checkpoints" / "last.ckpt"
    more = [] if base == "file" else ["--trainer.strategy", "FSDP2Strategy"]
    if base == "shards":
        options = ["--model.positions", "RoPE", "--model.init_from", last, "--trainer.max_steps", 1, *more]
        options += ["--trainer.strategy.save_distributed_checkpoint", "true", "--trainer.default_root_dir", "shards"]
        run("fit", *tiny, *options, cwd=tmp_path)
        path = "shards/checkpoints/last.ckpt"
    options = [*tiny, "--model.positions", "NoPE", "--model.decoder.qk_norm", "true", "--model.init_from", path, *more]
    printed = run("fit", *options, "--trainer.max_steps", 1, "--trainer.default_root_dir", "run", cwd=tmp_path).stdout
    assert "model.positions RoPE → NoPE" in printed
    assert "model.decoder.qk_norm False → True" in printed
    made = decoder_weights(read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    norms = [value for name, value in made.items() if "q_norm" in name or "k_norm" in name]
    assert len(norms) == 4
    assert all(0 < (norm - 1).abs().max() < 0.01 for norm in norms)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (made[name] - decoder_weights(read_checkpoint(last))[name]).abs().max() < 0.01
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="its weights do not fit the recipe's model"):
        plan([*map(str, options), "--model.lora.rank", "4"])
    contents = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    del contents["state_dict"]["decoder.model.layers.0.self_attn.q_norm.weight"]
    torch.save(contents, "damaged.ckpt")
    with pytest.raises(UsageError, match=r"damaged\.ckpt: its weights do not fit"):
        plan([*map(str, options), "--model.init_from", "damaged.ckpt"])


def test_initialized_and_continued(run, tiny, rope, tmp_path):
    """A run with init_from continues from its own checkpoint, not from those weights."""
    last = rope / "rope" / "checkpoints" / "last.ckpt"
    options = [*tiny, "--model.positions", "RoPE", "--model.init_from", last, "--trainer.default_root_dir", "run"]
    run("fit", *options, "--trainer.max_steps", 2, "--model.schedule.total_steps", 4, cwd=tmp_path)
    run("fit", *options, "--trainer.max_steps", 4, "--ckpt_path", "auto", cwd=tmp_path)
    options[-1] = "baseline"
    run("fit", *options, "--trainer.max_steps", 4, cwd=tmp_path)
    halves, baseline = (
        decoder_weights(read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")) for name in ("run", "baseline")
    )
    assert all(torch.equal(halves[name], value) for name, value in baseline.items())


def test_init_optimizer_loads_the_optimizer_state(run, tiny, rope, tmp_path):
    last = rope / "rope" / "checkpoints" / "last.ckpt"
    options = [*tiny, "--model.positions", "RoPE", "--model.init_from", last, "--trainer.max_steps", 2]
    weights = {}
    for name, more in (
        ("fresh", []),
        ("kept", ["--model.init_optimizer", "true"]),
        ("sharded", ["--model.init_optimizer", "true", "--trainer.strategy", "fsdp2"]),
    ):
        run("fit", *options, *more, "--trainer.default_root_dir", name, cwd=tmp_path)
        weights[name] = decoder_weights(read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt"))
    differences = {
        name: max(float((weights[name][key] - value).abs().max()) for key, value in weights["kept"].items())
        for name in weights
    }
    assert differences["sharded"] < 1e-6 < 1e-5 < differences["fresh"]
    failed = run(
        "fit", *options, "--model.init_optimizer", "true", "--model.optimizer", "Muon", cwd=tmp_path, returncode=2
    )
    assert "model.init_optimizer: " in failed.stderr
    assert "stores the state of AdamW" in failed.stderr
