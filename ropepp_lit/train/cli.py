"""`ropepp-lit fit` and `ropepp-lit validate`: LightningCLI's, with the toolkit's checks before and a summary after."""

from __future__ import annotations

import inspect
import logging
import re
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tokenizers import Tokenizer

from ropepp_lit.arguments import OneLineErrors
from ropepp_lit.checkpoint import KEY, decoder_weights, describe_architecture, read_checkpoint
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.nn import Decoder, Frequencies, PositionScheme, RoPEPP
from ropepp_lit.train.callbacks import Banner, ProgressBar, TextSample
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.checkpoints import LAST, Checkpoints, folder_of, newest, saved_steps
from ropepp_lit.train.evaluation import Evaluation
from ropepp_lit.train.fsdp import FSDP2Strategy
from ropepp_lit.train.optimizer import AdamW, OptimizerConfig
from ropepp_lit.train.schedule import Schedule, WarmupStableDecay

CLASSES = {
    "model.positions": (PositionScheme, RoPEPP),
    "model.frequencies": (Frequencies, Frequencies),
    "model.optimizer": (OptimizerConfig, AdamW),
    "model.schedule": (Schedule, WarmupStableDecay),
}
"""Keys that name a class: what it must be, and the default."""


class _Parser(OneLineErrors, LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say which classes there are where a name is none of them."""
        wrong = re.search(r'"([\w.]+)".*Expected a dot import path string: (\S+)', message, re.DOTALL)
        if wrong and wrong[1] in CLASSES:
            base = CLASSES[wrong[1]][0]
            known = ", ".join(kind.__name__ for kind in _classes(base))
            message = f"{wrong[1]}: no class {wrong[2]!r}; choose of {known}, or name one of your own as module.Class"
        super().error(message, ex)


class RecipeCLI(LightningCLI):
    """LightningCLI whose recipe always rules, and which finds mistakes before anything is written."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(
            CausalLM,
            TokenData,
            args=arguments,
            save_config_callback=None,  # written here, after the checks
            seed_everything_default=0,
            parser_class=_Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "callbacks": [Banner()],
                "check_val_every_n_epoch": None,  # a run is counted in steps
                "enable_model_summary": False,  # the banner says more
                "inference_mode": False,
                "use_distributed_sampler": False,  # the data's plan knows the ranks
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The two of Lightning's subcommands that training needs."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks with options of their own; default classes, so that one setting of theirs can be given alone."""
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(TextSample, "sample")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.set_defaults({key: {"class_path": default.__name__} for key, (_, default) in CLASSES.items()})

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's: it would replace what the recipe says by what the checkpoint was made with."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """All that a run writes goes into its own folder, TensorBoard's events too."""
        config = self.config_init[self.subcommand].trainer
        if config.enable_checkpointing is False:
            raise UsageError(
                "trainer.enable_checkpointing: a run always saves its last step; "
                "for no other checkpoints set checkpoints.every_n_steps above trainer.max_steps"
            )
        if config.enable_progress_bar is not False:
            kwargs["callbacks"] = [*(config.callbacks or []), ProgressBar()]
        if isinstance(config.strategy, FSDP2Strategy):
            if config.precision == "64-true":
                # Lightning has the plugin, and refuses its name where the strategy is an object.
                kwargs |= {"precision": None, "plugins": [*(config.plugins or []), DoublePrecision()]}
            config.strategy.check_precision(str(config.precision))
        if config.logger in (None, True):
            folder = config.default_root_dir or "."
            kwargs["logger"] = TensorBoardLogger(folder, name="tensorboard", version="")
        try:
            return super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:  # devices that are not there, and the like
            raise UsageError(f"trainer: {str(error).splitlines()[0]}") from error

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's would warn where a process with arguments of its own calls us."""
        self.config = parser.parse_args(args)

    def before_fit(self) -> None:
        """Find every mistake that can be known; then write the recipe into the run's folder."""
        self._started = time.monotonic()
        if self.trainer.max_steps < 1:
            raise UsageError(
                "trainer.max_steps: give the number of optimizer steps, 1 or more; runs are counted in steps"
            )
        self._check()
        self._check_init_from()
        folder = folder_of(self.trainer.default_root_dir)
        options = self.config_init["fit"]
        options.weights_only = True
        if options.ckpt_path == "auto":
            found = newest(folder)
            options.ckpt_path = str(found) if found else None
        self._check_checkpoint(options.ckpt_path)
        self.model.loads_checkpoint = options.ckpt_path is not None
        steps = saved_steps(folder)
        if steps and options.ckpt_path is None:
            raise UsageError(
                f"{folder} holds checkpoints of an earlier run (step {max(steps)}); continue it by --ckpt_path auto, "
                "or choose another --trainer.default_root_dir"
            )
        recipe = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml"))["fit"]
        recipe = {name: value for name, value in recipe.items() if name not in self._subcommand_method_arguments["fit"]}
        self.model.recipe = recipe
        self._write_recipe(recipe)

    def before_validate(self) -> None:
        """Find every mistake that can be known."""
        options = self.config_init["validate"]
        options.weights_only, options.verbose = True, False
        if options.ckpt_path is None:
            raise UsageError("ckpt_path is missing: name the checkpoint to validate by --ckpt_path")
        self._check()
        self._check_checkpoint(options.ckpt_path)
        self.model.loads_checkpoint = True

    def _check(self) -> None:
        layout = self._skeleton().head_layout
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            strategy.check(
                world_size=self.trainer.world_size,
                layout=layout,
                head_dim=self.model.config.head_dim,
                context_length=self.datamodule.context_length,
            )
        if self.model.offload_activations and isinstance(self.trainer.accelerator, CPUAccelerator):
            raise UsageError(
                "model.offload_activations: moves activations from a GPU to the CPU, and this run has no GPU"
            )
        reach, context = self.model.frequencies.reach, self.datamodule.context_length
        if self.model.scheme.uses_frequencies and reach is not None and context > reach:
            raise UsageError(
                f"data.context_length: {context:,} is beyond the {reach:,} tokens (factor × "
                "original_max_position_embeddings) that model.frequencies is made for"
            )
        self.datamodule.check()
        self.datamodule.prepare_data()
        self.datamodule.setup("check")
        tokens, vocab_size = self.datamodule.manifest.vocab_size, self.model.config.vocab_size
        if tokens > vocab_size:
            raise UsageError(f"model.decoder.vocab_size: {vocab_size} is below the {tokens} tokens of the tokenizer")
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Evaluation):
                callback.check(self._skeleton(), self.datamodule)

    def _check_checkpoint(self, path: str | None) -> None:
        """Compare what the checkpoint holds with what the recipe wants; the recipe rules where the shapes allow."""
        if path is None:
            return
        checkpoint = read_checkpoint(path, shapes_only=True)
        if Path(path).is_dir() and not isinstance(self.trainer.strategy, FSDP2Strategy):
            raise UsageError(f"ckpt_path: {path} is in shards; continue it by --trainer.strategy fsdp2, on any devices")
        differences = self._compare(path, checkpoint)
        if differences:
            rank_zero_print(f"The recipe differs from that of {path} and holds: {differences}")
        if self.subcommand != "fit":
            return
        optimizer = type(self.model.optimizer_config).__name__
        if checkpoint[KEY]["optimizer"] is None:
            raise UsageError(f"ckpt_path: {path} holds weights alone; begin with them by --model.init_from {path}")
        if checkpoint[KEY]["optimizer"] != optimizer:
            raise UsageError(
                f"model.optimizer: {path} holds the state of {checkpoint[KEY]['optimizer']}, "
                f"which {optimizer} cannot continue; use the same optimizer"
            )
        step, max_steps = checkpoint["global_step"], self.trainer.max_steps
        left = f"{max_steps - step:,} steps are left" if step < max_steps else "raise --trainer.max_steps to go on"
        rank_zero_print(f"Continuing from {path} at step {step:,} of {max_steps:,}: {left}")

    def _check_init_from(self) -> None:
        """Compare the weights that a run begins with, and say what changes."""
        path = self.model.init_from
        if path is None:
            if self.model.init_optimizer:
                raise UsageError("model.init_optimizer: takes the optimizer's state of model.init_from; name that too")
            return
        checkpoint = open_checkpoint(path, shapes_only=True)
        if self.model.init_optimizer and not checkpoint.get("optimizer_states"):
            raise UsageError(f"model.init_optimizer: {path} is no file with an optimizer's state")
        if self.model.init_optimizer and checkpoint[KEY]["optimizer"] != type(self.model.optimizer_config).__name__:
            raise UsageError(f"model.init_optimizer: {path} holds the state of {checkpoint[KEY]['optimizer']}")
        ours, changes = checkpoint[KEY], [self._compare(path, checkpoint)]
        strategy, accumulated = self.trainer.strategy, self.trainer.accumulate_grad_batches
        ranks = strategy.context_parallel_size if isinstance(strategy, FSDP2Strategy) else 1
        replicas = self.trainer.world_size // ranks
        after = self.datamodule.tokens_per_step(accumulate_grad_batches=accumulated, num_replicas=replicas)
        before = round(ours["tokens_seen"] / checkpoint["global_step"]) if checkpoint["global_step"] else None
        for name, old, new in (
            ("data.context_length", ours.get("context_length"), self.datamodule.context_length),
            ("tokens per step", before, after),
        ):
            if old not in (None, new):
                changes.append(f"{name} {old:,} → {new:,}")
        said = ", ".join(filter(None, changes))
        rank_zero_print(f"Beginning with the weights of {path}" + (f": {said}" if said else ""))
        if ours["tokenizer"] is None:
            return
        known, used = (
            Tokenizer.from_str(text).get_vocab() for text in (ours["tokenizer"], self.datamodule.tokenizer_json)
        )
        if known == used:
            self.model.settings = {key: ours.get(key) for key in ("tokenizer_config", "generation_config")}
        else:
            rank_zero_print(f"Notice: the data's tokenizer is not that of {path}, so its embeddings mean other tokens.")

    def _compare(self, path: str, checkpoint: dict[str, Any]) -> str:
        """What differs between a checkpoint's architecture and the recipe's; its weights must fit."""
        trained = _flatten(checkpoint[KEY]["architecture"])
        wanted = _flatten(describe_architecture(self.model.config, self.model.scheme, self.model.frequencies))
        differences = ", ".join(
            f"{name} {trained.get(name, 'none')} → {wanted.get(name, 'none')}"
            for name in trained | wanted
            if trained.get(name) != wanted.get(name)
        )
        shapes = {name: value.shape for name, value in self._skeleton().state_dict().items()}
        if shapes != {name: value.shape for name, value in decoder_weights(checkpoint).items()}:
            raise UsageError(f"{path}: its weights do not fit the recipe's model ({differences}); mend the recipe")
        return differences

    def _skeleton(self) -> Decoder:
        """The decoder without memory for its weights."""
        with torch.device("meta"):
            return Decoder(self.model.config, self.model.scheme, self.model.frequencies)

    @rank_zero_only
    def _write_recipe(self, recipe: dict[str, Any]) -> None:
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")

    def after_fit(self) -> None:
        """Validate the last step unless that is done, and say where things are and what to type next."""
        self._leave_if_stopped()
        steps = {figures["step"] for figures in self.model.last_validation.values()}
        if steps != {self.model.steps_taken}:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self._print_validation()
        folder = self.trainer.default_root_dir
        checkpoint, recipe = folder_of(folder) / LAST, Path(folder) / "recipe.yaml"
        prompt = shlex.quote(self.config_init["fit"].sample.prompt)
        seconds = time.monotonic() - self._started
        rank_zero_print(
            f"""
Step {self.model.steps_taken:,}, {self.model.tokens_seen:,} tokens read, {seconds:.0f} seconds.
Everything is in {folder}: checkpoints, recipe.yaml, tensorboard.

Next:
  ropepp-lit generate {checkpoint} --prompt {prompt}
  ropepp-lit validate --config {recipe} --ckpt_path {checkpoint}
  ropepp-lit evaluate {checkpoint} --out {Path(folder) / "evaluation"}
  ropepp-lit fit --config {recipe} --ckpt_path auto --trainer.max_steps {2 * self.trainer.max_steps}
  tensorboard --logdir {folder}"""
        )

    def _leave_if_stopped(self) -> None:
        """After a signal: say from where to go on, and exit as a program does that the signal ended."""
        checkpoints = self.trainer.checkpoint_callback
        assert isinstance(checkpoints, Checkpoints)
        number = checkpoints.stop.received
        if number is None:
            return
        folder = Path(self.trainer.default_root_dir)
        rank_zero_print(
            f"\nStopped by {signal.Signals(number).name} at step {self.model.steps_taken:,}, saved as "
            f"{newest(folder_of(folder))}. Continue: ropepp-lit fit --config {folder / 'recipe.yaml'} --ckpt_path auto"
        )
        # Rank 0 alone: a launcher ends the others when one of them fails.
        sys.exit(128 + number if self.trainer.is_global_zero else 0)

    def after_validate(self) -> None:
        """Show the figures."""
        self._print_validation()

    def _print_validation(self) -> None:
        if not self.model.last_validation:
            rank_zero_print("Not validated, as trainer.limit_val_batches says.")
        for name, values in self.model.last_validation.items():
            held_out = self.datamodule.validation_sets[name]
            gzip = f"   {8 * held_out.gzip_bytes / held_out.bytes:.3f} (gzip -9)" if held_out.gzip_bytes else ""
            whole = self.datamodule.predicted_tokens(held_out)
            rank_zero_print(
                f"""
Held-out text of {name} ({held_out.documents:,} documents, {held_out.bytes:,} bytes) at step {values["step"]:,.0f}, \
{values["tokens"]:,.0f} of {whole:,} tokens:
  loss {values["loss"]:.4f} nats per token, perplexity {values["perplexity"]:.2f}
  bits per byte: {values["bits_per_byte"]:.3f} (this model){gzip}"""
            )


