"""Runs with LoRA: killed and resumed, on multiple processes, and their checkpoints in other commands."""

import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.train.plan import plan

pytestmark = pytest.mark.end_to_end

LORA = ["--model.lora.rank", 4, "--model.optimizer.lr", 0.01]
KILLER = """
import os
from lightning.pytorch import Callback


class Killer(Callback):
    def __init__(self, kill_at: int):
        self.kill_at = kill_at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.kill_at:
            os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def runs(run, tiny, tmp_path_factory):
    """Folder with a run of the full model, and a function that trains adapters on it in that folder."""
    root = tmp_path_factory.mktemp("lora")
    (root / "killer.py").write_text(KILLER)

    def fit(folder, *options, returncode=0):
        run("fit", *tiny, "--trainer.default_root_dir", folder, *options, cwd=root, returncode=returncode)
        return root / folder / "checkpoints"

    fit("base", "--trainer.max_steps", 2)
    return root, fit


def base_of(folder):
    return ["--model.init_from", folder / "base" / "checkpoints" / "step=2.ckpt"]


@pytest.fixture(scope="module")
def adapters(runs):
    """Checkpoints of an uninterrupted run with LoRA."""
    root, fit = runs
    return fit("baseline", *LORA, *base_of(root), "--model.lora.dropout", 0.2, "--model.activation_checkpointing", 1)


def assert_same(one, other, tolerance=0.0):
    first, second = (read_checkpoint(folder / "last.ckpt") for folder in (one, other))
    assert first["global_step"] == second["global_step"] == 8
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert first[KEY]["adapter"]["fingerprint"] == second[KEY]["adapter"]["fingerprint"]
    for name, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], value, atol=tolerance, rtol=0, msg=name)
        assert not {"default", "base_layer", "_orig_mod", "module", "wrapped"} & set(name.split("."))
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)]
    assert len(states[0]) == len(first["state_dict"])
    for place, state in states[0].items():
        torch.testing.assert_close(states[1][place]["exp_avg"], state["exp_avg"], atol=tolerance, rtol=0)
    return first


def test_killed_and_resumed_with_a_moved_base(runs, adapters, tmp_path):
    root, fit = runs
    dropout = ["--model.lora.dropout", 0.2, "--model.activation_checkpointing", 1]
    killer = ["--trainer.callbacks", "killer.Killer", "--trainer.callbacks.kill_at"]
    (root / "moved").symlink_to(root / "base")
    moved = root / "moved" / "checkpoints" / "step=2.ckpt"
    options = [*LORA, *dropout, "--model.init_from", moved]
    fit("killed", *options, *killer, 5, returncode=-signal.SIGKILL)
    (root / "moved").unlink()
    there = root / "base" / "checkpoints" / "last.ckpt"
    assert (root / "killed" / "checkpoints" / "last.ckpt").resolve().name == "step=4.ckpt"
    fit("killed", *LORA, *dropout, "--ckpt_path", "auto", returncode=2)  # the base has moved
    killed = fit("killed", *LORA, *dropout, "--ckpt_path", "auto", "--model.init_from", there)
    assert_same(adapters, killed)


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(runs):
    """FSDP2 and context parallelism; the second half continues from a single file with full tensors."""
    root, fit = runs
    options = [
        *LORA, *base_of(root), "--trainer.precision", "64-true", "--model.lora.dora", "true",
        "--model.schedule.total_steps", 8, "--model.lora.train_fully", "[imaginary,norms]",
        "--trainer.accumulate_grad_batches", 2, "--diagnostics.every_n_steps", 1, "--diagnostics.far", 8,
    ]  # fmt: skip
    one = fit("one", *options)
    ranks = ["--trainer.devices", 2, "--trainer.strategy", "FSDP2Strategy"]
    ranks += ["--trainer.strategy.context_parallel_size", 2]
    fit("two", *options, *ranks, "--trainer.max_steps", 4)
    checkpoint = assert_same(one, fit("two", *options, *ranks, "--ckpt_path", "auto"), tolerance=1e-9)
    assert checkpoint["state_dict"]["decoder.model.layers.0.self_attn.o_proj.imaginary"].shape == (32, 32)
    last = [curves(root / name) for name in ("one", "two")]
    assert last[0] == pytest.approx(last[1], rel=1e-5)
    assert last[0]["attention/real/output_gradient_norm"] == 0 < last[0]["attention/imaginary/output_gradient_norm"]


def curves(folder):
    """Return the last value of each metric of attention."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = (tag for tag in events.Tags()["scalars"] if tag.startswith("attention/"))
    return {tag: events.Scalars(tag)[-1].value for tag in tags}


