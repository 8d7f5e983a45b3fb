"""Runs that end within a step or a validation, and folders that a run refuses."""

import gc
import os
import signal

import pytest
from lightning.pytorch import Callback
from runs import assert_same

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.cli import main
from ropepp_lit.train import garbage
from ropepp_lit.train.cli import RecipeCLI


class End(Callback):
    """End training at a batch, by a signal or like EarlyStopping."""

    def __init__(self, batch, by_signal):
        self.batch, self.by_signal = batch, by_signal

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            if self.by_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                trainer.should_stop = True


class Collections(Callback):
    """Record the steps at which Python collects garbage."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, module):
        def note(phase, info):
            if phase == "start":
                self.steps.append(trainer.global_step)

        self.note = note
        gc.callbacks.append(note)

    def on_train_batch_end(self, trainer, *_):
        assert not gc.isenabled()
        [[] for _ in range(10_000)]  # would trigger a collection
        self.cycle = []
        self.cycle.append(self.cycle)

    def on_train_end(self, *_):
        gc.callbacks.remove(self.note)


@pytest.fixture
def fit(tiny, tmp_path, monkeypatch):
    """Train in this process, in the test's folder; callbacks are objects."""
    monkeypatch.chdir(tmp_path)
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # so that the tests survive a missing handler

    def fit(*options, callbacks=()):
        def instantiate_trainer(self, **keywords):
            trainer = original(self, **keywords)
            trainer.callbacks[:0] = callbacks
            return trainer

        with monkeypatch.context() as patch:
            original = RecipeCLI.instantiate_trainer
            patch.setattr(RecipeCLI, "instantiate_trainer", instantiate_trainer)
            main(["fit", *tiny, "--trainer.limit_val_batches", "0", *map(str, options)])

    yield fit
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("by_signal", [True, False])
def test_stopped_within_a_step(fit, by_signal, capsys):
    """Batches 6 to 8 are step 3: they are read again, and the result is bit-identical to an uninterrupted run."""
    options = ["--trainer.accumulate_grad_batches", 3, "--trainer.max_steps", 4, "--trainer.default_root_dir"]
    if by_signal:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            fit(*options, "run", callbacks=[End(7, by_signal)])
        assert "Stopped by SIGTERM at step 2, saved as run/checkpoints/step=2.ckpt." in capsys.readouterr().out
    else:
        fit(*options, "run", "--checkpoints.every_n_steps", 100, callbacks=[End(7, by_signal)])
    stored = read_checkpoint("run/checkpoints/last.ckpt")
    assert stored["global_step"] == 2
    assert stored[KEY]["tokens_seen"] == 2 * 3 * 2 * 64
    assert stored["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["samples"] == 2 * 3 * 2
    fit(*options, "run", "--ckpt_path", "auto")
    fit(*options, "baseline")
    assert_same("run/checkpoints/last.ckpt", "baseline/checkpoints/last.ckpt")


class SignalInValidation(Callback):
    """Send a signal in the first batch of a validation, and count its batches."""

    def __init__(self):
        self.batches = 0

    def on_validation_batch_start(self, *_):
        self.batches += 1
        if self.batches == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_in_a_validation(fit, capsys):
    callback = SignalInValidation()
    options = ["--trainer.val_check_interval", 3, "--trainer.limit_val_batches", 4]
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        fit(*options, "--trainer.default_root_dir", "run", callbacks=[callback])
    assert "Stopped by SIGTERM at step 3, saved as run/checkpoints/step=3.ckpt." in capsys.readouterr().out
    assert callback.batches == 1


def test_stopped_before_the_first_step(fit, capsys):
    options = ["--trainer.accumulate_grad_batches", 3, "--trainer.default_root_dir", "run", "--ckpt_path", "auto"]
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        fit(*options, callbacks=[End(1, by_signal=True)])
    assert "Stopped by SIGTERM at step 0, before anything was saved. Continue:" in capsys.readouterr().out
    assert not os.path.exists("run/checkpoints/last.ckpt")
    fit(*options, "--trainer.max_steps", 2)
    assert "Continuing" not in capsys.readouterr().out


def test_garbage_is_collected_at_fixed_steps(fit, monkeypatch):
    monkeypatch.setattr(garbage, "_EVERY_N_STEPS", 3)
    collections = Collections()
    fit("--trainer.default_root_dir", "run", callbacks=[collections])
    assert collections.steps == [0, 3, 6]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_folder_is_only_continued_from_its_newest_checkpoint(fit, mistake):
    fit("--trainer.max_steps", 4, "--trainer.default_root_dir", "run")
    fit("--trainer.max_steps", 2, "--trainer.default_root_dir", "other")
    before = {
        path: os.stat(path).st_mtime_ns for path in ("run/checkpoints/step=2.ckpt", "run/checkpoints/step=4.ckpt")
    }
    hint = "continue it by --ckpt_path auto, or choose another --trainer.default_root_dir"
    older = mistake("--trainer.default_root_dir", "run", "--ckpt_path", "run/checkpoints/step=2.ckpt")
    assert f"run/checkpoints/step=2.ckpt is step 2, and run/checkpoints holds step 4; {hint}" in older
    for path in ([], ["--ckpt_path", "other/checkpoints/last.ckpt"]):
        another = mistake("--trainer.default_root_dir", "run", *path)
        assert f"run/checkpoints holds checkpoints of an earlier run (step 4); {hint}" in another
    assert before == {path: os.stat(path).st_mtime_ns for path in before}
    # In another folder the older step can be continued, and `auto` then continues the branch.
    branch = ["--trainer.default_root_dir", "branch", "--model.schedule.total_steps", 8]
    fit(*branch, "--ckpt_path", "run/checkpoints/step=2.ckpt", "--trainer.max_steps", 3)
    fit(*branch, "--ckpt_path", "auto", "--trainer.max_steps", 4)
    assert sorted(os.listdir("branch/checkpoints")) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    # The link to the newest checkpoint is equivalent to its path.
    fit("--trainer.default_root_dir", "run", "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_steps", 6)
    assert sorted(os.listdir("run/checkpoints")) == ["last.ckpt", "step=4.ckpt", "step=6.ckpt"]
