"""Losses and gradients that are NaN or infinite."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from runs import ACCUMULATE, curves

from ropepp_lit.checkpoint import KEY, read_checkpoint

pytestmark = pytest.mark.end_to_end


def bad(step, *, every=False):
    """Makes the gradients of a step NaN."""

    def spoil(trainer):
        next(trainer.lightning_module.decoder.parameters()).grad[0] = torch.nan

    class Spoil(Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step + 1 == step or (every and trainer.global_step + 1 > step):
                spoil(trainer)

    return Spoil()


@pytest.mark.parametrize(("step", "last"), [(5, 4), (6, 4), (2, None)])
def test_nan_ends_the_run(fit, capsys, step, last):
    """Before the sample, which would fail, and before the step is saved."""
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


def test_nan_is_skipped(fit, capsys):
    """Step 3 reads its data and changes nothing but the schedule; the curve leaves its loss out."""
    folder = fit("skip", "--model.on_nan", "skip", "--checkpoints.every_n_steps", 1, callbacks=[bad(3)])
    assert capsys.readouterr().out.count("Step 3 is skipped") == 1
    two, three, four = (read_checkpoint(folder / f"checkpoints/step={step}.ckpt") for step in (2, 3, 4))
    assert all(torch.equal(two["state_dict"][name], value) for name, value in three["state_dict"].items())
    assert not all(torch.equal(three["state_dict"][name], value) for name, value in four["state_dict"].items())
    assert three[KEY]["tokens_seen"] == 3 * ACCUMULATE * 2 * 64
    assert all(value == value for (name, _), value in curves(folder).items() if name == "train/loss")
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
def test_two_processes_decide_alike_about_nan(run, tiny, tmp_path, strategy):
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
