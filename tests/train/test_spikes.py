"""Loss spikes: rollback to a checkpoint, and skipping of the data."""

import itertools
import json

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from runs import KillError, assert_same, curves

from ropepp_lit.checkpoint import read_checkpoint
from ropepp_lit.data.sampler import RankBatches
from ropepp_lit.errors import UsageError
from ropepp_lit.train.run_log import read_run_log
from ropepp_lit.train.spikes import SpikeDetector, forget_skipped, skipped_samples


@pytest.mark.parametrize(("replicas", "rank"), [(1, 0), (2, 1)])
def test_skipped_samples(replicas, rank):
    skipped = [[4, 9], [9, 11], [20, 21]]
    batches = RankBatches(2, 6, skipped, batch_size=2, num_replicas=replicas, rank=rank)
    remaining = [number for number in range(2, 60) if not any(first <= number < end for first, end in skipped)]
    ours = [remaining[index : index + 2] for index in range(2 * rank, len(remaining), 2 * replicas)][:6]
    assert list(batches) == ours
    assert [samples[-1] for samples in batches.global_batches()] == remaining[2 * replicas - 1 :: 2 * replicas][:6]


def test_spike_detection():
    detector = SpikeDetector(z_score=6, window=40, patience=3)
    quiet = [3 + 0.01 * (step % 5) for step in range(40)]
    high = [None, *[9.0] * 2, quiet[0], *[9.0] * 3]  # two high steps are not a spike
    losses = [9.0, *quiet, float("nan"), *high[1:]]
    results = [(step, detector.add(step, loss)) for step, loss in enumerate(losses)]
    assert [(step, spike.step) for step, spike in results if spike is not None] == [(47, 45)]
    assert results[-1][1].mean == pytest.approx(3.02, abs=0.01)


def test_skipped_samples_of_a_folder(tmp_path):
    identity = {"names": ["texts"], "contents": [["digest", 1.0]], "context_length": 64, "seed": 0, "sources": []}
    path, stored = str(tmp_path / "step=1.ckpt"), tmp_path / "skipped.json"
    stored.write_text(json.dumps({"identity": identity, "skipped": [[2, 4]]}))
    assert skipped_samples(tmp_path, path, identity) == [[2, 4]]
    assert skipped_samples(tmp_path, path, {**identity, "seed": 1}) == []  # another data order
    for other in (None, "elsewhere/step=1.ckpt"):
        assert skipped_samples(tmp_path, other, identity) == []
    stored.write_text("{")
    with pytest.raises(UsageError, match=r"skipped\.json: damaged; remove it"):
        skipped_samples(tmp_path, path, identity)
    forget_skipped(tmp_path)
    assert skipped_samples(tmp_path, path, identity) == []


class Rise(Callback):
    """Multiply the loss of batches with a row that steps 24 to 26 read, or of all batches from step 24."""

    def __init__(self, *, for_ever=False, kill_at=None):
        self.for_ever, self.kill_at, self.visits = for_ever, kill_at, 0

    def on_train_start(self, trainer, module):
        rows, _ = trainer.datamodule.train_samples.__getitems__(list(range(46, 52)))
        known, loss = {row.numpy().tobytes() for row in rows[:, :-1]}, module._summed_loss

        def raised(batch, metric, count):
            value, is_high = loss(batch, metric, count), any(row.numpy().tobytes() in known for row in batch.input_ids)
            if not trainer.training or not (is_high or (self.for_ever and trainer.global_step >= 23)):
                return value
            metric.update(2 * value, 0)
            return 3 * value

        module._summed_loss = raised

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 21:
            self.visits += 1
            if self.visits == self.kill_at:
                raise KillError


RISE = [
    "--trainer.accumulate_grad_batches", 1, "--trainer.max_steps", 30, "--model.schedule.total_steps", 30,
    "--trainer.val_check_interval", 100, "--trainer.log_every_n_steps", 1, "--checkpoints.every_n_steps", 10,
    "--spikes.z_score", 8, "--spikes.window", 20, "--spikes.patience", 2, "--spikes.margin", 0,
]  # fmt: skip


