"""Checkpoints, validations and logs of runs that are stopped, killed or ended by a user's callback."""

import csv
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import ACCUMULATE, At, KillError, assert_same_run, curves, kill, stop, terminate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ropepp_lit.checkpoint import KEY, read_checkpoint

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def baseline(fit):
    """Uninterrupted run of 8 steps."""
    return fit("baseline")


# Causes that end the run, most at batch 13, the second of step 5; checkpoint and logs are then those of step 4.
STOPS = {
    "a signal": (At("on_train_batch_end", terminate, batch=13), SystemExit),
    "a callback": (At("on_train_batch_end", stop, batch=13), None),
    "a callback after the step": (At("on_train_batch_end", stop, batch=14), None),
    "an early stop": (At("on_validation_end", stop, step=4), None),
    "a signal in the validation": (At("on_validation_batch_start", terminate, step=4), SystemExit),
    "an error": (At("on_train_batch_end", kill, batch=13), KillError),
    "an error before the validation": (At("on_validation_start", kill, step=4), KillError),
    "an error after the validation": (At("on_validation_end", kill, step=4), KillError),
    "an error before the last validation": (At("on_validation_start", kill, step=8), KillError),
    "an error in a save": (At("on_save_checkpoint", kill, step=6), KillError),
}


@pytest.mark.parametrize("stopped", STOPS)
def test_a_stopped_run_resumes_exactly(fit, baseline, stopped):
    callback, error = STOPS[stopped]
    name = stopped.replace(" ", "_")
    if error is None:
        fit(name, callbacks=[callback])
    else:
        with pytest.raises(error):
            fit(name, callbacks=[callback])
    if stopped != "a callback after the step":  # it ends at step 5, which the other run neither saves nor validates
        fit(name, "--ckpt_path", "auto")
        assert_same_run(Path(name), baseline)
        return
    stored = read_checkpoint(f"{name}/checkpoints/last.ckpt")
    assert stored["global_step"] == 5
    assert {figures["step"] for figures in stored[KEY]["validation"].values()} == {5}
    assert [step for tag, step in curves(Path(name)) if tag == "val/loss"] == [2, 4, 5]
    fit(name, "--ckpt_path", "auto")
    assert [step for tag, step in curves(Path(name)) if tag == "val/loss"] == [2, 4, 5, 6, 8]


def test_each_step_is_logged_once(fit, baseline):
    """Steps 5 and 6 were logged and not saved; `validate` logs nothing."""
    options = ["--trainer.log_every_n_steps", 1, "--checkpoints.every_n_steps", 4]
    with pytest.raises(KillError):
        fit("twice", *options, callbacks=[At("on_train_batch_start", kill, batch=7 * ACCUMULATE - 1)])
    assert max(step for _, step in curves(Path("twice"))) == 6
    fit("twice", *options, "--ckpt_path", "auto")
    fit("twice", "--ckpt_path", "twice/checkpoints/last.ckpt", subcommand="validate")
    events = EventAccumulator("twice/tensorboard").Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("val/loss")] == [2, 4, 6, 8]


def test_killed_before_the_first_checkpoint(fit, baseline):
    """The run restarts in the same files."""
    for _ in range(2):
        with pytest.raises(KillError):
            fit("early", "--trainer.log_every_n_steps", 1, callbacks=[At("on_save_checkpoint", kill, step=2)])
    assert [step for tag, step in curves(Path("early")) if tag == "train/loss"] == [1, 2]
    fit("early", "--ckpt_path", "auto")
    assert_same_run(Path("early"), baseline)


def test_a_csv_logger_continues_its_file(fit, baseline):
    """A single logger instead of a list; its version is reused."""
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "csv"]
    with pytest.raises(KillError):
        fit("csv", *logger, callbacks=[At("on_train_batch_start", kill, batch=23)])
    fit("csv", *logger, "--ckpt_path", "auto")
    fit("csv", *logger, "--ckpt_path", "csv/checkpoints/last.ckpt", subcommand="validate")
    (path,) = Path("csv").rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for name, steps in (("train/loss", [3, 6]), ("val/loss", [2, 4, 6, 8])):
        logged = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert [step for step, _ in logged] == steps
        theirs = curves(baseline)
        assert [value for _, value in logged] == pytest.approx([theirs[name, step] for step in steps])


