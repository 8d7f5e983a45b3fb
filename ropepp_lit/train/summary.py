"""Summaries that `fit` and `validate` print at the end."""

from __future__ import annotations

import signal
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from ropepp_lit.arguments import command
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.checkpoint_writer import LAST
from ropepp_lit.train.checkpoints import folder_of, newest


@rank_zero_only
def rank_zero_print(text: str) -> None:
    """Print on rank 0 only."""
    print(text, flush=True)


def validation_summary(model: CausalLM, data: TokenData) -> str:
    """Return the results of the last validation, for each set."""
    if not model.last_validation:
        return "Not validated, as trainer.limit_val_batches is 0."
    parts = []
    for name, values in model.last_validation.items():
        held_out = data.validation_sets[name]
        if "pairs" in values:
            parts.append(
                f"""
Held-out pairs of {name} at step {values["step"]:,.0f}, {values["pairs"]:,.0f} of {held_out.documents:,}:
  loss {values["loss"]:.4f} nats per pair, the chosen answer has the higher reward in {values["accuracy"]:.1%}
  rewards: chosen {values["chosen_reward"]:.4f}, rejected {values["rejected_reward"]:.4f}"""
            )
            continue
        gzip = f"   {8 * held_out.gzip_bytes / held_out.bytes:.3f} (gzip -9)" if held_out.gzip_bytes else ""
        bits = (
            f"\n  bits per byte: {values['bits_per_byte']:.3f} (this model){gzip}" if "bits_per_byte" in values else ""
        )
        predicted = held_out.predicted(documents_apart=data.intra_document_masking)
        kind = "trained tokens" if held_out.trained_tokens else "tokens"
        parts.append(
            f"""
Held-out text of {name} ({held_out.documents:,} documents, {held_out.bytes:,} bytes) at step {values["step"]:,.0f}, \
{values["tokens"]:,.0f} of {predicted:,} {kind}:
  loss {values["loss"]:.4f} nats per token, perplexity {values["perplexity"]:.2f}{bits}"""
        )
    return "\n".join(parts)


def training_summary(model: CausalLM, trainer: pl.Trainer, *, prompt: str, seconds: float) -> str:
    """Return the summary of a finished run: steps, files, and commands for the next tasks.

    Args:
        model: Model after training.
        trainer: Trainer of the run.
        prompt: Prompt for the command that generates text.
        seconds: Seconds since the command started.
    """
    folder = trainer.default_root_dir
    checkpoint, recipe = folder_of(folder) / LAST, Path(folder) / "recipe.yaml"
    return f"""
Step {model.steps_taken:,}{_skipped(model)}, {model.tokens_seen:,} tokens read, {seconds:.0f} seconds.
Everything is in {folder}: checkpoints, recipe.yaml, run.jsonl, tensorboard.

Next:
  {command("ropepp-lit", "generate", checkpoint, prompt=prompt)}
  {command("ropepp-lit", "validate", config=recipe, ckpt_path=checkpoint)}
  {command("ropepp-lit", "evaluate", checkpoint, out=Path(folder) / "evaluation")}
  {command("ropepp-lit", "fit", config=recipe, ckpt_path="auto", trainer__max_steps=2 * trainer.max_steps)}
  {command("tensorboard", logdir=folder)}"""


def stop_summary(model: CausalLM, trainer: pl.Trainer, *, number: int) -> str:
    """Return the summary of a run that a signal stopped, with the command that continues it.

    Args:
        model: Model after training.
        trainer: Trainer of the run.
        number: Number of the signal.
    """
    folder = Path(trainer.default_root_dir)
    saved = newest(folder_of(folder))
    return (
        f"\nStopped by {signal.Signals(number).name} at step {model.steps_taken:,}{_skipped(model)}, "
        f"{f'saved as {saved}' if saved else 'before anything was saved'}. "
        f"Continue: {command('ropepp-lit', 'fit', config=folder / 'recipe.yaml', ckpt_path='auto')}"
    )


def divergence_summary(model: CausalLM, trainer: pl.Trainer) -> str:
    """Return the summary of a run that diverged: the last valid checkpoint, and the command that continues from it.

    Args:
        model: Model after training.
        trainer: Trainer of the run.
    """
    folder = Path(trainer.default_root_dir)
    checkpoint = newest(folder_of(folder))
    last = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved before"
    options = {"config": folder / "recipe.yaml", "ckpt_path": "auto"}
    if model.on_nan == "skip":
        return f"{last}. Lower model.optimizer.lr, and continue: {command('ropepp-lit', 'fit', **options)}"
    skip = command("ropepp-lit", "fit", **options, model__on_nan="skip")
    return f"{last}. Lower model.optimizer.lr, or continue without such steps: {skip}"


def _skipped(model: CausalLM) -> str:
    """Return the number of skipped steps in parentheses, or nothing if there are none."""
    number = model.skipped_steps
    return f" ({number:,} of them skipped)" if number else ""