def _classes(base: type) -> list[type]:
    """A class and all that derive from it, so far as they are known and can be made."""
    children: list[type] = base.__subclasses__()
    derived = [kind for child in children for kind in _classes(child)]
    return derived if inspect.isabstract(base) else [base, *derived]


def _flatten(architecture: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names they have in a recipe."""
    flat = {f"model.decoder.{name}": value for name, value in architecture["decoder"].items()}
    for part in ("positions", "frequencies"):
        flat[f"model.{part}"] = architecture[part]["class_path"].rpartition(".")[2]
        flat |= {f"model.{part}.{name}": value for name, value in architecture[part]["init_args"].items()}
    return flat


@rank_zero_only
def rank_zero_print(text: str) -> None:
    """Print once, not once for each rank."""
    print(text, flush=True)


def quiet() -> None:
    """Silence what Lightning says of itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # reading costs next to nothing
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # torchmetrics has gathered the ranks already
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")  # its own affair
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")


def main(arguments: list[str]) -> None:
    """Run `fit` or `validate`.

    Args:
        arguments: The subcommand and its options.
    """
    quiet()
    # Before anything is computed, as threads inherit it. CPUs are slow on weights near 1e-40, which ALiBi's softmax
    # gives to many far keys.
    torch.set_flush_denormal(True)
    RecipeCLI(arguments)
