"""Loss spikes: detection, rollback to an earlier checkpoint, and skipping of the data since then.

This is how PaLM was trained (arXiv 2204.02311, section 5.1): restarted from a checkpoint about 100 steps before the
spike, without the 200 to 500 batches around it, since spikes arise from specific data in a specific state of the
weights. As in OLMo-core's `SkipStepOptimizer`, a loss is high if it is a number of standard deviations above the mean
of the last steps.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ropepp_lit.arguments import command
from ropepp_lit.checkpoint import read_checkpoint
from ropepp_lit.data.comparison import continued_at
from ropepp_lit.errors import UsageError
from ropepp_lit.files import write_whole
from ropepp_lit.json_files import fits
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.checkpoint_writer import checkpoint_path
from ropepp_lit.train.checkpoints import Checkpoints, delete_later, folder_of
from ropepp_lit.train.finite import DivergedError
from ropepp_lit.train.summary import rank_zero_print

SKIPPED = "skipped.json"
"""File in the folder of checkpoints with the samples that the run skips, until a checkpoint stores them."""


class Spike(NamedTuple):
    """Persistent rise of the loss."""

    step: int
    """First step with a high loss."""
    mean: float
    """Mean of the losses before."""
    loss: float
    """Loss of the last step."""


class RollBack(Exception):  # noqa: N818 - no error
    """Signal to continue from a checkpoint before a spike; raised on all ranks after the same step.

    Args:
        spike: The spike.
        to_step: Step of the checkpoint.
        position: Data position, see :meth:`~ropepp_lit.data.loader.TrainLoader.state_dict`.
    """

    def __init__(self, spike: Spike, *, to_step: int, position: dict[str, Any]) -> None:
        super().__init__(f"a loss spike at step {spike.step}")
        self.spike, self.to_step, self.position = spike, to_step, position


class SpikeError(DivergedError):
    """The loss still spikes after the maximum number of rollbacks."""


class SpikeDetector:
    """Detector of losses that are high for consecutive steps.

    Args:
        z_score: Number of standard deviations above the mean beyond which a loss is high.
        window: Number of last steps, without high ones, for mean and standard deviation. At least half of them, and
            at least 20, are required.
        patience: Number of consecutive high steps that count as a spike.
    """

    def __init__(self, *, z_score: float, window: int, patience: int) -> None:
        self._z_score, self._patience = z_score, patience
        self._enough = min(window, max(20, window // 2))
        self.losses: deque[float] = deque(maxlen=window)
        self.first_high: int | None = None
        """First of the current consecutive high steps, or None."""

    def add(self, step: int, loss: float) -> Spike | None:
        """Add the loss of the next step; one that is not finite is ignored (`model.on_nan` handles it)."""
        if not -float("inf") < loss < float("inf"):
            return None
        if len(self.losses) >= self._enough:
            mean, deviation = statistics.fmean(self.losses), statistics.stdev(self.losses)
            if loss > mean + self._z_score * deviation:
                self.first_high = step if self.first_high is None else self.first_high
                is_spike = step - self.first_high + 1 >= self._patience
                return Spike(self.first_high, mean, loss) if is_spike else None
        self.first_high = None
        self.losses.append(loss)
        return None


class LossSpikes(Callback):
    """Rolls back to a checkpoint when the training loss spikes, and skips the data from there to the current step.

    The host reads the loss of each step, summed over all ranks (16 bytes), while the device computes the next one, so
    a spike is detected one step late.

    Args:
        z_score: Number of standard deviations above the mean of the last steps beyond which a loss is high; OLMo-core
            uses 6. Empty disables this.
        window: Number of last steps for mean and standard deviation; detection starts after half of them, at least 20.
        patience: Number of consecutive high steps that count as a spike.
        margin: Roll back to the newest checkpoint that is at least this many steps older than the spike (100 for
            PaLM), or else to the oldest checkpoint before the spike.
        max_rollbacks: Maximum number of rollbacks; the next spike ends the run.
    """

    def __init__(
        self,
        *,
        z_score: float | None = None,
        window: int = 128,
        patience: int = 3,
        margin: int = 100,
        max_rollbacks: int = 3,
    ) -> None:
        if z_score is not None and not z_score > 0:
            raise UsageError(f"spikes.z_score: {z_score} must be above 0, or empty for none")
        least = {"window": (window, 2), "patience": (patience, 1), "margin": (margin, 0)}
        for name, (value, bound) in {**least, "max_rollbacks": (max_rollbacks, 1)}.items():
            if value < bound:
                raise UsageError(f"spikes.{name}: {value} must be {bound} or more")
        self.is_on = z_score is not None
        self._z_score, self._patience = z_score or 0.0, patience
        self._margin, self._max_rollbacks = margin, max_rollbacks
        self._detector = SpikeDetector(z_score=self._z_score, window=window, patience=patience)
        self._pending: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    @property
    def description(self) -> str:
        """Description for the banner; empty if disabled."""
        if not self.is_on:
            return ""
        return f"loss spike ({self._z_score:g} standard deviations, {self._patience} steps): roll back to a checkpoint"

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Sum the loss of the step over the ranks, and start its copy to the host."""
        if not self.is_on:
            return
        assert isinstance(pl_module, CausalLM)
        added = pl_module.step_state.since(pl_module.train_loss)
        sums = torch.stack([added["nats"], added["tokens"].to(added["nats"].dtype)])
        event = torch.cuda.Event() if sums.is_cuda else None
        sums = trainer.strategy.reduce(sums, reduce_op="sum").to("cpu", non_blocking=event is not None)
        if event is not None:
            event.record()
        self._pending.append((trainer.global_step + 1, sums, event))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Check the loss of the previous step.

        Raises:
            RollBack: its loss is part of a spike.
            SpikeError: the maximum number of rollbacks is reached.
        """
        while len(self._pending) > 1:
            step, sums, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            nats, tokens = sums.tolist()
            spike = self._detector.add(step, nats / tokens) if tokens else None
            if spike is not None:
                assert isinstance(pl_module, CausalLM)
                self._roll_back(trainer, pl_module, spike)

    def _roll_back(self, trainer: pl.Trainer, module: CausalLM, spike: Spike) -> None:
        rose = f"the loss rose from {spike.mean:.3f} to {spike.loss:.3f} at step {spike.step:,}"
        position = module.step_state.position
        (checkpoints,) = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
        steps = checkpoints.saved_before(trainer, spike.step)
        number = len(position.get("skipped", ()))
        if number >= self._max_rollbacks:
            raise SpikeError(
                f"{rose}, and the run has rolled back as often as spikes.max_rollbacks allows ({number}). "
                f"{_remedy(trainer, steps)}"
            )
        if not steps:
            rank_zero_print(f"\nNotice: {rose}, and there is no checkpoint before it to roll back to.")
            module.run_log.write("warning", step=trainer.global_step, reason=f"{rose}; no checkpoint before it")
            self._detector.losses.clear()
            return
        older = [step for step in steps if step <= spike.step - self._margin]
        raise RollBack(spike, to_step=max(older) if older else min(steps), position=position)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, so that a resumed run detects the same spikes; waits for the device."""
        if not self.is_on:
            return {}
        pending = []
        for step, sums, event in self._pending:
            if event is not None:
                event.synchronize()
            pending.append([step, *sums.tolist()])
        detector = self._detector
        return {"losses": list(detector.losses), "first_high": detector.first_high, "pending": pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the losses of a checkpoint.

        Raises:
            UsageError: the values are not those that :meth:`state_dict` returns.
        """
        expected = {"losses": list[float], "first_high": int | None, "pending": list[list[int | float]]}
        if state_dict and not all(fits(state_dict.get(name), hint) for name, hint in expected.items()):
            raise UsageError("ckpt_path: damaged: its losses for spikes are not those of a run; continue from another")
        self._detector.losses.extend(state_dict["losses"])
        self._detector.first_high = state_dict["first_high"]
        self._pending = [(step, torch.tensor(sums, dtype=torch.float64), None) for step, *sums in state_dict["pending"]]


def _remedy(trainer: pl.Trainer, steps: list[int]) -> str:
    """Return what to do when rolling back does not help; continuing an earlier step requires another folder."""
    folder = Path(trainer.default_root_dir)
    if not steps:
        return "Lower model.optimizer.lr, and restart in another --trainer.default_root_dir"
    path, other = checkpoint_path(folder_of(folder), max(steps)), folder.with_name(f"{folder.name}-{max(steps)}")
    options = {"config": folder / "recipe.yaml", "ckpt_path": path, "trainer__default_root_dir": other}
    return f"Lower model.optimizer.lr, and continue from before the spike: {command('ropepp-lit', 'fit', **options)}"


def roll_back(path: Path, rollback: RollBack, model: CausalLM) -> None:
    """Make a checkpoint the newest one, and store which samples to skip. Call it on rank 0.

    Args:
        path: Path of the checkpoint.
        rollback: The exception that ended the run.
        model: Model of the run that ended.
    """
    spike, folder = rollback.spike, path.parent
    position = read_checkpoint(path, shapes_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    first, end = position["samples"], rollback.position["samples"]
    skipped = [*rollback.position.get("skipped", []), [first, end]]
    stored = {"identity": rollback.position["identity"], "skipped": skipped}
    write_whole(folder / SKIPPED, json.dumps(stored))  # first, in case the process is killed
    deleted = [other.name for other in delete_later(path)]
    suffix = f"; deleted: {', '.join(deleted)}" if deleted else ""
    print(
        f"\nThe loss rose from {spike.mean:.3f} to {spike.loss:.3f} at step {spike.step:,}: rolling back to {path} and "
        f"skipping samples {first:,} to {end - 1:,} of the data{suffix}",
        flush=True,
    )
    model.run_log.write(
        "rollback", step=model.steps_taken, checkpoint=str(path), to_step=rollback.to_step, spike=spike._asdict(),
        skipped_samples=[first, end], deleted=deleted,
    )  # fmt: skip


def forget_skipped(folder: Path) -> None:
    """Delete the record of skipped samples of an earlier run in a folder of checkpoints, when a new run starts."""
    (folder / SKIPPED).unlink(missing_ok=True)


def skipped_samples(folder: Path, ckpt_path: str | None, identity: dict[str, Any]) -> list[list[int]]:
    """Return the ranges of samples, [first, end), that a run skips after rollbacks; empty if the data have changed.

    Args:
        folder: Folder of the checkpoints.
        ckpt_path: Checkpoint from which the run continues; None skips no samples.
        identity: Identity of the data, see :func:`~ropepp_lit.data.comparison.identity_of`.

    Raises:
        UsageError: the file of skipped samples is damaged.
    """
    if ckpt_path is None or Path(ckpt_path).resolve().parent != folder.resolve():
        return []
    try:
        stored = json.loads((folder / SKIPPED).read_text(encoding="utf-8"))
        _, reason = continued_at({"samples": 0, "identity": stored["identity"]}, identity)
        return [] if reason else [[int(first), int(end)] for first, end in stored["skipped"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / SKIPPED}: damaged; remove it to read the skipped data") from error
