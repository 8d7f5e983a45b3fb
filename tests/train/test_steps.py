"""Checkpoints, validations and curves of a run that was stopped, killed or ended by a user's callback."""

import csv
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from ropepp_lit.arguments import call, command
from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.cli import main
from ropepp_lit.errors import UsageError
from ropepp_lit.train.cli import RecipeCLI
from ropepp_lit.train.plan import PlanCLI
from ropepp_lit.train.recipe import to_yaml, write_recipe

pytestmark = pytest.mark.end_to_end

ACCUMULATE = 3
BASE = [
    "--trainer.accumulate_grad_batches", ACCUMULATE, "--trainer.val_check_interval", 2 * ACCUMULATE,
    "--checkpoints.every_n_steps", 2, "--trainer.log_every_n_steps", 3, "--sample.max_new_tokens", 2,
    "--model.schedule.total_steps", 8, "--checkpoints.keep", 0,
]  # fmt: skip


@pytest.fixture(scope="module")
def fit(tiny, tmp_path_factory):
    """Trains in this process into a folder below that of the tests, with callbacks that are objects."""
    root = tmp_path_factory.mktemp("steps")
    before = Path.cwd()
    os.chdir(root)
    previous = signal.signal(signal.SIGTERM, lambda *_: None)

    def fit(folder, *options, callbacks=(), subcommand="fit"):
        def instantiate_trainer(self, **keywords):
            trainer = original(self, **keywords)
            trainer.callbacks[:0] = callbacks
            return trainer

        with pytest.MonkeyPatch.context() as patch:
            original = RecipeCLI.instantiate_trainer
            patch.setattr(RecipeCLI, "instantiate_trainer", instantiate_trainer)
            try:
                main([subcommand, *tiny, *map(str, [*BASE, "--trainer.default_root_dir", folder, *options])])
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        return root / folder

    yield fit
    signal.signal(signal.SIGTERM, previous)
    os.chdir(before)


@pytest.fixture(scope="module")
def whole(fit):
    """A run of 8 steps that nothing disturbed."""
    return fit("whole")


class KillError(Exception):
    """Takes the place of SIGKILL: nothing is saved or logged after it."""


class At(Callback):
    """Does something in a hook at a batch, counted from 0, or at a step."""

    def __init__(self, hook, action, *, batch=None, step=None):
        def act(trainer, module, *arguments):
            if (batch is None or arguments[-1] == batch) and (step is None or trainer.global_step == step):
                action(trainer)

        setattr(self, hook, act)


def stop(trainer):
    trainer.should_stop = True


