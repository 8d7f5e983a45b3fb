"""The LightningModule that trains a decoder: the last step of the reading path that starts at the position schemes.

In an optimizer step, `training_step` computes the loss of each micro-batch by :meth:`~ropepp_lit.nn.Decoder.loss`,
`configure_gradient_clipping` averages and clips the gradients (`gradients.py`), `optimizer_step` records the state that
a checkpoint of this step stores (`step_state.py`), and `on_train_batch_end` logs. Other modules of this package decide
how the decoder is built (`build.py`) and sharded (`parallel.py`), where a run resumes (`checks.py`), and when it
validates (`validations.py`) and saves (`checkpoints.py`).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ropepp_lit.checkpoint import FORMAT_VERSION, KEY, describe_architecture
from ropepp_lit.data.batch import Batch
from ropepp_lit.data.conversations import merge_settings
from ropepp_lit.data.loader import replica_of
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, PositionScheme
from ropepp_lit.train.build import build_decoder
from ropepp_lit.train.finite import DivergedError, FiniteSteps, OnNaN, check_weights
from ropepp_lit.train.fsdp import FSDP2Strategy, full_tensor
from ropepp_lit.train.gradients import finish_gradients
from ropepp_lit.train.lora import Adapters, LoRA
from ropepp_lit.train.loss_average import LossAverage, StepAverage, choose_average
from ropepp_lit.train.memory_options import check_memory_options
from ropepp_lit.train.metric_logging import log_metrics, metric_values
from ropepp_lit.train.metrics import TokenLoss
from ropepp_lit.train.optimizer import OptimizerConfig
from ropepp_lit.train.optimizer_state import apply_recipe, build_optimizer, load_optimizer_state
from ropepp_lit.train.pair_training import PairTraining
from ropepp_lit.train.preference import Preference
from ropepp_lit.train.run_log import RunLog
from ropepp_lit.train.schedule import Schedule
from ropepp_lit.train.signals import StopRequest
from ropepp_lit.train.step_state import StepState, recount_batches
from ropepp_lit.train.throughput import Throughput
from ropepp_lit.train.validations import metrics_to_log, read_losses, validate_by_steps, validate_if_due, validated_step


class CausalLM(LightningModule):
    """A causal language model to train, of any geometry, position scheme and frequencies.

    Args:
        decoder: Geometry, or the name of one of the paper's sizes.
        positions: Position scheme.
        frequencies: Base and scaling of the rotary frequencies.
        optimizer: Optimizer and its settings.
        activation_checkpointing: Checkpoint every Nth block: store only its input, and recompute it in the backward
            pass. 1 checkpoints every block, 0 none. `attention` checkpoints every block but also stores the outputs of
            attention, which is not recomputed.
        offload_activations: Store the inputs of checkpointed blocks in CPU memory; GPUs only.
        mlp_chunk_tokens: Compute the SwiGLU layers in chunks of this many tokens of a row, and recompute them in the
            backward pass; empty disables chunking.
        attention_head_groups: Number of head groups that attention layers compute sequentially, and recompute in the
            backward pass; a divisor of the number of key/value heads. 1 disables grouping.
        compile: Compile each block with torch.compile; empty means on CUDA only, and not with offload_activations.
        attention: Attention kernel on CUDA in half precision, see `ropepp_lit.nn.kernels`; empty selects one by the
            GPU, the torch version and the installed packages.
        init_from: Checkpoint or Hugging Face folder to initialize the weights from; optimizer, schedule and data start
            fresh. Geometry and variant must match the recipe; base and scaling can differ. NoPE can be initialized
            from RoPE, and `qk_norm` can be added (its weights start at 1).
        init_optimizer: Load the optimizer state from init_from too (checkpoints in a single file only).
        lora: Train adapters, with the weights of init_from frozen; empty trains all weights.
        preference: Loss for pairs of chosen and rejected answers: DPO, SimPO or ORPO.
        schedule: Learning rate schedule, by optimizer steps.
        loss_average: Average of the loss of an optimizer step, across all micro-batches and devices: over `all_tokens`
            (a constant), `trained_tokens`, or `conversations` (of the mean over the trained tokens of each). Empty:
            `trained_tokens` if the training data mark them, else `all_tokens`. Validation is per token.
        on_nan: Action at a step with NaN or infinite gradients: `stop` ends the run and prints the last checkpoint;
            `skip` leaves weights and optimizer state unchanged (the host waits for the device at each step), and stops
            after 10 such steps in a row. With `precision: 16-mixed` the loss scaling skips such steps itself, and a
            NaN loss ends the run when it is logged.
    """

    def __init__(
        self,
        *,
        decoder: DecoderConfig,
        positions: PositionScheme,
        frequencies: Frequencies,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        activation_checkpointing: int | Literal["attention"] = 0,
        offload_activations: bool = False,
        mlp_chunk_tokens: int | None = None,
        attention_head_groups: int = 1,
        compile: bool | None = None,
        attention: Literal["sdpa", "varlen", "flash_attn", "fa3", "fa4"] | None = None,
        init_from: str | None = None,
        init_optimizer: bool = False,
        loss_average: LossAverage | None = None,
        lora: LoRA | None = None,
        preference: Preference | None = None,
        on_nan: OnNaN = "stop",
    ) -> None:
        super().__init__()
        self.config, self.scheme, self.frequencies = decoder, positions, frequencies
        self.optimizer_config, self.schedule = optimizer, schedule
        check_memory_options(
            activation_checkpointing=activation_checkpointing,
            offload_activations=offload_activations,
            mlp_chunk_tokens=mlp_chunk_tokens,
            attention_head_groups=attention_head_groups,
            compile=compile,
        )
        self.activation_checkpointing, self.offload_activations = activation_checkpointing, offload_activations
        self.mlp_chunk_tokens, self.compile_blocks = mlp_chunk_tokens, compile
        self.attention_head_groups, self.attention = attention_head_groups, attention
        self.init_from, self.init_optimizer = init_from, init_optimizer
        self.lora, self.adapters, self.strict_loading = lora, Adapters(lora), lora is None
        self.pairs = PairTraining(preference)
        self.stop: StopRequest | None = None
        """Recorder of signals; set by the callback that saves checkpoints."""
        self.loads_checkpoint = False
        """Whether the weights of a checkpoint are loaded later, so none are initialized; set by the command."""
        self.run_log = RunLog()
        """Log of the run's events; opened by the command."""
        self.recipe: dict[str, Any] | None = None
        """The run's complete recipe, which checkpoints store; set by the command."""
        self.settings: dict[str, Any] = {}
        """Entries `tokenizer_config`, `generation_config` and `card` of the checkpoint from which the run starts."""
        self.tokens_seen = 0
        """Tokens that all ranks have read since the start of the run."""
        self.last_validation: dict[str, dict[str, float]] = {}
        """Metrics of the last validation, by set: loss, perplexity, bits_per_byte, number of predicted tokens, step."""
        self.loss_average, self.step_average = loss_average, StepAverage(loss_average or "all_tokens")
        """Average over the gradients of a step; `setup` replaces it once the data are set up."""
        self.train_loss = self.pairs.create_metric()
        self._val_losses: dict[str, TokenLoss] = {}
        self._loaded_step, self._drop_validation = 0, False
        self._gradient_norm: Tensor | None = None
        self._throughput: Throughput | None = None
        self._validation, self.step_state = ExitStack(), StepState()
        self.on_nan, self._finite = on_nan, FiniteSteps(on_nan)
        self._loaded_train_loss: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Create a loss metric for each validation set, and choose the average of the training loss."""
        data = getattr(self.trainer, "datamodule", None)
        self.step_average = StepAverage(choose_average(self.loss_average, data))
        names = list(data.validation_sets) if isinstance(data, TokenData) else ["validation"]
        if list(self._val_losses) != names:
            self._val_losses = {name: self.pairs.create_metric() for name in names}
            self.val_losses = torch.nn.ModuleList(self._val_losses.values())  # Lightning moves them to the device

    def configure_model(self) -> None:
        """Build the decoder (Lightning calls this after it has set up precision and strategy)."""
        if hasattr(self, "decoder"):
            return
        strategy = self.trainer.strategy if self._trainer is not None else None
        self.decoder = build_decoder(
            lambda: Decoder(self.config, self.scheme, self.frequencies),
            device=torch.device("cpu") if strategy is None else strategy.root_device,
            shard=strategy.shard if isinstance(strategy, FSDP2Strategy) else None,
            activation_checkpointing=self.activation_checkpointing,
            offload_activations=self.offload_activations,
            mlp_chunk_tokens=self.mlp_chunk_tokens,
            attention_head_groups=self.attention_head_groups,
            compile=self.compile_blocks,
            attention=self.attention,
            init_from=self.init_from,
            loads_checkpoint=self.loads_checkpoint,
            lora=self.lora,
        )

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and a learning rate scheduler that is stepped every optimizer step."""
        optimizer, self._recipe_groups = build_optimizer(self.optimizer_config, self.decoder, self.trainer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def steps_taken(self) -> int:
        """Optimizer steps these weights were trained for; `global_step` is 0 if a checkpoint is only validated."""
        return max(self.global_step, self._loaded_step)

    @property
    def validated_step(self) -> int:
        """Last step at which all validation sets were evaluated, or 0."""
        return validated_step(self.last_validation)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped since the start of the run because their gradients were NaN or infinite."""
        return self._finite.num_skipped

    def _lr_factor(self, step: int) -> float:
        return self.schedule.factor(step, self.schedule.total_steps or self.trainer.max_steps)

    def on_fit_start(self) -> None:
        """Restrict validation to the ends of optimizer steps."""
        validate_by_steps(self.trainer, self)

    def on_train_start(self) -> None:
        """Apply the recipe's optimizer settings over those that Lightning restored from the checkpoint.

        If the previous run was killed before a validation that was due, run it now.
        """
        if self.init_optimizer and self.init_from is not None and self.global_step == 0:
            load_optimizer_state(self.trainer, self.init_from)
        apply_recipe(self.trainer, self._recipe_groups, self._lr_factor)
        self.pairs.compute_reference(self.trainer, self.decoder, self.stop)
        self._throughput = Throughput(self.config, self.decoder.head_layout, self.trainer.world_size, self.lora)
        if self.trainer.is_global_zero:  # the checkpoint stores sums over all ranks
            self.train_loss.add_sums(self._loaded_train_loss or {})
        self.step_average.restart()
        self._end_step()
        validate_if_due(self.trainer, self)

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Step, and record what a checkpoint of this step stores."""
        super().optimizer_step(*arguments, **keywords)
        if self._finite.skipped:
            self.step_state.restore(self.train_loss)
            self._finite.skipped = False
        self._end_step()

    def _end_step(self) -> None:
        self.step_state.record(self.trainer, tokens_seen=self.tokens_seen, train_loss=self.train_loss)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss, summed over the labels that count and divided by the number of positions in the batch.

        The divisor is the same for every batch, so all tokens have equal weight however rows are distributed over
        micro-batches and ranks. :class:`StepAverage` rescales gradients to other averages at the end of the step.
        """
        self.adapters.seed_dropout(self.global_rank, batch_idx)
        loss = self._summed_loss(batch, self.train_loss, self.step_average.add(batch))
        self._num_positions = batch.labels.numel()
        replicas = replica_of(self.trainer)["num_replicas"]
        self.tokens_seen += batch.num_tokens * replicas
        if self._throughput is not None:
            self._throughput.add(batch.num_tokens * replicas, batch.visible_pairs * replicas)
        return loss / batch.labels.numel()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the loss over the labels that count to the metric of the batch's validation set."""
        metric = list(self._val_losses.values())[dataloader_idx]
        self._summed_loss(batch, metric, batch.num_labels)

    def _summed_loss(self, batch: Batch, metric: TokenLoss, count: int) -> Tensor:
        """Return the summed loss of a batch; adds it and the number of its terms, `count`, to a metric."""
        if batch.pairs is not None:
            return self.pairs.loss(self.decoder, batch, metric)
        loss = batch.loss(self.decoder)
        metric.update(loss, count)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Average and clip the gradients, and store their norm for logging; skip the step if it is not finite."""
        self._gradient_norm = finish_gradients(
            self.trainer,
            self.decoder,
            optimizer,
            self.step_average,
            num_positions=self._num_positions,
            clip_val=gradient_clip_val,
            by_value=gradient_clip_algorithm == "value",
        )
        if getattr(self.trainer.precision_plugin, "scaler", None) is None and self._finite.watch(
            full_tensor(self._gradient_norm), self.global_step + 1, self.run_log
        ):
            optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the metrics of training; request a stop at the last step."""
        if self.global_step >= self.trainer.max_steps:
            self.trainer.should_stop = True  # so Lightning validates the last step before its checkpoint is saved
        self.log_training()

    def log_training(self) -> None:
        """Log the metrics since the last call, every `log_every_n_steps` optimizer steps.

        A second call at the same step does nothing.

        Raises:
            DivergedError: the loss or the gradient norm is NaN or infinite.
        """
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._gradient_norm is None or self.global_step % interval:
            return
        assert self._throughput is not None
        # The only time in a step that the host waits for the device: one copy of a few numbers.
        loss_now, _, *others_now = self.train_loss.compute()
        numbers = [loss_now, full_tensor(self._gradient_norm).double(), *others_now]
        numbers += self.step_average.read_count(numbers[0].device)
        loss, norm, *rest = torch.stack(numbers).tolist()
        others, counted = rest[: len(others_now)], rest[len(others_now) :]
        self.train_loss.reset()
        self._gradient_norm = None
        self._end_step()
        self._finite.check_values(loss, norm, self.global_step)
        data = getattr(self.trainer, "datamodule", None)
        bytes_per_token = data.bytes_per_token() if isinstance(data, TokenData) else None
        values = metric_values(self.train_loss, "train/", (loss, *others), bytes_per_token)
        values |= self._throughput.read(dict(zip([self.step_average.over], counted, strict=False)))
        values["tokens_seen"] = self.tokens_seen
        values["lr"] = self.trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]
        values["gradient_norm"] = norm
        if self._finite.mode == "skip":
            values["skipped_steps"] = float(self.skipped_steps)
        log_metrics(self.trainer, values, self.global_step)

    def check_finite(self) -> None:
        """Raise DivergedError if a step had NaN or infinite gradients; waits for the device."""
        self._finite.check()

    def pause_throughput(self) -> AbstractContextManager[None]:
        """Exclude what runs in the context from the throughput of training."""
        return nullcontext() if self._throughput is None else self._throughput.paused()

    def on_validation_start(self) -> None:
        """Pause the throughput clock.

        Raises:
            DivergedError: an earlier step had NaN or infinite gradients.
        """
        if self.trainer.state.fn == "fit":
            self.check_finite()
        self._validation.enter_context(self.pause_throughput())

    def drop_validation(self) -> None:
        """Discard the metrics of the current validation, which a signal interrupts."""
        self._drop_validation = True

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte of each complete validation set, and the loss over all of them.

        Raises:
            DivergedError: the loss is NaN or infinite during training.
        """
        if self._drop_validation:
            for metric in self._val_losses.values():
                metric.reset()
            return
        sets, nats, tokens = read_losses(self._val_losses, getattr(self.trainer, "datamodule", None))
        values = metrics_to_log(sets, loss=nats / tokens if tokens else math.nan)
        if not self.trainer.sanity_checking:
            step = float(self.steps_taken)
            self.last_validation |= {name: metrics | {"step": step} for name, metrics in sets.items()}
            log_metrics(self.trainer, values, self.steps_taken)
            self.run_log.write("validation", step=self.steps_taken, loss=values["val/loss"], sets=sets)
        if self.trainer.state.fn == "fit" and tokens and not math.isfinite(nats):
            raise DivergedError(f"the validation loss is {values['val/loss']} at step {self.steps_taken}")

    def on_validation_end(self) -> None:
        """Resume the throughput clock."""
        self._validation.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the entries that :mod:`ropepp_lit.checkpoint` describes, as of the last optimizer step.

        Raises:
            DivergedError: gradients or weights are NaN or infinite, so the checkpoint would be useless.
        """
        self.check_finite()
        check_weights(self.trainer, self.decoder)
        data_entry = getattr(getattr(self.trainer, "datamodule", None), "entry", {})
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "architecture": describe_architecture(self.config, self.scheme, self.frequencies),
            "optimizer": type(self.optimizer_config).__name__,
            "recipe": self.recipe,
            "tokens_seen": self.tokens_seen,
            "skipped_steps": self.skipped_steps,
            "validation": self.last_validation,
            "origin": self.init_from,
            **dict.fromkeys(("tokenizer", "bos_token_id", "eos_token_id", "opening", "context_length", "held_out")),
            **data_entry,
            **merge_settings(self.settings, data_entry),
            **self.step_state.save(checkpoint, self.trainer),
        }
        self.adapters.save(self, checkpoint, base=self.init_from)
        self.pairs.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore counters and metrics; recompute the batch count for the recipe's `accumulate_grad_batches`."""
        self.tokens_seen, self._loaded_step = checkpoint[KEY]["tokens_seen"], checkpoint["global_step"]
        self.adapters.load(self, checkpoint)
        self.pairs.load(checkpoint)
        if "loops" not in checkpoint:  # only the weights, to be validated
            return
        self._loaded_train_loss = checkpoint[KEY].get("train_loss")
        self._finite.num_skipped = checkpoint[KEY].get("skipped_steps", 0)
        metrics = checkpoint[KEY].get("validation") or {}
        self.last_validation = metrics if metrics.keys() == self._val_losses.keys() else {}
        recount_batches(checkpoint, self.trainer.accumulate_grad_batches)
