"""The LightningModule: a decoder, its optimizer and schedule, and what is measured on the way."""

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
from ropepp_lit.train.curves import figures_of, log_figures
from ropepp_lit.train.finite import DivergedError, FiniteSteps, OnNaN, check_weights
from ropepp_lit.train.fsdp import FSDP2Strategy, whole
from ropepp_lit.train.gradients import finish_gradients
from ropepp_lit.train.lora import Adapters, LoRA
from ropepp_lit.train.loss_average import LossAverage, StepAverage, choose_average
from ropepp_lit.train.memory_options import check_memory_options
from ropepp_lit.train.metrics import TokenLoss
from ropepp_lit.train.optimizer import OptimizerConfig
from ropepp_lit.train.optimizer_state import apply_recipe, build_optimizer, load_optimizer_state
from ropepp_lit.train.pair_training import PairTraining
from ropepp_lit.train.parallel import build_decoder
from ropepp_lit.train.preference import Preference
from ropepp_lit.train.run_log import RunLog
from ropepp_lit.train.schedule import Schedule
from ropepp_lit.train.signals import StopRequest
from ropepp_lit.train.step_state import StepState, recount_batches
from ropepp_lit.train.throughput import Throughput
from ropepp_lit.train.validations import figures_to_log, read_losses, validate_by_steps, validate_if_due, validated_step


