"""Writing checkpoints in the background, what stops a run, and which folders it refuses."""

import gc
import os
import resource
import signal
import threading

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from ropepp_lit.checkpoint import KEY, decoder_weights, read_checkpoint
from ropepp_lit.cli import main
from ropepp_lit.errors import UsageError
from ropepp_lit.train import checkpoint_writer, garbage
from ropepp_lit.train.checkpoint_writer import CheckpointWriter
from ropepp_lit.train.checkpoints import check_folder
from ropepp_lit.train.cli import RecipeCLI

SHARDED = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"]


@pytest.fixture
def blocked(monkeypatch):
    """Holds up the writing of files until it is set."""
    event, save_file = threading.Event(), checkpoint_writer.save_file

    def held_up(checkpoint, path):
        assert event.wait(30)
        save_file(checkpoint, path)

    monkeypatch.setattr(checkpoint_writer, "save_file", held_up)
    yield event
    event.set()


def test_a_background_write_stores_the_state_of_its_step(tmp_path, blocked):
    weight, moment, figures = torch.ones(3), torch.ones(3), {"loss": 1.0}
    gathered = torch.full((3,), 5.0)  # made for the checkpoint alone
    state = {"weight": weight, "tied": weight, "view": weight[1:], "gathered": gathered}
    checkpoint = {"state_dict": state, "optimizer_states": [{"state": {0: {"m": moment}}}], "figures": figures}
    writer = CheckpointWriter(in_background=True, keep=0)
    writer.open()
    writer.save(checkpoint, tmp_path / "step=1.ckpt", is_sharded=False, live=[weight, moment])
    weight.fill_(7.0)
    moment.fill_(7.0)
    figures["loss"] = 7.0
    assert not list(tmp_path.glob("[!.]*"))
    assert not writer.has_failed
    blocked.set()
    writer.save(checkpoint, tmp_path / "step=2.ckpt", is_sharded=False, live=[weight, moment])  # waits for step 1
    assert (tmp_path / "step=1.ckpt").exists()
    writer.close()
    assert (tmp_path / "last.ckpt").readlink().name == "step=2.ckpt"
    for step, value in ((1, 1.0), (2, 7.0)):
        stored = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert {name: set(tensor.tolist()) for name, tensor in stored["state_dict"].items()} == {
            "weight": {value}, "tied": {value}, "view": {value}, "gathered": {5.0}
        }  # fmt: skip
        assert stored["state_dict"]["tied"].data_ptr() == stored["state_dict"]["weight"].data_ptr()
        assert stored["optimizer_states"][0]["state"][0]["m"].tolist() == [value] * 3
        assert stored["figures"] == {"loss": value}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]


