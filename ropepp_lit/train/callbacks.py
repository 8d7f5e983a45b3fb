"""Callbacks that print: the banner, the progress bar, and text samples."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from ropepp_lit.data.loader import replica_of
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder
from ropepp_lit.nn.generation import generate
from ropepp_lit.nn.kernels import describe
from ropepp_lit.nn.sampling import Sampling
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.evaluation import evaluating
from ropepp_lit.train.loss_average import describe_average
from ropepp_lit.train.spikes import LossSpikes
from ropepp_lit.train.step_setup import DTYPES
from ropepp_lit.train.watchdog import Watchdog


class Banner(Callback):
    """Prints the settings that determine the result of a run, before it starts."""

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the banner."""
        assert isinstance(pl_module, CausalLM)
        print(banner(trainer, pl_module), flush=True)


def banner(trainer: pl.Trainer, model: CausalLM) -> str:
    """Return the banner: lines of a name and its text."""
    data = getattr(trainer, "datamodule", None)
    lines = _model_lines(model.decoder)
    precision, device = str(trainer.precision), trainer.strategy.root_device
    lines["precision"] = describe_precision(precision, device)
    dtype = DTYPES.get(precision.split("-")[0], torch.float32)
    lines["attention"] = describe(model.decoder.attention_implementation, device, dtype)
    if isinstance(data, TokenData):
        lines |= _data_lines(trainer, data)
    lines["loss"] = describe_average(model.step_average.over)
    if model.pairs.preference is not None:
        lines["preference"] = str(model.pairs.preference)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    guards = [callback.description for callback in callbacks if isinstance(callback, LossSpikes | Watchdog)]
    lines["guards"] = "; ".join(filter(None, [f"NaN: {model.on_nan}", *guards]))
    return "\n".join(f"{name:>16}  {text}" for name, texts in lines.items() for text in texts.splitlines())


def _model_lines(decoder: Decoder) -> dict[str, str]:
    layout, embedding = decoder.head_layout, decoder.config.hidden_size * decoder.config.vocab_size
    trained = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    lines = {
        "positions": decoder.positions_description,
        "heads": f"{layout.num_query_heads} query projections → {layout.num_attention_heads} attention heads, "
        f"{layout.num_key_value_heads} key/value heads of {decoder.config.head_dim}",
        "parameters": f"{decoder.num_parameters:,} (embedding: {embedding:,})",
    }
    if trained < decoder.num_parameters:
        share = f"{trained / decoder.num_parameters:.2%}"
        lines["trained"] = f"{trained:,} parameters ({share}): LoRA beside a frozen base"
    group = decoder.context_group
    if group is not None:
        how = "keys and values are gathered" if group.mode == "gather" else "tokens are exchanged for heads"
        lines["context parallel"] = f"{group.size()} devices share the tokens of a row; {how} ({group.mode})"
    return lines


def _data_lines(trainer: pl.Trainer, data: TokenData) -> dict[str, str]:
    replicas, accumulated = replica_of(trainer)["num_replicas"], trainer.accumulate_grad_batches
    tokens = data.tokens_per_step(accumulate_grad_batches=accumulated, num_replicas=replicas)
    masking = "documents don't see each other" if data.intra_document_masking else "plain causal rows"
    share, size = sum(data.weights.values()), trainer.world_size // replicas
    groups = f"{replicas} devices" if size == 1 else f"{replicas} groups of {size} devices"
    sources = [
        f"{name}: {manifest.splits['train'].documents:,} documents, {manifest.splits['train'].tokens:,} tokens"
        + (f", {weight / share:.1%} of the samples" if len(data.weights) > 1 else "")
        for (name, manifest), weight in zip(data.manifests.items(), data.weights.values(), strict=True)
    ]
    rows = tokens // data.context_length
    packing = data.packing_lines(rows)
    return {
        "context": f"{data.context_length:,} tokens, {masking}",
        "tokens per step": f"{tokens:,} ({data.batch_size} rows × {accumulated} accumulated × {groups})",
        "data": "\n".join(sources),
        **({"packing": "\n".join(packing)} if packing else {}),
        "texts": data.text_tokenizer.description.removeprefix("texts "),
        "steps": f"{trainer.max_steps:,}: {tokens * trainer.max_steps:,} tokens",
    }


def describe_precision(precision: str, device: torch.device) -> str:
    """Return the trainer's precision and, for float32 on an NVIDIA GPU, whether matrix products use TF32.

    TF32 rounds their inputs to 10 bits of mantissa. Torch's setting applies, which is off by default, so `32-true`
    means float32 on any device; use `bf16-mixed` for speed.
    """
    if device.type != "cuda" or precision != "32-true":
        return precision
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return f"{precision}, matrix products in TF32"
    return f"{precision}, matrix products without TF32 (for TF32 set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1)"


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar without the version and the epoch, and correct after a resume."""

    @property
    def total_train_batches(self) -> int | float:
        """Number of batches of the run; Lightning's property counts only the remaining steps after a resume."""
        return self.trainer.num_training_batches

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the metrics that the bar shows."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Set the description, without the epoch number (a run is a single epoch)."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("Training")
        # After a resume, rate and remaining time are computed from the batches since then.
        self.train_progress_bar.initial = trainer.fit_loop.epoch_loop.batch_progress.current.completed


class TextSample(Callback):
    """Generates text after each validation, and writes it to the terminal and to TensorBoard.

    Args:
        prompt: Text to continue; empty starts a new document.
        max_new_tokens: Number of tokens to generate; 0 disables samples.
        temperature: Divisor of the logits; 0 selects the most likely token.
        top_p: Sample from the smallest set of tokens whose cumulative probability reaches this value.
    """

    def __init__(
        self, *, prompt: str = "", max_new_tokens: int = 64, temperature: float = 0.8, top_p: float = 0.95
    ) -> None:
        if max_new_tokens < 0:
            raise UsageError(f"sample.max_new_tokens: {max_new_tokens} must be 0 (none) or more")
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.sampling = Sampling(temperature=temperature, top_p=top_p).check("sample.")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generate a sample on every rank (weights can be sharded over all of them); rank 0 prints it."""
        data = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or not self.max_new_tokens or not isinstance(data, TokenData):
            return
        assert isinstance(pl_module, CausalLM)
        if trainer.state.fn == "fit" and pl_module.validated_step != pl_module.steps_taken:
            return  # a signal interrupted the validation
        tokenizer = data.text_tokenizer
        prompt = tokenizer.encode_prompt(self.prompt)
        device = pl_module.device
        with evaluating(trainer, pl_module.decoder):
            tokens = generate(
                pl_module.decoder,
                torch.tensor([prompt], device=device),
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                generator=torch.Generator(device).manual_seed(0),  # does not affect the random numbers of training
            )
            generated = [int(token) for token in tokens]
        generated = list(itertools.takewhile(lambda token: token not in tokenizer.stop_token_ids, generated))
        self._log(trainer, pl_module.steps_taken, tokenizer.decode(prompt + generated))

    @rank_zero_only
    def _log(self, trainer: pl.Trainer, step: int, text: str) -> None:
        print(f"\n--- sample at step {step} ---\n{text}\n---", flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", f"```\n{text}\n```", step)