class CausalLM(LightningModule):
    """A causal language model in training: any geometry, position scheme and frequencies.

    Args:
        decoder: Geometry, or a size of the paper by name.
        positions: Position scheme.
        frequencies: Base and scaling of the rotary frequencies.
        optimizer: Optimizer and its settings.
        activation_checkpointing: Every so many blocks one keeps its input alone and is computed again in the backward
            pass: 1 means every block, 0 none. `attention` means every block, but the outputs of attention are kept
            too, and attention is not computed again.
        offload_activations: Keep those inputs in the CPU's memory; for GPUs, with activation_checkpointing.
        mlp_chunk_tokens: Tokens of a row that the SwiGLU layers compute at once, and again in the backward pass; empty
            computes all and keeps what they need.
        attention_head_groups: Groups of heads that attention layers compute one after the other, and again in the
            backward pass; a divisor of the key/value heads. 1 computes all heads at once and keeps what they need.
        compile: Compile each block by torch.compile; empty compiles on CUDA only, and not with
            offload_activations.
        attention: What computes attention on CUDA in half precision, of :mod:`ropepp_lit.nn.kernels`; empty chooses by
            what the GPU, torch and the installed packages offer.
        init_from: A checkpoint or a Hugging Face folder whose weights training begins with; optimizer, schedule and
            data begin anew. Its geometry and variant must be the recipe's; base and scaling may be others. RoPE may go
            on as NoPE, and `qk_norm` may be added: its norms begin at one.
        init_optimizer: Take the optimizer's state from there too (of a checkpoint in one file).
        lora: Train adapters beside the weights of init_from, which stay as they are; empty trains all weights.
        preference: For pairs of answers, the loss by which the chosen one is preferred: DPO, SimPO or ORPO.
        schedule: Learning rate by steps.
        loss_average: What the loss of an optimizer step is averaged over, all micro-batches and devices together:
            `all_tokens` (a constant), `trained_tokens`, or `conversations` (of the mean over their trained tokens).
            Empty: `trained_tokens` where the training data mark these, else `all_tokens`. Validation is per token.
        on_nan: At a step whose gradients are NaN or infinite: `stop` ends the run and names the last checkpoint;
            `skip` reads the data and leaves the weights and the optimizer's state as they are (the host waits for the
            device at each step), and stops after 10 such steps in a row. With `precision: 16-mixed` the loss scaling
            skips such steps itself, and a NaN loss ends the run when it is logged.
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
        self.config = decoder
        self.scheme = positions
        self.frequencies = frequencies
        self.optimizer_config = optimizer
        self.schedule = schedule
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
        """What notes signals; the callback that saves checkpoints sets it."""
        self.loads_checkpoint = False
        """Whether a checkpoint's weights follow, so that none need be drawn; the command sets it."""
        self.run_log = RunLog()
        """What happens in the run; the command opens it."""
        self.recipe: dict[str, Any] | None = None
        """The run's whole recipe; the command sets it, and checkpoints carry it."""
        self.settings: dict[str, Any] = {}
        """The entries `tokenizer_config`, `generation_config` and `card` of the model that the run began with."""
        self.tokens_seen = 0
        """Tokens that all ranks have read since the run began."""
        self.last_validation: dict[str, dict[str, float]] = {}
        """What the newest validation found, by set: loss, perplexity, bits_per_byte, tokens predicted, step."""
        self.loss_average = loss_average
        self.step_average = StepAverage(loss_average or "all_tokens")
        """What the gradients of a step are averaged over; known once the data are set up."""
        self.train_loss = self.pairs.new_loss()
        self._val_losses: dict[str, TokenLoss] = {}
        self._loaded_step = 0
        self._gradient_norm: Tensor | None = None
        self._throughput: Throughput | None = None
        self._validation = ExitStack()
        self.on_nan, self._finite = on_nan, FiniteSteps(on_nan)
        self.step_state = StepState()
        self._loaded_train_loss: dict[str, Any] | None = None
        self._drop_validation = False

    def setup(self, stage: str) -> None:
        """One loss for each validation set, and what that of training is averaged over."""
        data = getattr(self.trainer, "datamodule", None)
        self.step_average = StepAverage(choose_average(self.loss_average, data))
        names = list(data.validation_sets) if isinstance(data, TokenData) else ["validation"]
        if list(self._val_losses) != names:
            self._val_losses = {name: self.pairs.new_loss() for name in names}
            self.val_losses = torch.nn.ModuleList(self._val_losses.values())  # so that Lightning moves them

    def configure_model(self) -> None:
        """Build the decoder (Lightning calls this once the precision and the strategy are known)."""
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
        """The optimizer and its schedule by steps."""
        optimizer, self._recipe_groups = build_optimizer(self.optimizer_config, self.decoder, self.trainer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def steps_taken(self) -> int:
        """Optimizer steps of these weights; `global_step` does not tell where a checkpoint is only validated."""
        return max(self.global_step, self._loaded_step)

    @property
    def validated_step(self) -> int:
        """The newest step that all validation sets were measured at; 0 where there is none."""
        return validated_step(self.last_validation)

    @property
    def skipped_steps(self) -> int:
        """Steps since the run began that were skipped, as their loss or gradients were NaN or infinite."""
        return self._finite.num_skipped

    def _lr_factor(self, step: int) -> float:
        return self.schedule.factor(step, self.schedule.total_steps or self.trainer.max_steps)

    def on_fit_start(self) -> None:
        """Validate at the ends of steps."""
        validate_by_steps(self.trainer, self)

    def on_train_start(self) -> None:
        """Let the recipe rule: Lightning has restored learning rates and the like of the checkpoint's run.

        A validation that the run was killed before is made now.
        """
        if self.init_optimizer and self.init_from is not None and self.global_step == 0:
            load_optimizer_state(self.trainer, self.init_from)
        apply_recipe(self.trainer, self._recipe_groups, self._lr_factor)
        self.pairs.find_reference(self.trainer, self.decoder, self.stop)
        self._throughput = Throughput(self.config, self.decoder.head_layout, self.trainer.world_size, self.lora)
        if self.trainer.is_global_zero:  # the sum over all ranks
            self.train_loss.go_on(self._loaded_train_loss or {})
        self.step_average.restart()
        self._end_step()
        validate_if_due(self.trainer, self)

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Step, and note what a checkpoint of this step stores."""
        super().optimizer_step(*arguments, **keywords)
        if self._finite.skipped:
            self.step_state.restore(self.train_loss)
            self._finite.skipped = False
        self._end_step()

    def _end_step(self) -> None:
        self.step_state.note(self.trainer, tokens_seen=self.tokens_seen, train_loss=self.train_loss)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss to descend: summed over the labels that count, divided by all places of the batch.

        The divisor is the same for every batch, so a token weighs the same however the rows are spread over
        micro-batches and ranks. Other averages are made of it at the end of the step, see :class:`StepAverage`.
        """
        self.adapters.seed_dropout(self.global_rank, batch_idx)
        loss = self._summed_loss(batch, self.train_loss, self.step_average.add(batch))
        self._places = batch.labels.numel()
        replicas = replica_of(self.trainer)["num_replicas"]
        self.tokens_seen += batch.num_tokens * replicas
        if self._throughput is not None:
            self._throughput.add(batch.num_tokens * replicas, batch.visible_pairs * replicas)
        return loss / batch.labels.numel()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the loss over the labels that count, for each validation set."""
        metric = list(self._val_losses.values())[dataloader_idx]
        self._summed_loss(batch, metric, batch.num_labels)

    def _summed_loss(self, batch: Batch, metric: TokenLoss, count: int) -> Tensor:
        """The loss to descend; adds it to a metric, as a sum over so many."""
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
        """Average and clip the gradients, and keep their norm to be logged; skip a step where it is not finite."""
        self._gradient_norm = finish_gradients(
            self.trainer,
            self.decoder,
            optimizer,
            self.step_average,
            places=self._places,
            clip_val=gradient_clip_val,
            by_value=gradient_clip_algorithm == "value",
        )
        if getattr(self.trainer.precision_plugin, "scaler", None) is None and self._finite.watch(
            whole(self._gradient_norm), self.global_step + 1, self.run_log
        ):
            optimizer.zero_grad(set_to_none=True)  # without gradients the step changes nothing

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log; at the last step tell Lightning to stop."""
        if self.global_step >= self.trainer.max_steps:
            self.trainer.should_stop = True  # so Lightning validates the last step, and its checkpoint has the figures
        self.log_training()

    def log_training(self) -> None:
        """Every `log_every_n_steps` optimizer steps, log what happened since the last time.

        A second call at the same step does nothing.

        Raises:
            DivergedError: the loss or the gradient norm is NaN or infinite.
        """
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._gradient_norm is None or self.global_step % interval:
            return
        assert self._throughput is not None
        # The only place of a step where the host waits for the device: one copy of a few numbers.
        loss_now, _, *others_now = self.train_loss.compute()
        numbers = [loss_now, whole(self._gradient_norm).double(), *others_now]
        numbers += self.step_average.since_read(numbers[0].device)
        loss, norm, *rest = torch.stack(numbers).tolist()
        others, counted = rest[: len(others_now)], rest[len(others_now) :]
        self.train_loss.reset()
        self._gradient_norm = None
        self._end_step()
        self._finite.check_figures(loss, norm, self.global_step)
        data = getattr(self.trainer, "datamodule", None)
        bytes_per_token = data.bytes_per_token() if isinstance(data, TokenData) else None
        values = figures_of(self.train_loss, "train/", (loss, *others), bytes_per_token)
        values |= self._throughput.read(dict(zip([self.step_average.over], counted, strict=False)))
        values["tokens_seen"] = self.tokens_seen
        values["lr"] = self.trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]
        values["gradient_norm"] = norm
        if self._finite.mode == "skip":
            values["skipped_steps"] = float(self.skipped_steps)
        log_figures(self.trainer, values, self.global_step)

    def check_finite(self) -> None:
        """Raise DivergedError where a step was bad; waits for the device."""
        self._finite.check()

    def untimed(self) -> AbstractContextManager[None]:
        """Stop the clock of training for something else."""
        return nullcontext() if self._throughput is None else self._throughput.paused()

    def on_validation_start(self) -> None:
        """Stop the clock of training.

        Raises:
            DivergedError: a step before was bad.
        """
        if self.trainer.state.fn == "fit":
            self.check_finite()
        self._validation.enter_context(self.untimed())

    def drop_validation(self) -> None:
        """Leave out the figures of the current validation, which a signal cuts short."""
        self._drop_validation = True

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte over each whole validation set, and the loss over all of them.

        Raises:
            DivergedError: the loss is NaN or infinite during training.
        """
        if self._drop_validation:
            for metric in self._val_losses.values():
                metric.reset()
            return
        found, nats, tokens = read_losses(self._val_losses, getattr(self.trainer, "datamodule", None))
        values = figures_to_log(found, loss=nats / tokens if tokens else math.nan)
        if not self.trainer.sanity_checking:
            step = float(self.steps_taken)
            self.last_validation |= {name: figures | {"step": step} for name, figures in found.items()}
            log_figures(self.trainer, values, self.steps_taken)
            self.run_log.write("validation", step=self.steps_taken, loss=values["val/loss"], sets=found)
        if self.trainer.state.fn == "fit" and tokens and not math.isfinite(nats):
            raise DivergedError(f"the validation loss is {values['val/loss']} at step {self.steps_taken}")

    def on_validation_end(self) -> None:
        """Let the clock of training run on."""
        self._validation.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what :mod:`ropepp_lit.checkpoint` describes; all of it belongs to the newest optimizer step.

        Raises:
            DivergedError: a step was bad, or a weight is NaN or infinite; there is no use in such a checkpoint.
        """
        self.check_finite()
        check_weights(self.trainer, self.decoder)
        of_data = getattr(getattr(self.trainer, "datamodule", None), "entry", {})
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
            **of_data,
            **merge_settings(self.settings, of_data),
            **self.step_state.write(checkpoint, self.trainer),
        }
        self.adapters.save(self, checkpoint, base=self.init_from)
        self.pairs.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the count of tokens and the curves, and count batches as this recipe accumulates them."""
        self.tokens_seen, self._loaded_step = checkpoint[KEY]["tokens_seen"], checkpoint["global_step"]
        self.adapters.load(self, checkpoint)
        self.pairs.load(checkpoint)
        if "loops" not in checkpoint:  # weights alone, to be validated
            return
        self._loaded_train_loss = checkpoint[KEY].get("train_loss")
        self._finite.num_skipped = checkpoint[KEY].get("skipped_steps", 0)
        figures = checkpoint[KEY].get("validation") or {}
        self.last_validation = figures if figures.keys() == self._val_losses.keys() else {}
        recount_batches(checkpoint, self.trainer.accumulate_grad_batches)