def save_and_wait(writer, checkpoint, path):
    writer.save(checkpoint, path, is_sharded=False, live=[])
    writer.wait()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_file_that_cannot_be_written(tmp_path, in_background):
    writer = CheckpointWriter(in_background=in_background, keep=1)
    writer.open()
    small, large = ({"state_dict": {"weight": torch.zeros(size)}} for size in (10, 10**6))
    save_and_wait(writer, small, tmp_path / "step=1.ckpt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))  # as a full disk: the system writes no more than that
    try:
        with pytest.raises(UsageError, match=r"step=2\.ckpt: cannot be written: File too large; when that is fixed"):
            save_and_wait(writer, large, tmp_path / "step=2.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=1.ckpt"]
    assert (tmp_path / "last.ckpt").readlink().name == "step=1.ckpt"
    writer.close()


# Callbacks that the processes of a run import from the current folder.
CALLBACKS = '''
import os, resource, signal, threading, time, zlib

import torch
from lightning.pytorch import Callback

from ropepp_lit.train import checkpoint_writer


class Recorder(Callback):
    """Appends to a file, for each batch of rank 0, its number, a checksum and the number of broadcasts so far."""

    def __init__(self, path: str):
        self.path = path

    def on_train_start(self, *_):
        self.broadcasts, broadcast = 0, torch.distributed.broadcast

        def counted(*arguments, **keywords):
            self.broadcasts += 1
            return broadcast(*arguments, **keywords)

        torch.distributed.broadcast = counted

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.is_global_zero:
            with open(self.path, "a") as file:
                file.write(f"{batch_idx} {zlib.crc32(batch.input_ids.numpy().tobytes())} {self.broadcasts}\\n")


class KillWhileWriting(Recorder):
    """Ends rank 0 by SIGKILL in the middle of a write, once training has gone on for two steps."""

    def __init__(self, path: str, step: int):
        super().__init__(path)
        self.went_on, save_file = threading.Event(), checkpoint_writer.save_file
        self.step = step

        def half(checkpoint, path):
            save_file(checkpoint, path)
            if f"step={step}.ckpt" in str(path):
                os.truncate(path, path.stat().st_size // 2)
                assert self.went_on.wait(60)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint_writer.save_file = half

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step + 2:
            self.went_on.set()
            if trainer.is_global_zero:
                time.sleep(60)


class Signal(Recorder):
    """Sends a rank a signal in the middle of a batch."""

    def __init__(self, path: str, batch: int, rank: int = 0):
        super().__init__(path)
        self.batch, self.rank = batch, rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


class FullDisk(Callback):
    """Lets the last rank write no large file."""

    def on_train_start(self, trainer, *_):
        if trainer.global_rank == trainer.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


class Occupied(Callback):
    """Puts something in the place of a checkpoint."""

    def on_train_start(self, trainer, *_):
        if trainer.is_global_zero:
            os.makedirs("run/checkpoints/step=2.ckpt/something")
'''


@pytest.fixture
def callbacks(tmp_path):
    """Options that add one of the callbacks above to a run."""
    (tmp_path / "probes.py").write_text(CALLBACKS)

    def callbacks(name, **arguments):
        options = ["--trainer.callbacks+", f"probes.{name}"]
        return [*options, *(f"--trainer.callbacks.{key}={value}" for key, value in arguments.items())]

    return callbacks


def assert_same(one, other):
    """Two checkpoints store the same state, bit for bit."""
    a, b = read_checkpoint(one), read_checkpoint(other)
    assert a["global_step"] == b["global_step"]
    assert a[KEY]["tokens_seen"] == b[KEY]["tokens_seen"]
    positions = [checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] for checkpoint in (a, b)]
    assert positions[0] == positions[1]
    weights, others = decoder_weights(a), decoder_weights(b)
    assert weights.keys() == others.keys()
    assert all(torch.equal(others[name], value) for name, value in weights.items())


ONE, TWO_SHARDS = ("1",), ("2", *SHARDED)
TWO = ("2", "--trainer.strategy", "fsdp2")
ACCUMULATE = 2


@pytest.fixture(scope="module")
def train(run, tiny, tmp_path_factory):
    """Trains for 8 steps into a folder and records the batches; without a folder, once for each set of options."""
    root, done = tmp_path_factory.mktemp("whole"), {}

    def train(devices, *options, cwd=None, **keywords):
        key = (devices, *options)
        if cwd is None and key in done:
            return done[key]
        folder = cwd or root / str(len(done))
        folder.mkdir(exist_ok=True)
        (folder / "probes.py").write_text(CALLBACKS)
        length = ["--model.schedule.total_steps", 8, "--trainer.limit_val_batches", 0]
        length += ["--trainer.accumulate_grad_batches", ACCUMULATE, "--trainer.default_root_dir", "run"]
        if cwd is None:
            options = [*options, "--trainer.callbacks+", "probes.Recorder", "--trainer.callbacks.path=batches.txt"]
            done[key] = folder
        finished = run("fit", *tiny, *length, "--trainer.devices", devices, *options, cwd=folder, **keywords)
        return folder if cwd is None else finished

    return train