def terminate(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


def kill(trainer):
    raise KillError


def curves(folder):
    """Values by name and step, from the raw records: a name that has two values at a step fails."""
    found = {}
    for path in sorted((folder / "tensorboard").glob("*.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                key = value.tag, event.step
                assert key not in found, key
                found[key] = value.simple_value
    return found


def assert_same_run(folder, whole, *, step=8):
    a, b = (read_checkpoint(run / f"checkpoints/step={step}.ckpt") for run in (folder, whole))
    assert a["global_step"] == b["global_step"] == step
    for name, value in b["state_dict"].items():
        assert torch.equal(a["state_dict"][name], value), name
    for key in ("tokens_seen", "validation", "train_loss"):
        assert a[KEY][key] == b[KEY][key], key
    assert a[KEY]["tokens_seen"] == step * ACCUMULATE * 2 * 64
    assert a["lr_schedulers"] == b["lr_schedulers"]
    positions = [run["loops"]["fit_loop"]["state_dict"]["combined_loader"] for run in (a, b)]
    assert positions[0] == positions[1]
    ours, theirs = curves(folder), curves(whole)
    assert ours.keys() == theirs.keys()
    assert all(ours[key] == value for key, value in theirs.items() if key[0] != "tokens_per_second")


# What ends the run at batch 13, the second of step 5: after it checkpoint and curves are those of step 4.
STOPS = {
    "a signal": (At("on_train_batch_end", terminate, batch=13), SystemExit),
    "a callback": (At("on_train_batch_end", stop, batch=13), None),
    "a callback after the step": (At("on_train_batch_end", stop, batch=14), None),
    "an early stop": (At("on_validation_end", stop, step=4), None),
    "a signal in the validation": (At("on_validation_batch_start", terminate, step=4), SystemExit),
    "an error": (At("on_train_batch_end", kill, batch=13), KillError),
    "an error before the validation": (At("on_validation_start", kill, step=4), KillError),
    "an error after the validation": (At("on_validation_end", kill, step=4), KillError),
    "an error in a save": (At("on_save_checkpoint", kill, step=6), KillError),
}


@pytest.mark.parametrize("stopped", STOPS)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(fit, whole, stopped):
    callback, error = STOPS[stopped]
    name = stopped.replace(" ", "_")
    if error is None:
        fit(name, callbacks=[callback])
    else:
        with pytest.raises(error):
            fit(name, callbacks=[callback])
    if stopped != "a callback after the step":  # it ends at step 5, which the whole run neither saves nor validates
        fit(name, "--ckpt_path", "auto")
        assert_same_run(Path(name), whole)
        return
    stored = read_checkpoint(f"{name}/checkpoints/last.ckpt")
    assert stored["global_step"] == 5
    assert {figures["step"] for figures in stored[KEY]["validation"].values()} == {5}
    assert [step for tag, step in curves(Path(name)) if tag == "val/loss"] == [2, 4, 5]
    fit(name, "--ckpt_path", "auto")
    assert [step for tag, step in curves(Path(name)) if tag == "val/loss"] == [2, 4, 5, 6, 8]


def test_readers_of_the_curves_see_each_step_once(fit, whole):
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


def test_killed_before_anything_was_saved(fit, whole):
    """The run begins again, in its first files."""
    for _ in range(2):
        with pytest.raises(KillError):
            fit("early", "--trainer.log_every_n_steps", 1, callbacks=[At("on_save_checkpoint", kill, step=2)])
    assert [step for tag, step in curves(Path("early")) if tag == "train/loss"] == [1, 2]
    fit("early", "--ckpt_path", "auto")
    assert_same_run(Path("early"), whole)


def test_a_csv_logger_goes_on_in_its_file(fit, whole):
    """A single logger that is no list; the version is found again."""
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "csv"]
    with pytest.raises(KillError):
        fit("csv", *logger, callbacks=[At("on_train_batch_start", kill, batch=23)])
    fit("csv", *logger, "--ckpt_path", "auto")
    fit("csv", *logger, "--ckpt_path", "csv/checkpoints/last.ckpt", subcommand="validate")
    (path,) = Path("csv").rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for name, steps in (("train/loss", [3, 6]), ("val/loss", [2, 4, 6, 8])):
        found = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert [step for step, _ in found] == steps
        theirs = curves(whole)
        assert [value for _, value in found] == pytest.approx([theirs[name, step] for step in steps])


def test_checkpoints_of_a_users_own(fit, whole, capsys):
    """They store the same state, and change nothing; a signal still ends in its code."""
    theirs = ModelCheckpoint(dirpath="own/theirs", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(SystemExit) as ended:
        fit("own", callbacks=[theirs, At("on_train_batch_end", terminate, batch=13)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert "saved as own/checkpoints/step=4.ckpt" in capsys.readouterr().out
    fit("own", "--ckpt_path", "auto", callbacks=[theirs])
    assert "Next:" in capsys.readouterr().out
    assert_same_run(Path("own"), whole)
    for step in (2, 4, 6, 8):
        assert Path(f"own/theirs/step={step}.ckpt").exists()
    fit("from_theirs", "--ckpt_path", "own/theirs/step=6.ckpt")
    a, b = (read_checkpoint(path / "checkpoints/step=8.ckpt") for path in (Path("from_theirs"), whole))
    assert all(torch.equal(a["state_dict"][name], value) for name, value in b["state_dict"].items())


def test_an_interval_that_is_no_whole_number_of_steps(fit):
    """Validations come at the ends of steps: batches 4, 8, … 24 are in steps 2, 3, 4, 6, 7 and 8."""
    folder = fit("odd", "--trainer.val_check_interval", 4)
    assert [step for tag, step in curves(folder) if tag == "val/loss"] == [2, 3, 4, 6, 7, 8]
    folder = fit("often", "--trainer.val_check_interval", 1, "--trainer.max_steps", 2)
    assert [step for tag, step in curves(folder) if tag == "val/loss"] == [1, 2]


def test_min_steps_do_not_keep_a_signal_from_stopping(fit, capsys):
    with pytest.raises(SystemExit):
        fit("least", "--trainer.min_steps", 8, callbacks=[At("on_train_batch_end", terminate, batch=4)])
    assert "Stopped by SIGTERM at step 1" in capsys.readouterr().out
    assert yaml.safe_load(Path("least/recipe.yaml").read_text())["trainer"]["min_steps"] == 8
    folder = fit("at_least", "--trainer.min_steps", 3, callbacks=[At("on_train_batch_end", stop, step=1)])
    assert Path(folder, "checkpoints/last.ckpt").readlink().name == "step=3.ckpt"


def test_a_damaged_newest_checkpoint(fit, whole, capsys):
    fit("damaged")
    folder = Path("damaged/checkpoints")
    for name in ("step=6.ckpt", "step=8.ckpt"):
        os.truncate(folder / name, 1000)
    fit("damaged", "--ckpt_path", "auto", "--trainer.max_steps", 7)
    printed = capsys.readouterr().out
    for step in (6, 8):
        assert f"{folder}/step={step}.ckpt is damaged: going on from {folder}/step=4.ckpt; it is" in printed
    assert read_checkpoint(folder / "step=6.ckpt")["global_step"] == 6
    assert (folder / "step=8.ckpt").stat().st_size == 1000
    (folder / "step=8.ckpt").write_bytes(b"")
    fit("damaged", "--ckpt_path", "auto")
    assert f"{folder}/step=8.ckpt is damaged: going on from {folder}/step=7.ckpt" in capsys.readouterr().out
    assert read_checkpoint(folder / "step=8.ckpt")["global_step"] == 8
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(SystemExit):
        fit("damaged", "--ckpt_path", "auto")
    assert f"{folder} holds damaged checkpoints only (step=2.ckpt, step=4.ckpt" in capsys.readouterr().err


def test_a_damaged_folder_of_shards(fit, capsys):
    shards = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"]
    shards += ["--trainer.limit_val_batches", 0]
    folder = fit("shards", *shards, "--trainer.max_steps", 4) / "checkpoints"
    (shard,) = (folder / "step=4.ckpt").glob("*.distcp")
    os.truncate(shard, shard.stat().st_size // 2)
    fit("shards", *shards, "--ckpt_path", "auto", "--trainer.max_steps", 4)
    assert "step=4.ckpt is damaged: going on from shards/checkpoints/step=2.ckpt" in capsys.readouterr().out
    (shard,) = (folder / "step=4.ckpt").glob("*.distcp")
    shard.unlink()
    fit("shards", *shards, "--ckpt_path", "auto", "--trainer.max_steps", 4)
    assert "step=4.ckpt is damaged" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fit("shards", *shards, "--ckpt_path", "shards/checkpoints/step=2.ckpt")
    assert "step=2.ckpt is step 2, and shards/checkpoints holds step 4" in capsys.readouterr().err


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


def test_a_dry_run_leaves_nothing(fit, capsys):
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


def test_a_run_without_a_step_is_no_success(fit, capsys):
    for options, callbacks, expected in (
        ([], [At("on_train_start", stop)], "the run ended without a step"),
        (["--trainer.max_time", "00:00:00:00"], [], "trainer.max_time: all of it is used up before a step"),
        (["--trainer.max_steps", 0], [], "trainer.max_steps: give the number of optimizer steps"),
    ):
        with pytest.raises(SystemExit) as ended:
            fit("none", *options, callbacks=callbacks)
        assert ended.value.code == 2
        assert expected in capsys.readouterr().err


TEXTS = [
    "1e3", "on", "Off", "y", "1:30", "null", "~", "", " a ", "-x", "--prompt", "a'b \"c\" $HOME \\n", "0x1f", "1_000",
    "[1, 2]", "{a: b}", "# no comment", "é→", ".5", "5.", "=", "<<", "!x", "&a", "*a", "%", "@", "`", "2020-01-01",
    "nan", ".inf", "- x", "x: y", "a\nb\n", "\ttab", "True", "?", "...", "---", "1", "+1", "0o7", "\u2028", "\x7f",
    "\U0001f600",
]  # fmt: skip


def test_recipes_are_read_back(tiny, tmp_path):
    """By the parser of `fit`, and by any other of YAML."""
    values = dict(zip(TEXTS, reversed(TEXTS), strict=True))
    recipe = {"data": {"validation": values, "source": {"a": 3e-3, "b": 2.0}}, "sample": {"prompt": "1e3"}}
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe), encoding="ascii")
    cli = PlanCLI(["fit", *tiny, "--config", str(tmp_path / "recipe.yaml")])
    assert yaml.safe_load(to_yaml(recipe)) == recipe
    read = cli._read_recipe(tmp_path / "recipe.yaml")
    assert read["data"]["validation"] == values
    assert read["data"]["source"] == {"a": 3e-3, "b": 2.0}
    assert read["sample"]["prompt"] == "1e3"


def test_recipes_with_callbacks_of_yaml_and_below_a_folder_that_looks_like_an_option(tiny, tmp_path, monkeypatch):
    """Timer's default is a member of an enumeration."""
    monkeypatch.chdir(tmp_path)
    timer = "{class_path: Timer, init_args: {duration: {minutes: 5}}}"
    cli = PlanCLI(["fit", *tiny, "--trainer.callbacks", f"[LearningRateMonitor, {timer}]"])
    write_recipe(Path("-run/recipe.yaml"), cli._as_plain(cli.config), cli._read_recipe)
    recipe = yaml.safe_load(Path("-run/recipe.yaml").read_text())
    assert recipe["trainer"]["callbacks"][1]["init_args"]["interval"] == "step"


def test_a_recipe_that_is_read_as_another_one_is_not_written(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(UsageError, match=r"read as it was given: sample\.prompt 'a' → 1000\.0"):
        write_recipe(path, {"sample": {"prompt": "a"}}, lambda path: {"sample": {"prompt": 1000.0}})
    assert not path.exists()


@pytest.mark.parametrize("text", TEXTS)
def test_commands_are_read_back(text):
    read = []

    def generate(checkpoint: str, *, prompt: str = "") -> None:
        read.append((checkpoint, prompt))

    words = shlex.split(command("ropepp-lit", "generate", f"runs/{text}", prompt=text))
    call(generate, words[1:])
    assert read == [(f"runs/{text}", text)]


def test_a_run_with_an_odd_prompt_and_folder(fit, run, capsys):
    """Its recipe and the commands that it prints work."""
    fit("it's", "--sample.prompt=1e3", "--trainer.max_steps", 1)
    printed = capsys.readouterr().out
    words = shlex.split(printed.partition("Next:")[2])
    assert words[:5] == ["ropepp-lit", "generate", "it's/checkpoints/last.ckpt", "--prompt", "1e3"]
    end = words.index("ropepp-lit", 6)
    main(words[6:end])
    assert "at step 1, " in capsys.readouterr().out
    start = words.index("fit")
    main(words[start : start + 7])
    assert "--- sample at step 2 ---" in capsys.readouterr().out


PROBES = """
import resource

import torch
from lightning.pytorch import Callback


class FullDisk(Callback):
    def on_train_start(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # as a full disk: the system writes no more than that


class NaN(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_start(self, trainer, module):
        loss = module._summed_loss

        def spoilt(batch):
            is_bad = trainer.training and trainer.global_step + 1 == self.step and trainer.global_rank == 1
            return loss(batch) * (torch.nan if is_bad else 1.0)

        module._summed_loss = spoilt
"""


def options_of(recipe, folder):
    (folder / "probes.py").write_text(PROBES)
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", "mine.yaml", "--trainer.default_root_dir", "run"]


def test_a_single_callback_that_saves(run, tiny, tmp_path):
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


def test_options_of_lightning_that_change_nothing(fit, whole):
    """Neither the run nor its curves; a validation before the first step is not in them."""
    options = ["--trainer.num_sanity_val_steps", 1, "--trainer.detect_anomaly", "true", "--trainer.profiler", "simple"]
    options += ["--trainer.inference_mode", "true", "--trainer.max_time", "01:00:00:00", "--trainer.min_steps", 4]
    options += ["--trainer.enable_model_summary", "true", "--trainer.enable_progress_bar", "false"]
    options += ["--trainer.deterministic", "true", "--trainer.callbacks", "EarlyStopping"]
    options += ["--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.patience", 100]
    assert_same_run(fit("options", *options), whole)
