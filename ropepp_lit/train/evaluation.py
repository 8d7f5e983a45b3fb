"""Long-context evaluation during training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.tasks import EvaluationSettings, averages, check_units, measure_unit
from ropepp_lit.nn import Decoder
from ropepp_lit.sizes import parse_tokens
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.metric_logging import log_metrics
from ropepp_lit.train.watchdog import without_timeout

KINDS = ("perplexity", "retrieval", "recall", "induction")
"""Tasks that can run during training."""


@contextmanager
def evaluating(trainer: pl.Trainer, decoder: Decoder) -> Iterator[None]:
    """Prepare a decoder for evaluation or generation between training steps, identically on every rank.

    The decoder computes in the run's precision. Ranks that share the tokens of a row in training (context parallelism)
    compute full rows. Compiled blocks run in eager mode, because each new length would be compiled. Dropout is
    disabled.
    """
    was_training = decoder.training
    decoder.eval()
    with (
        trainer.precision_plugin.val_step_context(),
        decoder.full_rows(),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            yield
        finally:
            decoder.train(was_training)


class EveryNSteps(Callback):
    """Callback that runs every N optimizer steps and after the last one, on every rank.

    Args:
        key: Key of the callback in the recipe, for messages.
        every_n_steps: Number of optimizer steps; 0 means never.
    """

    def __init__(self, key: str, every_n_steps: int) -> None:
        if every_n_steps < 0:
            raise UsageError(f"{key}.every_n_steps: {every_n_steps} must be 0 (never) or more")
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the step from which a run resumes as done: its first micro-batch may not end a step."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Run if due, once per step."""
        step = trainer.global_step
        is_due = bool(self.every_n_steps) and (step % self.every_n_steps == 0 or step >= trainer.max_steps)
        if not is_due or step == self._last_step:
            return
        self._last_step = step
        assert isinstance(pl_module, CausalLM)
        with pl_module.pause_throughput(), without_timeout(trainer):
            self.run(trainer, pl_module)

    @abstractmethod
    def run(self, trainer: pl.Trainer, module: CausalLM) -> None:
        """Run the callback's operation; its time is excluded from the throughput."""


class Evaluation(EveryNSteps):
    """Runs tasks of `ropepp-lit evaluate` during training and at the last step, and logs the results as `eval/…`.

    Args:
        every_n_steps: Optimizer steps between evaluations; 0 disables them.
        tasks: Comma-separated tasks: perplexity, retrieval (or selected families: retrieval:single+multikey), recall,
            induction, noise.
        lengths: Comma-separated context lengths in tokens; k means 1,024.
        limit: Number of held-out documents (of each validation set), and of examples of each family.
        seed: Seed of the examples.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 0,
        tasks: str = "perplexity,retrieval:single+multikey",
        lengths: str = "512,1k",
        limit: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__("evaluation", every_n_steps)
        names = tuple(word.strip() for word in tasks.split(",") if word.strip())
        try:
            sizes = tuple(parse_tokens("lengths", lengths))
            self.settings = EvaluationSettings(tasks=names, lengths=sizes, limit=limit, seed=seed)
        except UsageError as error:
            raise UsageError(f"evaluation.{error}") from error
        if self.settings.kinds - set(KINDS):
            raise UsageError(f"evaluation.tasks: only {', '.join(KINDS)} and noise during training")

    def check(self, decoder: Decoder, data: TokenData) -> None:
        """Raise UsageError if a task does not support a length; the decoder may be on the meta device."""
        if not self.every_n_steps:
            return
        try:
            model = self._model(decoder, data)
            check_units(model, self.settings.units(model), self.settings.request(min(self.settings.lengths)))
        except UsageError as error:
            raise UsageError(f"evaluation.{error}") from error

    def run(self, trainer: pl.Trainer, module: CausalLM) -> None:
        """Run the tasks and log their results."""
        module.check_finite()
        data = trainer.datamodule  # type: ignore[attr-defined]
        model = self._model(module.decoder, data)
        with evaluating(trainer, module.decoder):
            sets = data.held_out_texts(self.settings.limit) if self.settings.needs_text else {}
            texts = [text for documents in sets.values() for text in documents]
            documents = [model.tokenizer.encode_whole(text) for text in texts]
            measurements = [
                item
                for unit in self.settings.units(model)
                for item in measure_unit(model, unit, self.settings, texts=texts, documents=documents).measurements
                if item.position is None and item.depth is None
            ]
        values = {}
        for item in [*measurements, *averages(measurements)]:
            noise = "" if item.noise_std is None else f"/noise_{item.heads}_{item.noise_std:g}"
            name = "/".join(filter(None, ("eval", item.task, item.part, str(item.length), item.metric)))
            values[f"{name}{noise}"] = float(item.value)
        log_metrics(trainer, values, trainer.global_step)

    @staticmethod
    def _model(decoder: Decoder, data: TokenData) -> Model:
        return Model(name="", path="", decoder=decoder, tokenizer=data.text_tokenizer, fingerprint="")
