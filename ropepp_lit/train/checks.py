"""Checks before a run: `fit`, `validate` and `plan` report mistakes before anything is written or computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from ropepp_lit.checkpoint import KEY, decoder_weights, describe_architecture, read_checkpoint
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.nn import Decoder
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.checkpoints import folder_of, newest
from ropepp_lit.train.evaluation import Evaluation
from ropepp_lit.train.fsdp import FSDP2Strategy


class Start(NamedTuple):
    """The weights that a run starts from."""

    message: str
    settings: dict[str, str | None]
    """See :attr:`CausalLM.settings`."""


def check_checkpointing(trainer: Any) -> None:
    """Raise UsageError where the trainer's options switch checkpoints off."""
    if trainer.enable_checkpointing is False:
        raise UsageError(
            "trainer.enable_checkpointing: a run always saves its last step; "
            "for no other checkpoints set checkpoints.every_n_steps above trainer.max_steps"
        )


def checkpoint_to_continue(options: Any) -> str | None:
    """The checkpoint that `ckpt_path` names: for `auto` the newest of the run's folder, None where there is none."""
    if options.ckpt_path != "auto":
        return options.ckpt_path
    found = newest(folder_of(options.trainer.default_root_dir or "."))
    return str(found) if found else None


class Checks:
    """The checks of one recipe. Each raises UsageError with one line that names the key or the file.

    Args:
        model: Before it is built.
        data: See :meth:`check_data` for what must be prepared.
        options: The recipe with its classes instantiated, as LightningCLI makes it.
        strategy: Of the trainer, where it is FSDP2.
        world_size: Devices on all nodes.
    """

    def __init__(
        self, model: CausalLM, data: TokenData, options: Any, *, strategy: FSDP2Strategy | None, world_size: int
    ) -> None:
        self._model, self._data, self._options = model, data, options
        self._strategy, self._world_size = strategy, world_size
        with torch.device("meta"):
            self._decoder = Decoder(model.config, model.scheme, model.frequencies)

    def check_steps(self) -> None:
        """The length of the run."""
        if self._options.trainer.max_steps < 1:
            raise UsageError(
                "trainer.max_steps: give the number of optimizer steps, 1 or more; runs are counted in steps"
            )

    def check_recipe(self, *, has_gpu: bool) -> None:
        """What can be checked without data.

        Args:
            has_gpu: Whether the run computes on GPUs.
        """
        model, context = self._model, self._data.context_length
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
        if model.scheme.uses_frequencies and reach is not None and context > reach:
            raise UsageError(
                f"data.context_length: {context:,} is beyond the {reach:,} tokens (factor × "
                "original_max_position_embeddings) that model.frequencies is made for"
            )

    def check_data(self) -> None:
        """The vocabulary and the evaluations; the data must be prepared and set up."""
        tokens, vocab_size = self._data.manifest.vocab_size, self._model.config.vocab_size
        if tokens > vocab_size:
            raise UsageError(f"model.decoder.vocab_size: {vocab_size} is below the {tokens} tokens of the tokenizer")
        for callback in (self._options.evaluation, *(self._options.trainer.callbacks or ())):
            if isinstance(callback, Evaluation):
                callback.check(self._decoder, self._data)

    def check_checkpoint(self, path: str) -> list[str]:
        """The checkpoint that `ckpt_path` names, to be validated.

        Returns:
            Lines to print: the recipe's values that replace the checkpoint's.
        """
        return self._compare_with(path, read_checkpoint(path, shapes_only=True))

    def check_resume(self, path: str) -> list[str]:
        """The checkpoint that `ckpt_path` names, to continue from.

        Returns:
            Lines to print: where the run continues, and the recipe's values that replace the checkpoint's.
        """
        checkpoint = read_checkpoint(path, shapes_only=True)
        lines = self._compare_with(path, checkpoint)
        stored, optimizer = checkpoint[KEY]["optimizer"], type(self._model.optimizer_config).__name__
        if stored is None:
            raise UsageError(f"ckpt_path: {path} stores weights only; start from them by --model.init_from {path}")
        if stored != optimizer:
            raise UsageError(
                f"model.optimizer: {path} stores the state of {stored}, which {optimizer} cannot continue; "
                "use the same optimizer"
            )
        step, max_steps = checkpoint["global_step"], self._options.trainer.max_steps
        left = f"{max_steps - step:,} steps are left" if step < max_steps else "raise --trainer.max_steps to go on"
        return [*lines, f"Continuing from {path} at step {step:,} of {max_steps:,}: {left}"]

    def _compare_with(self, path: str, checkpoint: dict[str, Any]) -> list[str]:
        if Path(path).is_dir() and self._strategy is None:
            raise UsageError(f"ckpt_path: {path} is in shards; continue it by --trainer.strategy fsdp2, on any devices")
        differences = self._differences(path, checkpoint)
        return [f"The recipe differs from {path}; the recipe's values apply: {differences}"] if differences else []

    def check_init_from(self) -> Start | None:
        """The weights that `model.init_from` names; None where the recipe names none.

        The tokenizers are compared where the data is set up.
        """
        model, path = self._model, self._model.init_from
        if path is None:
            if model.init_optimizer:
                raise UsageError("model.init_optimizer: takes the optimizer's state of model.init_from; name that too")
            return None
        checkpoint = open_checkpoint(path, shapes_only=True)
        stored = checkpoint[KEY]
        if model.init_optimizer and not checkpoint.get("optimizer_states"):
            raise UsageError(f"model.init_optimizer: {path} is not a file with an optimizer's state")
        if model.init_optimizer and stored["optimizer"] != type(model.optimizer_config).__name__:
            raise UsageError(f"model.init_optimizer: {path} stores the state of {stored['optimizer']}")
        changes = [self._differences(path, checkpoint)]
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
        message = f"Starting from the weights of {path}" + (f": {difference}" if difference else "")
        theirs, ours = stored["tokenizer"], getattr(self._data, "tokenizer_json", None)
        if theirs is None or ours is None:
            return Start(message, {})
        if Tokenizer.from_str(theirs).get_vocab() != Tokenizer.from_str(ours).get_vocab():
            note = f"Note: the data's tokenizer is not that of {path}, so its embeddings belong to other tokens."
            return Start(f"{message}\n{note}", {})
        return Start(message, {key: stored.get(key) for key in ("tokenizer_config", "generation_config")})

    def _differences(self, path: str, checkpoint: dict[str, Any]) -> str:
        """What differs between a checkpoint's architecture and the recipe's; the shapes of the weights must agree."""
        model = self._model
        stored = _flatten(checkpoint[KEY]["architecture"])
        ours = _flatten(describe_architecture(model.config, model.scheme, model.frequencies))
        differences = ", ".join(
            f"{name} {stored.get(name, 'none')} → {ours.get(name, 'none')}"
            for name in stored | ours
            if stored.get(name) != ours.get(name)
        )
        shapes = {name: value.shape for name, value in self._decoder.state_dict().items()}
        if shapes != {name: value.shape for name, value in decoder_weights(checkpoint).items()}:
            raise UsageError(f"{path}: its weights do not fit the recipe's model ({differences}); change the recipe")
        return differences


def _flatten(architecture: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names they have in a recipe."""
    flat = {f"model.decoder.{name}": value for name, value in architecture["decoder"].items()}
    for part in ("positions", "frequencies"):
        flat[f"model.{part}"] = architecture[part]["class_path"].rpartition(".")[2]
        flat |= {f"model.{part}.{name}": value for name, value in architecture[part]["init_args"].items()}
    return flat
