"""Checks of `fit`, `validate` and `plan` before a run, so that errors are reported before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer

from ropepp_lit.checkpoint import KEY, decoder_weights, describe_architecture, read_checkpoint
from ropepp_lit.data.comparison import (
    ARCHITECTURE,
    CHAT_TEMPLATE,
    HELD_OUT,
    SPECIAL_IDS,
    TOKENIZER,
    compare,
    continued_at,
)
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.adapters import fingerprint, is_adapter
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.nn import Decoder
from ropepp_lit.train.build import qk_norms
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.checkpoints import folder_of, later_checkpoints, newest
from ropepp_lit.train.diagnostics import Diagnostics
from ropepp_lit.train.disk_space import checkpoint_bytes
from ropepp_lit.train.evaluation import Evaluation
from ropepp_lit.train.fsdp import FSDP2Strategy
from ropepp_lit.train.lora import check_options, continue_adapters, trained_shapes
from ropepp_lit.train.loss_average import choose_average
from ropepp_lit.train.run_state import read_run
from ropepp_lit.train.summary import rank_zero_print

Way = Literal["init_from", "fit", "validate"]
"""Use of a checkpoint: a run initializes its weights from it, continues from it, or validates it."""

REFUSED: dict[Way, tuple[str, ...]] = {"init_from": (), "fit": (TOKENIZER, SPECIAL_IDS), "validate": (TOKENIZER,)}
"""Differences between a checkpoint and a recipe that are errors. Others are printed."""


def checkpoint_to_continue(options: Any) -> str | None:
    """Return the checkpoint for `ckpt_path`; `auto` selects the newest valid one in the run's folder, or None.

    Raises:
        UsageError: the checkpoint is damaged, or the folder contains only damaged ones.
    """
    if options.ckpt_path != "auto":
        if options.ckpt_path is not None and Path(options.ckpt_path).exists():
            read_run(options.ckpt_path, checksums=True)
        return options.ckpt_path
    folder = folder_of(options.trainer.default_root_dir or ".")
    checkpoint = newest(folder, checksums=True)
    damaged = later_checkpoints(folder, checkpoint)
    if damaged and checkpoint is None:
        names = ", ".join(path.name for path in damaged)
        raise UsageError(
            f"ckpt_path: {folder} has only damaged checkpoints ({names}); move them away to start over; "
            f"{damaged[-1].name}: {_problem(damaged[-1])}"
        )
    for path in damaged:
        rank_zero_print(
            f"{path} is damaged: continuing from {checkpoint}; it is replaced when its step is saved again "
            f"({_problem(path)})"
        )
    return str(checkpoint) if checkpoint else None


def _problem(path: Path) -> str:
    """Return what is wrong with a damaged checkpoint, without the remedy."""
    try:
        read_run(path, checksums=True)
    except UsageError as error:
        return str(error).removeprefix(f"{path}: ").partition(";")[0]
    return "it can be read now"


class Checks:
    """Checks of a recipe. Each raises UsageError with one line that names the key or the file.

    Args:
        model: Model before it is built.
        data: The datamodule; only :meth:`check_data` requires it to be set up.
        options: The recipe with its classes instantiated by LightningCLI.
        strategy: Strategy of the trainer, if it is FSDP2.
        world_size: Number of devices on all nodes.
    """

    def __init__(
        self, model: CausalLM, data: TokenData, options: Any, *, strategy: FSDP2Strategy | None, world_size: int
    ) -> None:
        self._model, self._data, self._options = model, data, options
        self._strategy, self._world_size = strategy, world_size
        self._way: Way = "init_from"
        self._path = ""
        self._checkpoint: dict[str, Any] | None = None
        with torch.device("meta"):
            self._decoder = Decoder(model.config, model.scheme, model.frequencies)
        self._architecture = describe_architecture(model.config, model.scheme, model.frequencies)

    def open_checkpoint(self, ckpt_path: str | None, *, way: Way = "fit") -> None:
        """Read the checkpoint that is continued or validated, or else that of `model.init_from`.

        Args:
            ckpt_path: Path of the checkpoint; None if a run starts.
            way: Use of the checkpoint.

        Raises:
            UsageError: the checkpoint cannot be read.
        """
        model = self._model
        if ckpt_path is not None:
            self._way, self._path = way, ckpt_path
            self._checkpoint = read_checkpoint(ckpt_path, shapes_only=True)
            self._data.continue_from(ckpt_path, self._checkpoint[KEY])
            model.init_from, model.adapters.base_fingerprint = continue_adapters(
                self._checkpoint, ckpt_path, model.lora, model.init_from
            )
            if Path(ckpt_path).is_dir() and self._strategy is None:
                raise UsageError(
                    f"ckpt_path: {ckpt_path} is sharded; continue it by --trainer.strategy fsdp2, on any devices"
                )
        elif model.init_from is not None:
            self._path = model.init_from
            self._checkpoint = open_checkpoint(model.init_from, shapes_only=model.lora is None, checksums=True)
            if model.lora is not None:
                model.adapters.base_fingerprint = fingerprint(self._checkpoint)
        elif model.lora is not None:
            raise UsageError("model.lora: adapters require a base model; set model.init_from")
        elif model.init_optimizer:
            raise UsageError("model.init_optimizer: loads the optimizer state of model.init_from; set that too")

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint of the run."""
        model, precision = self._model, str(self._options.trainer.precision)
        return checkpoint_bytes(self._decoder, model.optimizer_config, lora=model.lora, precision=precision)

    def check_steps(self) -> None:
        """Check the length of the run and of the schedule."""
        if self._options.trainer.max_steps < 1:
            raise UsageError(
                "trainer.max_steps: give the number of optimizer steps, 1 or more; runs are counted in steps"
            )
        self._model.schedule.check(self._model.schedule.total_steps or self._options.trainer.max_steps)

    def check_recipe(self, *, has_gpu: bool) -> list[str]:
        """Run the checks that do not need data.

        Args:
            has_gpu: Whether the run uses GPUs.

        Returns:
            Lines to print.
        """
        model, context = self._model, self._data.context_length
        if model.lora is not None:
            check_options(
                model.lora,
                self._decoder,
                optimizer=model.optimizer_config,
                precision=str(self._options.trainer.precision),
                mlp_chunk_tokens=model.mlp_chunk_tokens,
                attention_head_groups=model.attention_head_groups,
                init_optimizer=model.init_optimizer,
                shards_checkpoint=getattr(self._strategy, "_save_distributed_checkpoint", False),
            )
        layout = self._decoder.head_layout.split(model.attention_head_groups)
        if self._strategy is not None:
            self._strategy.check(
                world_size=self._world_size,
                layout=layout,
                head_dim=model.config.head_dim,
                context_length=context,
            )
        if model.offload_activations and not has_gpu:
            raise UsageError(
                "model.offload_activations: moves activations from a GPU to the CPU, and this run has no GPU"
            )
        reach = model.frequencies.reach
        if not model.scheme.uses_frequencies or reach is None or context <= reach:
            return []
        problem = (
            f"data.context_length: {context:,} is beyond the {reach:,} tokens (factor × "
            "original_max_position_embeddings) that model.frequencies supports"
        )
        if not self._supports(context):
            raise UsageError(problem)
        return [f"Note: {problem}; the limit of {self._path or model.init_from} applies"]

    def _supports(self, context: int) -> bool:
        """Return whether the checkpoint states a context of this length with the recipe's frequencies."""
        if self._checkpoint is None:  # a plan, when the checkpoint does not exist yet
            return self._model.init_from is not None
        stored = self._checkpoint[KEY]
        changes = compare(stored, {"architecture": self._architecture}).get(ARCHITECTURE, "")
        return "model.frequencies" not in changes and context <= (stored.get("context_length") or 0)

    def check_data(self) -> list[str]:
        """Check vocabulary, loss and evaluations; the data must be prepared and set up.

        Returns:
            Lines to print.
        """
        lines = list(self._data.notices)
        choose_average(self._model.loss_average, self._data)
        checkpoint = None if self._way == "init_from" else self._checkpoint
        self._model.pairs.check(self._data, init_from=self._model.init_from, checkpoint=checkpoint, path=self._path)
        rows, tokens = self._model.config.vocab_size, self._data.manifest.vocab_size
        largest = self._data.largest_token_id
        if largest >= rows:
            remedy = f"prepare the data with the tokenizer of {self._path}" if self._path else f"set it to {tokens}"
            raise UsageError(
                f"model.decoder.vocab_size: {rows} is below the {tokens} tokens of the tokenizer, and {largest} "
                f"occurs in the data; {remedy}"
            )
        if tokens > rows:
            lines.append(
                f"Note: the tokenizer has {tokens:,} tokens and the model {rows:,}; the data do not contain the others"
            )
        own = (self._options.evaluation, self._options.diagnostics)
        for callback in (*own, *(self._options.trainer.callbacks or ())):
            if isinstance(callback, Evaluation | Diagnostics):
                callback.check(self._decoder, self._data)
        return lines

    def compare(self) -> list[str]:
        """Compare the checkpoint with the recipe: weights, architecture, tokenizer, special ids and documents.

        If the data are not set up, for example for a plan on another machine, they are not compared.

        Returns:
            Lines to print: where the run starts or continues, and the differences.

        Raises:
            UsageError: the weights do not fit, or a difference is an error (:data:`REFUSED`).
        """
        path, checkpoint, data = self._path, self._checkpoint, self._data
        if checkpoint is None:
            return []
        is_set_up = hasattr(data, "tokenizer_json")
        ours = {"architecture": self._architecture, **(data.entry if is_set_up else {})}
        differences = compare(checkpoint[KEY], ours)
        architecture = differences.get(ARCHITECTURE, "")
        shapes = trained_shapes(self._decoder, self._model.lora if is_adapter(checkpoint) else None)
        was_tied, is_tied = (
            architecture["decoder"]["tie_word_embeddings"]
            for architecture in (checkpoint[KEY]["architecture"], self._architecture)
        )
        # Tied checkpoints store both matrices. Tying would drop one of two, and the optimizer state has only one.
        cannot_convert = was_tied != is_tied and (is_tied or self._way == "fit")
        stored_shapes = {name: value.shape for name, value in decoder_weights(checkpoint).items()}
        has_norms = checkpoint[KEY]["architecture"]["decoder"].get("qk_norm")  # a damaged file may lack one of them
        if self._way == "init_from" and self._model.lora is None and not has_norms:  # added norms start at 1
            stored_shapes |= {name: shapes[name] for name in qk_norms(shapes) - stored_shapes.keys()}
        if cannot_convert or shapes != stored_shapes:
            raise UsageError(f"{path}: its weights do not fit the recipe's model ({architecture}); change the recipe")
        for kind in REFUSED[self._way]:
            if kind in differences:
                raise UsageError(
                    f"ckpt_path: the data of {path} has another {kind} than {', '.join(data.weights)} "
                    f"({differences[kind]}); prepare text by ropepp-lit prepare --tokenizer {path}, or start another "
                    f"run from the weights by --model.init_from {path}"
                )
        if self._way == "init_from":
            lines = [self._describe_start(architecture)]
        else:
            lines = (
                [f"The recipe differs from {path}; the recipe's values apply: {architecture}"] if architecture else []
            )
        if TOKENIZER in differences:
            lines.append(f"Note: the data's tokenizer is not that of {path}, so its embeddings belong to other tokens.")
        if SPECIAL_IDS in differences:
            lines.append(f"Note: the data's special tokens are not those of {path}: {differences[SPECIAL_IDS]}")
        if CHAT_TEMPLATE in differences:
            lines.append(
                f"Note: the data's chat template is not that of {path}; the data's is stored in the checkpoints."
            )
        if HELD_OUT in differences and self._way != "init_from":
            lines.append(
                f"Note: the run of {path} held out other documents than {differences[HELD_OUT]}; it may have been "
                "trained on these"
            )
        is_same = is_set_up and TOKENIZER not in differences
        self._model.settings = {
            key: checkpoint[KEY].get(key) for key in ("tokenizer_config", "generation_config") if is_same
        }
        if card := checkpoint[KEY].get("card"):
            self._model.settings["card"] = card
        return [*lines, *self._describe_resume()] if self._way == "fit" else lines

    def _describe_resume(self) -> list[str]:
        """Check that the run can resume, and return lines about the step and the data position."""
        path, checkpoint = self._path, self._checkpoint
        assert checkpoint is not None
        stored, optimizer = checkpoint[KEY]["optimizer"], type(self._model.optimizer_config).__name__
        if stored is None:
            raise UsageError(f"ckpt_path: {path} stores weights only; start from them by --model.init_from {path}")
        if stored != optimizer:
            raise UsageError(
                f"model.optimizer: {path} stores the state of {stored}, which {optimizer} cannot continue; "
                "use the same optimizer"
            )
        step, max_steps = checkpoint["global_step"], self._options.trainer.max_steps
        left = f"{max_steps - step:,} steps are left" if step < max_steps else "raise --trainer.max_steps to continue"
        lines = [f"Continuing from {path} at step {step:,} of {max_steps:,}: {left}"]
        states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader")
        if states and hasattr(self._data, "manifests"):
            sample, reason = continued_at(states[0], self._data.identity)
            before = states[0].get("samples", 0)
            if sample != before:
                lines.append(f"Note: the data start over at sample {sample:,} instead of {before:,}: {reason}")
        return lines

    def _describe_start(self, architecture: str) -> str:
        """Check that the run can start from the checkpoint's weights, and return a line with the differences."""
        model, path, checkpoint = self._model, self._path, self._checkpoint
        assert checkpoint is not None
        stored = checkpoint[KEY]
        if model.init_optimizer and not checkpoint.get("optimizer_states"):
            raise UsageError(f"model.init_optimizer: {path} is not a file with an optimizer's state")
        if model.init_optimizer and stored["optimizer"] != type(model.optimizer_config).__name__:
            raise UsageError(f"model.init_optimizer: {path} stores the state of {stored['optimizer']}")
        changes = [architecture]
        accumulated = self._options.trainer.accumulate_grad_batches
        replicas = self._world_size // (self._strategy.context_parallel_size if self._strategy is not None else 1)
        after = self._data.tokens_per_step(accumulate_grad_batches=accumulated, num_replicas=replicas)
        before = round(stored["tokens_seen"] / checkpoint["global_step"]) if checkpoint["global_step"] else None
        for name, old, new in (
            ("data.context_length", stored.get("context_length"), self._data.context_length),
            ("tokens per step", before, after),
        ):
            if old not in (None, new):
                changes.append(f"{name} {old:,} → {new:,}")
        difference = ", ".join(filter(None, changes))
        return f"Starting from the weights of {path}" + (f": {difference}" if difference else "")


def require_a_step(trainer: pl.Trainer, *, first_step: int) -> None:
    """Check that a run has taken a step.

    Args:
        trainer: Trainer at the end of the run.
        first_step: Step at which this run started or resumed.

    Raises:
        UsageError: the run ended without a step.
    """
    if trainer.global_step >= trainer.max_steps or trainer.global_step > first_step:
        return
    timers = (callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    if any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers):
        raise UsageError(
            "trainer.max_time: used up before the first step; it includes the time before a resume: raise it"
        )
    if trainer.global_step == 0:
        raise UsageError("the run ended without a step; check why trainer.callbacks stopped it")