def batches(folder):
    """Checksums of the batches that a run has read; nothing was broadcast before any of them."""
    lines = (folder / "batches.txt").read_text().splitlines()
    assert [line for line in lines if not line.endswith(" 0")] == []
    return lines


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "kind", [ONE, TWO_SHARDS, pytest.param(TWO, marks=pytest.mark.slow)], ids=["file", "shards", "file of two"]
)
def test_killed_while_a_background_write_and_training_go_on(train, tmp_path, callbacks, kind):
    kind, background = list(kind), ["--checkpoints.async_save", "true"]
    killed = callbacks("KillWhileWriting", path="batches.txt", step=4)
    train(*kind, *background, *killed, cwd=tmp_path, returncode=-signal.SIGKILL)
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "last.ckpt").readlink().name == "step=2.ckpt"
    assert sorted(path.name for path in folder.iterdir()) == [".step=4.ckpt.partial", "last.ckpt", "step=2.ckpt"]
    before = batches(tmp_path)
    assert len(before) == 6 * ACCUMULATE  # the write of step 4 blocked no step
    again = callbacks("Recorder", path="batches.txt")
    train(*kind, *background, *again, "--ckpt_path", "auto", cwd=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=6.ckpt", "step=8.ckpt"]
    whole = train(*kind)
    assert batches(tmp_path)[len(before) :] == batches(whole)[2 * ACCUMULATE :]
    assert_same(folder / "last.ckpt", whole / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(UsageError, match=r"step=6\.ckpt is step 6, and .* holds step 8; continue it"):
        check_folder(folder, str(folder / "step=6.ckpt"))


@pytest.mark.end_to_end
def test_two_processes_stop_within_a_step(train, tmp_path, callbacks):
    """Rank 1 gets the signal in batch 9, the last of step 5; both stop after batch 10, the first of step 6."""
    stopped = callbacks("Signal", path="batches.txt", batch=9, rank=1)
    printed = train(*TWO_SHARDS, *stopped, cwd=tmp_path, returncode=128 + signal.SIGTERM).stdout
    assert "Stopped by SIGTERM at step 5, saved as run/checkpoints/step=5.ckpt." in printed
    train(*TWO_SHARDS, *callbacks("Recorder", path="batches.txt"), "--ckpt_path", "auto", cwd=tmp_path)
    whole = train(*TWO_SHARDS)
    assert batches(tmp_path) == batches(whole)[:11] + batches(whole)[10:]
    last = "run/checkpoints/last.ckpt"
    assert_same(tmp_path / last, whole / last)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("name", "in_background", "reason"),
    [("FullDisk", "true", "File too large"), ("Occupied", "false", "Directory not empty")],
)
def test_two_processes_end_when_one_cannot_write(run, tiny, tmp_path, callbacks, name, in_background, reason):
    options = [*SHARDED, "--trainer.devices", 2, "--trainer.max_steps", 1000, "--checkpoints.async_save", in_background]
    options += ["--trainer.limit_val_batches", 0, "--trainer.default_root_dir", "run", *callbacks(name)]
    errors = run("fit", *tiny, *options, cwd=tmp_path, returncode=2).stderr
    line = f"ropepp-lit: error: run/checkpoints/step=2.ckpt: cannot be written: {reason}; when that is fixed"
    assert errors.count(line) == 1, errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.partial"))


def test_lightning_still_broadcasts_in_the_method_that_is_replaced():
    """The tests above count its broadcasts; a Lightning that renamed the method would wait for the device unseen."""
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")


class End(Callback):
    """Ends training at a batch, by a signal or as EarlyStopping does."""

    def __init__(self, batch, by_signal):
        self.batch, self.by_signal = batch, by_signal

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            if self.by_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                trainer.should_stop = True


class Collections(Callback):
    """At which steps Python collects garbage."""

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
        [[] for _ in range(10_000)]  # would start a collection
        self.cycle = []
        self.cycle.append(self.cycle)

    def on_train_end(self, *_):
        gc.callbacks.remove(self.note)


@pytest.fixture
def fit(tiny, tmp_path, monkeypatch):
    """Trains in this process and the test's folder, with callbacks that are objects."""
    monkeypatch.chdir(tmp_path)
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # where a handler is missing the tests go on

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
def test_ended_within_a_step(fit, by_signal, capsys):
    """Batches 6 to 8 are step 3: what of it was read is read again, in the same bits as if nothing had ended."""
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
    fit(*options, "whole")
    assert_same("run/checkpoints/last.ckpt", "whole/checkpoints/last.ckpt")


class SignalInValidation(Callback):
    """Sends a signal in the first batch of a validation, and counts its batches."""

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


def test_garbage_is_collected_at_chosen_steps(fit, monkeypatch):
    monkeypatch.setattr(garbage, "_EVERY_N_STEPS", 3)
    collections = Collections()
    fit("--trainer.default_root_dir", "run", callbacks=[collections])
    assert collections.steps == [0, 3, 6]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_folder_is_not_continued_from_other_checkpoints_than_its_newest(fit, mistake):
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
    # In a folder of its own the older step is continued, and there `auto` stays on the branch.
    branch = ["--trainer.default_root_dir", "branch", "--model.schedule.total_steps", 8]
    fit(*branch, "--ckpt_path", "run/checkpoints/step=2.ckpt", "--trainer.max_steps", 3)
    fit(*branch, "--ckpt_path", "auto", "--trainer.max_steps", 4)
    assert sorted(os.listdir("branch/checkpoints")) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    # The link on the newest is as good as its name.
    fit("--trainer.default_root_dir", "run", "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_steps", 6)
    assert sorted(os.listdir("run/checkpoints")) == ["last.ckpt", "step=4.ckpt", "step=6.ckpt"]
