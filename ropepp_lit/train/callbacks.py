"""What a run shows: a banner, a progress bar, samples of text."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tokenizers import Tokenizer

from ropepp_lit.data.token_data import TokenData, replica_of
from ropepp_lit.errors import UsageError
from ropepp_lit.nn.generation import check_sampling, generate
from ropepp_lit.train.causal_lm import CausalLM


class Banner(Callback):
    """Prints what decides a run's result before it starts."""

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the banner."""
        assert isinstance(pl_module, CausalLM)
        print(banner(trainer, pl_module), flush=True)


def banner(trainer: pl.Trainer, model: CausalLM) -> str:
    """Variant, base and scaling, parameters, context and tokens per step, as a block of lines."""
    decoder, data = model.decoder, getattr(trainer, "datamodule", None)
    layout = decoder.head_layout
    replicas = replica_of(trainer)["num_replicas"]
    embedding = decoder.config.hidden_size * decoder.config.vocab_size
    lines = [
        ("positions", decoder.positions_in_words),
        (
            "heads",
            f"{layout.num_query_heads} query projections → {layout.num_attention_heads} attention heads, "
            f"{layout.num_key_value_heads} key/value heads of {decoder.config.head_dim}",
        ),
        ("parameters", f"{decoder.num_parameters:,} (embedding: {embedding:,})"),
    ]
    group = decoder.context_group
    if group is not None:
        what = "keys and values are gathered" if group.mode == "gather" else "tokens are exchanged for heads"
        lines.append(("context parallel", f"{group.size()} devices share the tokens of a row; {what} ({group.mode})"))
    if isinstance(data, TokenData):
        accumulated = trainer.accumulate_grad_batches
        tokens = data.tokens_per_step(accumulate_grad_batches=accumulated, num_replicas=replicas)
        masking = "documents don't see each other" if data.intra_document_masking else "plain causal rows"
        share, size = sum(data.weights.values()), trainer.world_size // replicas
        groups = f"{replicas} devices" if size == 1 else f"{replicas} groups of {size} devices"
        lines += [
            ("context", f"{data.context_length:,} tokens, {masking}"),
            (
                "tokens per step",
                f"{tokens:,} ({data.batch_size} rows × {accumulated} accumulated × {groups})",
            ),
            *(
                (
                    "data",
                    f"{name}: {manifest.splits['train'].documents:,} documents, "
                    f"{manifest.splits['train'].tokens:,} tokens"
                    + (f", {weight / share:.1%} of the samples" if len(data.weights) > 1 else ""),
                )
                for (name, manifest), weight in zip(data.manifests.items(), data.weights.values(), strict=True)
            ),
            ("steps", f"{trainer.max_steps:,}: {tokens * trainer.max_steps:,} tokens"),
        ]
    return "\n".join(f"{name:>16}  {text}" for name, text in lines)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar without what never changes."""

    @property
    def total_train_batches(self) -> int | float:
        """All batches of the run; Lightning's would count the steps that are left after a resume."""
        return self.trainer.num_training_batches

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Metrics for the bar, numbers short."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A run is one long epoch: its number says nothing."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("Training")
        # After a resume the rate and the time left are of the batches since then.
        self.train_progress_bar.initial = trainer.fit_loop.epoch_loop.batch_progress.current.completed


class TextSample(Callback):
    """After each validation, lets the model write: in the terminal and in TensorBoard.

    Args:
        prompt: What the model continues; empty starts a new document.
        max_new_tokens: Tokens to write; 0 writes none.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Sample from the smallest set of tokens whose probability reaches this.
    """

    def __init__(
        self, *, prompt: str = "", max_new_tokens: int = 64, temperature: float = 0.8, top_p: float = 0.95
    ) -> None:
        if max_new_tokens < 0:
            raise UsageError(f"sample.max_new_tokens: {max_new_tokens} must be 0 (none) or more")
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.temperature, self.top_p = check_sampling("sample.", temperature, top_p)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a sample; every rank computes (sharded weights need all of them), rank 0 shows it."""
        data = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or not self.max_new_tokens or not isinstance(data, TokenData):
            return
        assert isinstance(pl_module, CausalLM)
        tokenizer = Tokenizer.from_str(data.tokenizer_json)
        prompt = data.begin_text(tokenizer.encode(self.prompt, add_special_tokens=False).ids)
        device = pl_module.device
        tokens = generate(
            pl_module.decoder,
            torch.tensor([prompt], device=device),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            generator=torch.Generator(device).manual_seed(0),  # the training's own random numbers stay untouched
        )
        written = [int(token) for token in tokens]
        if data.manifest.eos_token_id in written:
            written = written[: written.index(data.manifest.eos_token_id)]
        self._show(trainer, pl_module.steps_taken, tokenizer.decode(prompt + written))

    @rank_zero_only
    def _show(self, trainer: pl.Trainer, step: int, text: str) -> None:
        print(f"\n--- sample at step {step} ---\n{text}\n---", flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", f"```\n{text}\n```", step)
