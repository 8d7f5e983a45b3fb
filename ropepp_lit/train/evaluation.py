"""Evaluation at length while a model trains."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ropepp_lit.data.token_data import TokenData
from ropepp_lit.data.tokenizer import TextTokenizer
from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.tasks import Settings, averages, check, measure
from ropepp_lit.nn import Decoder
from ropepp_lit.sizes import parse_tokens
from ropepp_lit.train.causal_lm import CausalLM


class Evaluation(Callback):
    """Every so many steps, and at the last one, does what `ropepp-lit evaluate` does, and logs it as `eval/…`.

    Args:
        every_n_steps: Optimizer steps from one evaluation to the next; 0 never evaluates.
        tasks: Of perplexity, retrieval (or some families: retrieval:single+multikey) and noise, with commas.
        lengths: Tokens of the context, with commas; k is 1,024.
        limit: Held-out documents, and examples of each family.
        seed: Of examples.
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
        if every_n_steps < 0:
            raise UsageError(f"evaluation.every_n_steps: {every_n_steps} must be 0 (never) or more")
        self.every_n_steps = every_n_steps
        names = tuple(word.strip() for word in tasks.split(",") if word.strip())
        try:
            sizes = tuple(parse_tokens("lengths", lengths))
            self.settings = Settings(tasks=names, lengths=sizes, limit=limit, seed=seed)
        except UsageError as error:
            raise UsageError(f"evaluation.{error}") from error
        if self.settings.kinds - {"perplexity", "retrieval"}:
            raise UsageError("evaluation.tasks: while training perplexity, retrieval and noise; others by evaluate")
        self._evaluated_step = -1

    def check(self, decoder: Decoder, data: TokenData) -> None:
        """Raise UsageError where a length does not fit; the decoder may be without memory for its weights."""
        if not self.every_n_steps:
            return
        try:
            model = self._model(decoder, data)
            check(model, self.settings.units(model), self.settings)
        except UsageError as error:
            raise UsageError(f"evaluation.{error}") from error

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Evaluate, on every rank alike: weights that are spread over ranks need all of them."""
        step = trainer.global_step
        is_last = step >= trainer.max_steps
        if not self.every_n_steps or step in (0, self._evaluated_step) or (step % self.every_n_steps and not is_last):
            return
        self._evaluated_step = step
        assert isinstance(pl_module, CausalLM)
        data = trainer.datamodule  # type: ignore[attr-defined]
        model = self._model(pl_module.decoder, data)
        texts = list(data.held_out_texts(self.settings.limit)) if self.settings.needs_text else []
        with pl_module.untimed():
            found = [
                item
                for unit in self.settings.units(model)
                for item in measure(model, unit, self.settings, texts)[0]
                if item.position is None and item.depth is None
            ]
        values = {}
        for item in [*found, *averages(found)]:
            noise = "" if item.noise_std is None else f"/noise_{item.heads}_{item.noise_std:g}"
            name = "/".join(filter(None, ("eval", item.task, item.part, str(item.length), item.metric)))
            values[f"{name}{noise}"] = float(item.value)
        pl_module.log_figures(values, step)

    @staticmethod
    def _model(decoder: Decoder, data: TokenData) -> Model:
        manifest = data.manifest
        tokenizer = TextTokenizer.from_json(
            data.tokenizer_json, bos_token_id=manifest.bos_token_id, eos_token_id=manifest.eos_token_id
        )
        return Model(name="", path="", decoder=decoder, tokenizer=tokenizer, fingerprint="")