@pytest.mark.slow
def test_float32_adapters_over_a_bfloat16_base_on_two_processes(runs):
    root, fit = runs
    options = [*LORA, *base_of(root), "--model.lora.base_dtype", "bfloat16", "--model.lora.train_fully", "[imaginary]"]
    one = fit("half", *options)
    two = fit("halves", *options, "--trainer.devices", 2, "--trainer.strategy", "fsdp2", "--data.batch_size", 1)
    checkpoint = assert_same(one, two, tolerance=0.02)
    assert {value.dtype for value in checkpoint["state_dict"].values()} == {torch.float32}


def test_other_commands_accept_adapters(runs, adapters, run, tiny, capsys):
    root, fit = runs
    last = adapters / "last.ckpt"
    assert run("generate", last, "--prompt", "def", "--max_new_tokens", 4, cwd=root).stdout.startswith("def")
    validate = run("validate", *tiny, *LORA, "--model.lora.dropout", 0.2, "--ckpt_path", last, cwd=root)
    assert "at step 8" in validate.stdout
    run("upcycle", last, "again.ckpt", "--variant", "ec", cwd=root, returncode=2)  # it is RoPE++ already
    full = read_checkpoint(fit("full", "--model.init_from", last, "--trainer.max_steps", 2) / "last.ckpt")
    assert full[KEY]["origin"] == str(last)
    assert "decoder.lm_head.weight" in full["state_dict"]
    capsys.readouterr()
    plan([*map(str, [*tiny, *LORA, "--ckpt_path", last, "--model.lora.dropout", 0.2])])
    assert "trained" in capsys.readouterr().out


def test_mistakes_are_one_line(runs, adapters, mistake):
    root, _ = runs
    base, full_model, last = base_of(root), root / "base" / "checkpoints" / "last.ckpt", adapters / "last.ckpt"
    muon = ["--model.optimizer", "Muon"]
    sharded = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"]
    for options, expected in (
        (["--model.lora", "{}"], "model.lora: adapters require a base model; set model.init_from"),
        ([*base, "--model.lora.targets", "[qkv]"], "model.lora.targets: the decoder has no 'qkv'; choose from q_proj"),
        ([*base, "--model.lora.train_fully", "[imaginary]", "--model.positions", "RoPE"], "no imaginary heads"),
        ([*base, *LORA[:2], *muon], "model.optimizer: Muon orthogonalizes"),
        ([*base, *LORA, "--trainer.precision", "bf16-true"], "trainer.precision: bf16-true would round the adapters"),
        ([*base, *LORA, "--model.attention_head_groups", 2], "model.attention_head_groups"),
        ([*base, *LORA, "--model.lora.dropout", 0.1, "--model.mlp_chunk_tokens", 8], "model.lora.dropout"),
        ([*base, *LORA, "--model.init_optimizer", "true"], "model.init_optimizer: the state of model.init_from bel"),
        ([*base, *LORA, *sharded], "trainer.strategy.save_distributed_checkpoint: adapters are saved in one file"),
        ([*LORA, "--ckpt_path", full_model], "ckpt_path: "),
        (["--ckpt_path", last], "stores adapters, and the recipe has no model.lora"),
        (["--model.lora.rank", 8, "--ckpt_path", last], "stores other adapters (rank 4 → 8)"),
        ([*LORA, "--ckpt_path", last, "--model.init_from", last], "trained on another base"),
        (["--model.init_from", last, "--model.init_optimizer", "true"], "model.init_optimizer"),
    ):
        assert expected in mistake(*options)
