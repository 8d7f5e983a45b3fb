"""The installed command: output of a run, and resuming."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from ropepp_lit.checkpoint import decoder_weights, load_decoder, read_checkpoint
from ropepp_lit.nn import RoPEPP
from ropepp_lit.nn.generation import generate
from ropepp_lit.text.tokenizer import byte_tokenizer

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def trained(run, tiny, tmp_path_factory):
    """Finished run of 8 steps, and its output."""
    folder = tmp_path_factory.mktemp("trained")
    options = [
        "--trainer.default_root_dir",
        "run",
        "--trainer.val_check_interval",
        "4",
        "--checkpoints.every_n_steps",
        "3",
    ]
    finished = run("fit", *tiny, *options, "--trainer.limit_val_batches", "null", cwd=folder)
    return folder / "run", finished.stdout


def test_output_of_a_run(trained):
    _, printed = trained
    for expected in (
        "RoPE++ EC, base 10000",
        "4 query projections → 8 attention heads, 2 key/value heads of 8",
        "128 (2 rows × 1 accumulated × 1 devices)",
        "--- sample at step 4 ---",
        "--- sample at step 8 ---",
        "Step 8, 1,024 tokens read",
        "Held-out text of texts",
        "ropepp-lit generate run/checkpoints/last.ckpt",
        "ropepp-lit validate --config run/recipe.yaml --ckpt_path run/checkpoints/last.ckpt",
    ):
        assert expected in printed
    ours, gzip = re.search(r"bits per byte: ([\d.]+) \(this model\)   ([\d.]+) \(gzip -9\)", printed).groups()
    assert 0 < float(gzip) < 8
    assert 0 < float(ours) < 8.1


def test_gzip_compresses_each_document_separately(trained, texts, tmp_path):
    _, printed = trained
    # The lowest fifth of the range of BLAKE2b's first eight bytes is held out.
    digests = {path.read_text(): hashlib.blake2b(path.read_bytes(), digest_size=8).digest() for path in texts.iterdir()}
    held_out = [text for text, digest in digests.items() if int.from_bytes(digest) < 0.2 * 2**64]
    compressed = 0
    for number, text in enumerate(held_out):
        path = tmp_path / str(number)
        path.write_text(text)
        compressed += len(subprocess.run(["gzip", "-9", "-c", "-n", path], capture_output=True, check=True).stdout)
    assert f"{8 * compressed / sum(map(len, held_out)):.3f} (gzip -9)" in printed
    assert f"({len(held_out)} documents" in printed


def test_files_of_a_run(trained):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "checkpoints", "recipe.yaml", "run.jsonl", "tensorboard"}
    # Every third step and the last one; the newest two are kept.
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step=6.ckpt",
        "step=8.ckpt",
    ]
    assert (folder / "checkpoints" / "last.ckpt").readlink().name == "step=8.ckpt"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["model"]["decoder"]["hidden_size"] == 32
    ours = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["ropepp_lit"]
    assert ours["recipe"] == recipe
    assert ours["architecture"]["positions"]["init_args"] == {"variant": "ec"}


def test_tensorboard(trained):
    folder, _ = trained
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "train/perplexity", "train/bits_per_byte", "lr", "gradient_norm", "tokens_per_second"):
        assert [event.step for event in events.Scalars(name)] == list(range(1, 9)), name
    tokens = [make_ndarray(event.tensor_proto).item() for event in events.Tensors("tokens_seen")]
    assert tokens == [128 * step for step in range(1, 9)]
    for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
        assert [event.step for event in events.Scalars(name)] == [4, 8], name
    assert [event.step for event in events.Tensors("sample/text_summary")] == [4, 8]
    loss = events.Scalars("val/loss")[-1].value
    assert events.Scalars("val/perplexity")[-1].value == pytest.approx(2.718281828**loss, rel=1e-4)
    assert events.Scalars("train/loss")[-1].value < events.Scalars("train/loss")[0].value


def test_validate_reproduces_the_metrics_of_the_run(trained, run, tmp_path):
    folder, printed = trained
    options = ["--config", folder / "recipe.yaml", "--ckpt_path", folder / "checkpoints" / "last.ckpt"]
    again = run("validate", *options, cwd=tmp_path).stdout
    figures = r"loss [\d.]+ nats per token, perplexity [\d.]+\n  bits per byte: [\d.]+ \(this model\)"
    assert "at step 8, " in again
    assert re.search(figures, again)[0] == re.search(figures, printed)[0]


def test_generate_streams_the_greedy_text(trained, run, tmp_path):
    folder, _ = trained
    path = folder / "checkpoints" / "last.ckpt"
    options = ["generate", path, "--prompt", "Text 1", "--max_new_tokens", "40", "--temperature", "0"]
    printed = run(*options, cwd=tmp_path).stdout
    decoder = load_decoder(read_checkpoint(path))
    assert isinstance(decoder.scheme, RoPEPP)
    prompt = [0, *(_byte_token(character) for character in "Text 1")]
    expected = [int(token) for token in generate(decoder, torch.tensor([prompt]), max_new_tokens=40)]
    if 1 in expected:
        expected = expected[: expected.index(1)]
    assert printed.rstrip("\n") == ("Text 1" + byte_tokenizer().tokenizer.decode(expected)).rstrip("\n")
    module = [sys.executable, "-m", "ropepp_lit", *map(str, options)]
    assert subprocess.run(module, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == printed
    sampled = [run(*options[:-1], "1", "--seed", seed, cwd=tmp_path).stdout for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def _byte_token(character):
    return byte_tokenizer().encode_text(character)[0]


def test_the_last_step_is_always_saved_and_validated(run, tiny, tmp_path):
    options = ["--trainer.max_steps", "4", "--checkpoints.every_n_steps", "3", "--trainer.val_check_interval", "100"]
    printed = run("fit", *tiny, *options, "--trainer.default_root_dir", "run", cwd=tmp_path).stdout
    assert (tmp_path / "run/checkpoints/last.ckpt").readlink().name == "step=4.ckpt"
    assert "at step 4, " in printed


def test_the_recipe_overrides_the_checkpoint_on_resume(trained, run, tiny, tmp_path):
    folder, _ = trained
    options = [
        *("--model.optimizer.lr", "0.002", "--model.optimizer.weight_decay", "0.25"),
        *("--model.schedule", "Constant", "--model.frequencies.rope_theta", "500000"),
        *("--model.decoder.rms_norm_eps", "1e-4", "--trainer.max_steps", "10"),
        *("--trainer.default_root_dir", "run", "--ckpt_path", folder / "checkpoints" / "last.ckpt"),
    ]
    printed = run("fit", *tiny, *options, cwd=tmp_path).stdout
    assert "model.frequencies.rope_theta 10000.0 → 500000.0" in printed
    assert "model.decoder.rms_norm_eps 1e-05 → 0.0001" in printed
    assert "at step 8 of 10: 2 steps are left" in printed
    after = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    groups = after["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.002, 0.25), (0.002, 0.0)]
    assert after["lr_schedulers"][0]["base_lrs"] == [0.002, 0.002]
    assert after["ropepp_lit"]["architecture"]["frequencies"]["init_args"] == {"rope_theta": 500_000.0}
    assert after["ropepp_lit"]["architecture"]["decoder"]["rms_norm_eps"] == 1e-4


def test_another_batch_size_and_accumulation_on_resume(trained, run, tiny, tmp_path):
    folder, _ = trained
    options = ["--data.batch_size", "1", "--trainer.accumulate_grad_batches", "4", "--trainer.max_steps", "11"]
    options += ["--trainer.default_root_dir", "run", "--ckpt_path", folder / "checkpoints" / "last.ckpt"]
    run("fit", *tiny, *options, cwd=tmp_path)
    after = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert after["global_step"] == 11
    assert after["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["samples"] == 8 * 2 + 3 * 4
    assert after["ropepp_lit"]["tokens_seen"] == (8 * 2 + 3 * 4) * 64


def test_a_branch_decays_from_a_checkpoint_of_a_run(trained, run, tmp_path):
    folder, _ = trained
    options = ["--config", folder / "recipe.yaml", "--config", ROOT / "recipes" / "stages" / "branch.yaml"]
    options += ["--ckpt_path", folder / "checkpoints" / "step=6.ckpt", "--model.schedule.decay_from", 6]
    options += ["--model.schedule.warmup_steps", 2, "--trainer.max_steps", 9]
    printed = run("fit", *options, cwd=tmp_path).stdout
    assert "at step 6 of 9: 3 steps are left" in printed
    events = EventAccumulator(str(tmp_path / "runs" / "branch" / "tensorboard"))
    events.Reload()
    rates = [event.value for event in events.Scalars("lr")]
    assert rates == pytest.approx([5e-4 * share for share in (2 / 3, 1 / 3, 0)])


def test_auto_starts_or_resumes(run, tiny, tmp_path):
    options = ["--ckpt_path", "auto", "--trainer.default_root_dir", "run"]
    first = run("fit", *tiny, *options, "--trainer.max_steps", "2", cwd=tmp_path).stdout
    assert "Continuing" not in first
    second = run("fit", *tiny, *options, "--trainer.max_steps", "4", cwd=tmp_path).stdout
    assert "Continuing from run/checkpoints/step=2.ckpt at step 2 of 4" in second
    third = run("fit", *tiny, *options, "--trainer.max_steps", "4", cwd=tmp_path).stdout
    assert "raise --trainer.max_steps to continue" in third


ROOT = Path(__file__).parents[2]


def test_a_custom_scheme_in_a_user_file(run, tiny, tmp_path):
    page = (ROOT / "recipes" / "positions.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(# schemes\.py.*?)```", page, re.DOTALL)
    (tmp_path / "schemes.py").write_text(example)
    recipe = {"model": {"positions": {"class_path": "schemes.Shifted", "init_args": {"offset": 7}}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--config", "mine.yaml", "--trainer.max_steps", "2", "--trainer.default_root_dir", "run"]
    assert "Shifted, base 10000" in run("fit", *tiny, *options, cwd=tmp_path).stdout
    path = "run/checkpoints/last.ckpt"
    trained = decoder_weights(read_checkpoint(tmp_path / path))["model.layers.1.self_attn.query_scale"]
    assert 0 < (trained - 1).abs().max() < 0.1
    refused = run("generate", path, cwd=tmp_path, returncode=2)
    assert "generate and evaluate take --trust schemes.Shifted" in refused.stderr
    run("generate", path, "--trust", "schemes.Shifted", cwd=tmp_path)
    missing = run("generate", tmp_path / path, "--trust", "schemes.Shifted", cwd=tmp_path / "run", returncode=2)
    assert "schemes.Shifted: cannot be imported" in missing.stderr


def test_two_processes_train_as_one(run, tiny, tmp_path):
    options = ["--trainer.precision", "64-true", "--trainer.max_steps", "3", "--trainer.accumulate_grad_batches", "2"]
    run("fit", *tiny, *options, "--trainer.default_root_dir", "one", cwd=tmp_path)
    options += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "1"]
    printed = run("fit", *tiny, *options, "--trainer.default_root_dir", "two", cwd=tmp_path).stdout
    assert "256 (1 rows × 2 accumulated × 2 devices)" in printed
    assert printed.count("positions  RoPE++ EC") == printed.count("Held-out text") == 1
    one, two = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("one", "two"))
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, atol=1e-9, rtol=0)
    assert one["ropepp_lit"]["tokens_seen"] == two["ropepp_lit"]["tokens_seen"]


def test_a_mixture_of_prepared_folders(run, texts, tmp_path):
    for name, fraction in (("long", 0.2), ("short", 0.3)):
        options = ["--out", tmp_path / name, "--tokenizer", "bytes", "--validation_fraction", fraction]
        run("prepare", texts, *options, cwd=tmp_path)
    recipe = {"data": {"source": {"long": 0.6, "short": 0.4}, "tokenizer": None}}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(recipe))
    base = Path(__file__).parent / "tiny.yaml"
    options = ["--trainer.max_steps", "3", "--trainer.default_root_dir", "run", "--trainer.val_check_interval", "3"]
    printed = run("fit", "--config", base, "--config", "mixture.yaml", *options, cwd=tmp_path).stdout
    assert "60.0% of the samples" in printed
    for name in ("long", "short"):
        assert f"Held-out text of {name} (" in printed
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [events.Scalars(f"val/{name}/loss")[-1].value for name in ("long", "short")]
    assert min(losses) <= events.Scalars("val/loss")[-1].value <= max(losses)
    options = ["--config", "run/recipe.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
    assert run("validate", *options, cwd=tmp_path).stdout.count("Held-out text of") == 2
