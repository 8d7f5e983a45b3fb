"""Helpers for runs of a few steps: options, callbacks that end them, and comparisons."""

import os
import signal

import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from ropepp_lit.checkpoint import KEY, decoder_weights, read_checkpoint

ACCUMULATE = 3


BASE = [
    "--trainer.accumulate_grad_batches", ACCUMULATE, "--trainer.val_check_interval", 2 * ACCUMULATE,
    "--checkpoints.every_n_steps", 2, "--trainer.log_every_n_steps", 3, "--sample.max_new_tokens", 2,
    "--model.schedule.total_steps", 8, "--checkpoints.keep", 0,
]  # fmt: skip


class KillError(Exception):
    """Simulates SIGKILL: nothing is saved or logged after it."""


class At(Callback):
    """Run an action in a hook, at a batch (counted from 0) or at a step."""

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
    """Return logged values by name and step, from the raw records; fails if a name has two values at a step."""
    values = {}
    for path in sorted((folder / "tensorboard").glob("*.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                key = value.tag, event.step
                assert key not in values, key
                values[key] = value.simple_value
    return values


def assert_same_run(folder, baseline, *, step=8):
    a, b = (read_checkpoint(run / f"checkpoints/step={step}.ckpt") for run in (folder, baseline))
    assert a["global_step"] == b["global_step"] == step
    for name, value in b["state_dict"].items():
        assert torch.equal(a["state_dict"][name], value), name
    for key in ("tokens_seen", "validation", "train_loss"):
        assert a[KEY][key] == b[KEY][key], key
    assert a[KEY]["tokens_seen"] == step * ACCUMULATE * 2 * 64
    assert a["lr_schedulers"] == b["lr_schedulers"]
    positions = [run["loops"]["fit_loop"]["state_dict"]["combined_loader"] for run in (a, b)]
    assert positions[0] == positions[1]
    ours, theirs = curves(folder), curves(baseline)
    assert ours.keys() == theirs.keys()
    assert all(ours[key] == value for key, value in theirs.items() if key[0] != "tokens_per_second")


def assert_same(one, other):
    """Check that two checkpoints store the same state, bit for bit."""
    a, b = read_checkpoint(one), read_checkpoint(other)
    assert a["global_step"] == b["global_step"]
    assert a[KEY]["tokens_seen"] == b[KEY]["tokens_seen"]
    positions = [checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] for checkpoint in (a, b)]
    assert positions[0] == positions[1]
    weights, others = decoder_weights(a), decoder_weights(b)
    assert weights.keys() == others.keys()
    assert all(torch.equal(others[name], value) for name, value in weights.items())


KILLER = """
import os
from lightning.pytorch import Callback


class Kill(Callback):
    def __init__(self, at: int):
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.at:
            os.kill(os.getpid(), 9)
"""
"""User file with a callback that kills the process before a micro-batch."""