@pytest.mark.end_to_end
def test_the_data_of_a_spike_are_skipped(fit, capsys):
    """In one command; also if the run is killed before the next checkpoint."""
    folder = fit("spike", *RISE, callbacks=[Rise()])
    printed = capsys.readouterr().out
    assert (
        printed.count(": rolling back to spike/checkpoints/step=20.ckpt and skipping samples 40 to 51 of the data\n")
        == 1
    )
    assert printed.count("Next:") == 1
    (event,) = (event for event in read_run_log(folder) if event["event"] == "rollback")
    assert (event["step"], event["to_step"], event["spike"]["step"], event["skipped_samples"]) == (26, 20, 24, [40, 52])
    assert event["spike"]["mean"] < event["spike"]["loss"] / 2
    assert [e["reason"] for e in read_run_log(folder) if e["event"] == "end"] == ["finished"]
    assert [step for name, step in curves(folder) if name == "train/loss"] == list(range(1, 31))
    last = read_checkpoint(folder / "checkpoints/last.ckpt")
    (position,) = last["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (position["samples"], position["skipped"]) == (52 + 10 * 2, [[40, 52]])

    # A run whose data position was set to that after the spike.
    stored = torch.load(folder / "checkpoints/step=20.ckpt", weights_only=True)
    stored["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["samples"] = 52
    torch.save(stored, "behind.ckpt")
    reference = fit("reference", *RISE, "--ckpt_path", "behind.ckpt")
    other = read_checkpoint(reference / "checkpoints/last.ckpt")
    weights = [checkpoint["state_dict"] for checkpoint in (last, other)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert last["lr_schedulers"] == other["lr_schedulers"]

    with pytest.raises(KillError):
        fit("killed", *RISE, callbacks=[Rise(kill_at=2)])
    killed = fit("killed", *RISE, "--ckpt_path", "auto", callbacks=[Rise()])
    assert_same(killed / "checkpoints/last.ckpt", folder / "checkpoints/last.ckpt")


@pytest.mark.end_to_end
def test_repeated_spikes(fit, capsys):
    """A checkpoint saved during the spike is deleted; without an earlier one the run continues."""
    often = [
        "--checkpoints.every_n_steps",
        4,
        "--spikes.patience",
        4,
        "--spikes.max_rollbacks",
        1,
        "--spikes.margin",
        5,
    ]
    with pytest.raises(SystemExit):
        fit("often", *RISE, *often, callbacks=[Rise(for_ever=True)])
    captured = capsys.readouterr()
    assert "back to often/checkpoints/step=16.ckpt and skipping samples 32 to" in captured.out
    assert "; deleted: step=20.ckpt, step=24.ckpt\n" in captured.out
    line = captured.err.strip().splitlines()[-1]
    assert "at step 24, and the run has rolled back as often as spikes.max_rollbacks allows (1). Lower model." in line
    suggested = line.partition(" before the spike: ")[2]
    assert "--ckpt_path often/checkpoints/step=20.ckpt --trainer.default_root_dir often-20" in suggested
    folder = fit("none", *RISE, "--checkpoints.every_n_steps", 100, callbacks=[Rise()])
    assert "and there is no checkpoint before it to roll back to." in capsys.readouterr().out
    assert [event["event"] for event in read_run_log(folder)].count("warning") == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("z_score", 0, "0.0 must be above 0"), ("window", 1, "1 must be 2 or"), ("patience", 0, "0 must be 1 or more")],
)
def test_wrong_options(mistake, option, value, message):
    assert f"spikes.{option}: {message}" in mistake(f"--spikes.{option}", value)


PROBES = """
from lightning.pytorch import Callback


class Rise(Callback):
    def on_train_start(self, trainer, module):
        loss, samples = module._summed_loss, trainer.datamodule.train_samples
        rows, _ = samples.__getitems__(list(range(2 * 46, 2 * 52)))
        known = {row.numpy().tobytes() for row in rows[:, :-1]}

        def raised(batch, metric, count):
            value = loss(batch, metric, count)
            if not any(row.numpy().tobytes() in known for row in batch.input_ids):
                return value
            metric.update(2 * value, 0)
            return 3 * value

        module._summed_loss = raised
"""
SHARDS = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"]
KINDS = {"shards": SHARDS, "fsdp2": ["--trainer.strategy", "fsdp2"], "ddp": ["--trainer.strategy", "ddp"]}


@pytest.mark.end_to_end
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_roll_back(run, tiny, tmp_path, kind):
    """The same processes continue; with accumulation."""
    (tmp_path / "probes.py").write_text(PROBES)
    recipe = {"trainer": {"callbacks": {"class_path": "probes.Rise"}, "limit_val_batches": 0, "devices": 2}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    options = [
        "--config",
        "mine.yaml",
        *RISE,
        *KINDS[kind],
        "--trainer.default_root_dir",
        "run",
        "--data.batch_size",
        1,
    ]
    finished = run("fit", *tiny, *options, "--trainer.accumulate_grad_batches", 2, cwd=tmp_path)
    assert finished.stdout.count("back to run/checkpoints/step=20.ckpt and skipping samples 80 to 103 of") == 1
    assert "Traceback" not in finished.stderr
    last = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    (position,) = last["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert last["global_step"] == 30
    assert (position["samples"], position["skipped"]) == (104 + 10 * 4, [[80, 104]])
    events = [event["event"] for event in read_run_log(tmp_path / "run")]  # a file is saved again at the end
    events = [event for event, _ in itertools.groupby(events)]
    assert events == ["start", "save", "rollback", "start", "resume", "save", "end"]