def test_a_user_checkpoint_callback(fit, baseline, capsys):
    """They store the same state and do not affect the run; exit codes of signals are unchanged."""
    theirs = ModelCheckpoint(dirpath="own/theirs", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(SystemExit) as ended:
        fit("own", callbacks=[theirs, At("on_train_batch_end", terminate, batch=13)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert "saved as own/checkpoints/step=4.ckpt" in capsys.readouterr().out
    fit("own", "--ckpt_path", "auto", callbacks=[theirs])
    assert "Next:" in capsys.readouterr().out
    assert_same_run(Path("own"), baseline)
    for step in (2, 4, 6, 8):
        assert Path(f"own/theirs/step={step}.ckpt").exists()
    fit("from_theirs", "--ckpt_path", "own/theirs/step=6.ckpt")
    a, b = (read_checkpoint(path / "checkpoints/step=8.ckpt") for path in (Path("from_theirs"), baseline))
    assert all(torch.equal(a["state_dict"][name], value) for name, value in b["state_dict"].items())


def test_a_validation_interval_within_a_step(fit):
    """Validations run at the ends of steps: batches 4, 8, … 24 are in steps 2, 3, 4, 6, 7 and 8."""
    folder = fit("odd", "--trainer.val_check_interval", 4)
    assert [step for tag, step in curves(folder) if tag == "val/loss"] == [2, 3, 4, 6, 7, 8]
    folder = fit("often", "--trainer.val_check_interval", 1, "--trainer.max_steps", 2)
    assert [step for tag, step in curves(folder) if tag == "val/loss"] == [1, 2]


def test_min_steps_do_not_prevent_a_stop_by_signal(fit, capsys):
    with pytest.raises(SystemExit):
        fit("least", "--trainer.min_steps", 8, callbacks=[At("on_train_batch_end", terminate, batch=4)])
    assert "Stopped by SIGTERM at step 1" in capsys.readouterr().out
    assert yaml.safe_load(Path("least/recipe.yaml").read_text())["trainer"]["min_steps"] == 8
    folder = fit("at_least", "--trainer.min_steps", 3, callbacks=[At("on_train_batch_end", stop, step=1)])
    assert Path(folder, "checkpoints/last.ckpt").readlink().name == "step=3.ckpt"


def test_a_dry_run_writes_nothing(fit, capsys):
    before = sorted(Path().rglob("*"))
    fit("dry", "--trainer.fast_dev_run", 2, callbacks=[])
    printed = capsys.readouterr().out
    assert "Dry run: trained to step 2 and validated; nothing is saved." in printed
    assert "--- sample at step 2 ---" in printed
    assert sorted(Path().rglob("*")) == before
    fit("dry", "--trainer.max_steps", 4)
    after = {path: path.stat().st_mtime_ns for path in Path("dry").rglob("*")}
    capsys.readouterr()
    fit("dry", "--trainer.fast_dev_run", "true", "--ckpt_path", "auto")
    assert "trained to step 5" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("dry").rglob("*")} == after


def test_a_run_without_a_step_fails(fit, capsys):
    for options, callbacks, expected in (
        ([], [At("on_train_start", stop)], "the run ended without a step"),
        (["--trainer.max_time", "00:00:00:00"], [], "trainer.max_time: used up before the first step"),
        (["--trainer.max_steps", 0], [], "trainer.max_steps: give the number of optimizer steps"),
    ):
        with pytest.raises(SystemExit) as ended:
            fit("none", *options, callbacks=callbacks)
        assert ended.value.code == 2
        assert expected in capsys.readouterr().err


PROBES = """
import resource

from lightning.pytorch import Callback


class FullDisk(Callback):
    def on_train_start(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # simulates a full disk
"""


def options_of(recipe, folder):
    (folder / "probes.py").write_text(PROBES)
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", "mine.yaml", "--trainer.default_root_dir", "run"]


def test_a_single_checkpoint_callback(run, tiny, tmp_path):
    callback = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 4, "monitor": "train/loss"}}
    options = options_of({"trainer": {"callbacks": callback}}, tmp_path)
    printed = run("fit", *tiny, *options, cwd=tmp_path).stdout
    assert "Next:" in printed
    assert (tmp_path / "run/checkpoints/last.ckpt").readlink().name == "step=8.ckpt"
    assert list((tmp_path / "run/tensorboard").rglob("*.ckpt"))
    occupied = [*options, "--trainer.callbacks.dirpath", "run/checkpoints", "--ckpt_path", "auto"]
    errors = run("fit", *tiny, *occupied, cwd=tmp_path, returncode=2).stderr
    assert "run/checkpoints is where the run saves its own checkpoints; choose another dirpath" in errors


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_a_full_disk_ends_the_run_with_one_line(run, tiny, tmp_path, logger):
    options = options_of({"trainer": {"callbacks": {"class_path": "probes.FullDisk"}}}, tmp_path)
    options += [
        "--trainer.max_steps",
        1000,
        "--checkpoints.every_n_steps",
        1000,
        "--trainer.enable_progress_bar",
        "false",
    ]
    options += ["--trainer.logger", logger, "--trainer.logger.save_dir", "run"]
    options += ["--trainer.logger.flush_logs_every_n_steps", 1] if logger == "CSVLogger" else []
    errors = run("fit", *tiny, *options, cwd=tmp_path, returncode=2).stderr
    assert errors.count("ropepp-lit: error: the files of the run: cannot be written: File too large; when that is") == 1
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*.ckpt"))


def test_options_of_lightning_without_effect_on_results(fit, baseline):
    """Run and logs are unchanged; a sanity validation before the first step is not logged."""
    options = ["--trainer.num_sanity_val_steps", 1, "--trainer.detect_anomaly", "true", "--trainer.profiler", "simple"]
    options += ["--trainer.inference_mode", "true", "--trainer.max_time", "01:00:00:00", "--trainer.min_steps", 4]
    options += ["--trainer.enable_model_summary", "true", "--trainer.enable_progress_bar", "false"]
    options += ["--trainer.deterministic", "true", "--trainer.callbacks", "EarlyStopping"]
    options += ["--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.patience", 100]
    assert_same_run(fit("options", *options), baseline)
