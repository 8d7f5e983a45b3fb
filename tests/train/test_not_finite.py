"""NaN and infinite losses and gradients."""

import os
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from runs import assert_same, curves

from ropepp_lit.checkpoint import read_checkpoint
from ropepp_lit.train.run_log import read_run_log

pytestmark = pytest.mark.end_to_end


def bad(step, *, every=False):
    """Set the gradients of a step to NaN."""

    def set_nan(trainer):
        next(trainer.lightning_module.decoder.parameters()).grad[0] = torch.nan

    class Spoil(Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step + 1 == step or (every and trainer.global_step + 1 > step):
                set_nan(trainer)

    return Spoil()


class Poison(Callback):
    """Set the loss of batches with a certain row to NaN: the first row that step 50 reads."""

    def on_train_start(self, trainer, module):
        tokens, _ = trainer.datamodule.train_samples.__getitems__([98])
        loss = module._summed_loss

        def spoilt(batch, *arguments):
            is_bad = trainer.training and bool((batch.input_ids == tokens[0, :-1]).all(dim=1).any())
            return loss(batch, *arguments) * (torch.nan if is_bad else 1.0)

        module._summed_loss = spoilt


class SkipStep(Callback):
    """Remove the gradients before step 50."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step + 1 == 50:
            optimizer.zero_grad(set_to_none=True)


def test_a_document_with_a_nan_loss(fit, capsys):
    """The run stops, is continued by the printed command, and ends like one without step 50."""
    options = ["--trainer.accumulate_grad_batches", 1, "--trainer.max_steps", 52, "--checkpoints.every_n_steps", 20]
    options += ["--model.schedule.total_steps", 60, "--trainer.limit_val_batches", 0, "--trainer.log_every_n_steps", 4]
    with pytest.raises(SystemExit):
        fit("poisoned", *options, callbacks=[Poison()])
    line, _, suggested = capsys.readouterr().err.strip().splitlines()[-1].partition(" such steps: ")
    assert line == (
        "ropepp-lit: error: loss or gradients are NaN or infinite at step 50; the last good checkpoint is "
        "poisoned/checkpoints/step=40.ckpt. Lower model.optimizer.lr, or continue without"
    )
    assert suggested == "ropepp-lit fit --config poisoned/recipe.yaml --ckpt_path auto --model.on_nan skip"
    poisoned = fit("poisoned", *shlex.split(suggested)[2:], callbacks=[Poison()])
    printed = capsys.readouterr().out
    assert printed.count("Step 50 is skipped: its loss or gradients are NaN or infinite") == 1
    assert "Step 52 (1 of them skipped), 6,656 tokens read" in printed
    skipped = fit("skipped", *options, callbacks=[SkipStep()])
    assert_same(*(folder / "checkpoints/step=52.ckpt" for folder in (poisoned, skipped)))
    a, b = (read_checkpoint(folder / "checkpoints/step=52.ckpt") for folder in (poisoned, skipped))
    assert a["lr_schedulers"] == b["lr_schedulers"]
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (a, b)]
    assert all(torch.equal(states[1][n][key], value) for n, state in states[0].items() for key, value in state.items())
    # The resumed run restores the count.
    fit("poisoned", "--config", "poisoned/recipe.yaml", "--ckpt_path", "auto", "--trainer.max_steps", 56)
    assert "Step 56 (1 of them skipped)" in capsys.readouterr().out
    logged = curves(poisoned)
    assert [logged["skipped_steps", step] for step in (44, 48, 52, 56)] == [0, 0, 1, 1]
    assert all(value == value for (name, _), value in logged.items() if name == "train/loss")
    events = list(read_run_log(poisoned))
    assert [(e["step"], e["skipped_steps"]) for e in events if e["event"] == "skip"] == [(50, 1)]
    ends = [(e["reason"], e["step"], e["skipped_steps"]) for e in events if e["event"] == "end"]
    assert ends == [("diverged", 52, 0), ("finished", 52, 1), ("finished", 56, 1)]


@pytest.mark.parametrize(("step", "last"), [(6, 4), (2, None)])
def test_nan_ends_the_run(fit, capsys, step, last):
    """Before the sample, which would fail, and before the checkpoint."""
    folder = f"nan{step}"
    with pytest.raises(SystemExit) as ended:
        fit(folder, callbacks=[bad(step)])
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ropepp-lit")]
    where = f"the last good checkpoint is {folder}/checkpoints/step=4.ckpt" if last else "no checkpoint was saved"
    (line,) = errors
    assert line.startswith(f"ropepp-lit: error: loss or gradients are NaN or infinite at step {step}; {where}")
    names = sorted(os.listdir(f"{folder}/checkpoints")) if last else []
    assert names == (["last.ckpt", "step=2.ckpt", "step=4.ckpt"] if last else [])


def test_too_many_steps_are_skipped(fit, capsys):
    with pytest.raises(SystemExit):
        fit("skip_all", "--model.on_nan", "skip", "--trainer.max_steps", 20, callbacks=[bad(3, every=True)])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "NaN or infinite for 10 steps in a row, up to step 13; the last good checkpoint is skip_all/" in line


def test_weights_that_overflow_are_not_saved(fit, capsys):
    with pytest.raises(SystemExit):
        fit("overflow", "--model.optimizer.lr", 1e38, "--model.schedule.warmup_steps", 0)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "NaN or infinite at step" in line
    assert not Path("overflow/checkpoints").exists()


PROBES = """
import torch
from lightning.pytorch import Callback


class NaN(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_start(self, trainer, module):
        loss = module._summed_loss

        def spoilt(*arguments):
            is_bad = trainer.training and trainer.global_step + 1 == self.step and trainer.global_rank == 1
            return loss(*arguments) * (torch.nan if is_bad else 1.0)

        module._summed_loss = spoilt
"""


def options_of(recipe, folder):
    (folder / "probes.py").write_text(PROBES)
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", "mine.yaml", "--trainer.default_root_dir", "run"]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_agree_on_nan(run, tiny, tmp_path, strategy):
    """Only rank 1 has a bad loss."""
    callback = {"class_path": "probes.NaN", "init_args": {"step": 3}}
    options = options_of({"trainer": {"callbacks": callback, "devices": 2, "strategy": strategy}}, tmp_path)
    errors = run("fit", *tiny, *options, cwd=tmp_path, returncode=2).stderr
    line = "infinite at step 3; the last good checkpoint is run/checkpoints/step=2.ckpt."
    assert errors.count(line) == 1, errors
    assert "Traceback" not in errors
    options += ["--model.on_nan", "skip", "--ckpt_path", "auto", "--trainer.log_every_n_steps", 3]
    printed = run("fit", *tiny, *options, cwd=tmp_path).stdout
    assert printed.count("Step 3 is skipped") == 1
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 8
