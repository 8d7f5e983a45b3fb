"""The LightningModule: a decoder, its optimizer and schedule, and what is measured on the way."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ropepp_lit.checkpoint import FORMAT_VERSION, KEY, describe_architecture
from ropepp_lit.data.token_data import Batch, TokenData, replica_of
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, PositionScheme
from ropepp_lit.nn.loss import IGNORE_INDEX
from ropepp_lit.train.metrics import TokenLoss
from ropepp_lit.train.optimizer import OptimizerConfig
from ropepp_lit.train.schedule import Schedule

_IN_PROGRESS_BAR = {"train/loss", "val/loss", "tokens_per_second", "lr", "gradient_norm"}


class CausalLM(LightningModule):
    """A causal language model in training: any geometry, position scheme and frequencies.

    Args:
        decoder: Geometry, or a size of the paper by name.
        positions: Position scheme.
        frequencies: Base and scaling of the rotary frequencies.
        optimizer: Optimizer and its settings.
        schedule: Learning rate by steps.
    """

    def __init__(
        self,
        *,
        decoder: DecoderConfig,
        positions: PositionScheme,
        frequencies: Frequencies,
        optimizer: OptimizerConfig,
        schedule: Schedule,
    ) -> None:
        super().__init__()
        self.config = decoder
        self.scheme = positions
        self.frequencies = frequencies
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.recipe: dict[str, Any] | None = None
        """The run's whole recipe; the command sets it, and checkpoints carry it."""
        self.tokens_seen = 0
        """Tokens that all ranks have read since the run began."""
        self.last_validation: dict[str, float] | None = None
        """What the newest validation found, the `step` it was made at, and how many `tokens` it predicted."""
        self.train_loss, self.val_loss = TokenLoss(), TokenLoss()
        self._gradient_norm: Tensor | None = None
        self._timer = _Timer()

    def configure_model(self) -> None:
        """Build the decoder (Lightning calls this once the precision and the strategy are known)."""
        if not hasattr(self, "decoder"):
            self.decoder = Decoder(self.config, self.scheme, self.frequencies)

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule by steps."""
        optimizer = self.optimizer_config.build(self.decoder)
        self._recipe_groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        return self.schedule.factor(step, self.schedule.total_steps or self.trainer.max_steps)

    def on_train_start(self) -> None:
        """Let the recipe rule: Lightning has restored learning rates and the like of the checkpoint's run."""
        for optimizer, scheduler in zip(self.trainer.optimizers, self._schedulers(), strict=True):
            for group, recipe in zip(optimizer.param_groups, self._recipe_groups, strict=True):
                group.update(recipe, initial_lr=recipe["lr"])
                group["lr"] = recipe["lr"] * self._lr_factor(self.global_step)
            scheduler.base_lrs = [recipe["lr"] for recipe in self._recipe_groups]
        self._timer.start(self.tokens_seen)

    def _schedulers(self) -> list[Any]:
        return [config.scheduler for config in self.trainer.lr_scheduler_configs]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss to descend: summed over the labels that count, divided by all places of the batch.

        The divisor is the same for every batch, so a token weighs the same however the rows are spread over
        micro-batches and ranks.
        """
        loss = self._summed_loss(batch)
        self.train_loss.update(loss, (batch.labels != IGNORE_INDEX).sum())
        self.tokens_seen += batch.input_ids.numel() * replica_of(self.trainer)["num_replicas"]
        return loss / batch.labels.numel()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the loss over the labels that count."""
        self.val_loss.update(self._summed_loss(batch), (batch.labels != IGNORE_INDEX).sum())

    def _summed_loss(self, batch: Batch) -> Tensor:
        return self.decoder(batch.input_ids, labels=batch.labels, documents=batch.documents, reduction="sum")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, and keep the norm to be logged."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        limit = gradient_clip_val if gradient_clip_val and gradient_clip_algorithm != "value" else math.inf
        self._gradient_norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), limit)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Every `log_every_n_steps` optimizer steps, log what happened since the last time."""
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._gradient_norm is None or self.global_step % interval:
            return
        loss, _ = self.train_loss.compute()
        self.train_loss.reset()
        values = self._metrics("train", loss)
        values["tokens_per_second"] = self._timer.rate(self.tokens_seen)
        values["tokens_seen"] = float(self.tokens_seen)
        values["lr"] = self._schedulers()[0].get_last_lr()[0]
        values["gradient_norm"] = self._gradient_norm
        self._gradient_norm = None
        for name, value in values.items():
            self.log(name, value, prog_bar=name in _IN_PROGRESS_BAR, rank_zero_only=True)

    def on_validation_start(self) -> None:
        """Stop the clock of training."""
        self._timer.pause()

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte over the whole validation set."""
        loss, tokens = self.val_loss.compute()
        self.val_loss.reset()
        values = self._metrics("val", loss)
        for name, value in values.items():
            self.log(name, value, prog_bar=name in _IN_PROGRESS_BAR, rank_zero_only=True)
        if not self.trainer.sanity_checking:
            self.last_validation = {name: float(value) for name, value in values.items()} | {"tokens": float(tokens)}

    def on_validation_end(self) -> None:
        """Let the clock of training run on."""
        self._timer.resume()

    def _metrics(self, stage: str, loss: Tensor) -> dict[str, Tensor | float]:
        values: dict[str, Tensor | float] = {f"{stage}/loss": loss, f"{stage}/perplexity": loss.exp()}
        values["step"] = float(self.global_step)  # else Lightning counts from 0
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, TokenData):
            split = {"train": "train", "val": "validation"}[stage]
            values[f"{stage}/bits_per_byte"] = loss / math.log(2) / datamodule.bytes_per_token(split)
        return values

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what :mod:`ropepp_lit.checkpoint` describes."""
        datamodule = getattr(self.trainer, "datamodule", None)
        manifest = getattr(datamodule, "manifest", None)
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "architecture": describe_architecture(self.config, self.scheme, self.frequencies),
            "optimizer": type(self.optimizer_config).__name__,
            "recipe": self.recipe,
            "tokenizer": getattr(datamodule, "tokenizer_json", None),
            "bos_token_id": getattr(manifest, "bos_token_id", None),
            "eos_token_id": getattr(manifest, "eos_token_id", None),
            "tokens_seen": self.tokens_seen,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the count of tokens, and count batches as this recipe accumulates them."""
        self.tokens_seen = checkpoint[KEY]["tokens_seen"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False  # the run may go on beyond the steps it was first meant to take
        batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for counts in (progress["current"], progress["total"]):
            behind = counts["ready"] - counts["completed"]
            counts.update({"ready": batches, "started": batches, "processed": batches, "completed": batches - behind})


class _Timer:
    """Tokens per second of training, validation not counted."""

    def __init__(self) -> None:
        self._paused_at: float | None = None

    def start(self, tokens: int) -> None:
        self._since, self._tokens = time.perf_counter(), tokens

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        if self._paused_at is not None and hasattr(self, "_since"):
            self._since += time.perf_counter() - self._paused_at
        self._paused_at = None

    def rate(self, tokens: int) -> float:
        now = time.perf_counter()
        rate = (tokens - self._tokens) / (now - self._since)
        self.start(tokens)
        return rate
