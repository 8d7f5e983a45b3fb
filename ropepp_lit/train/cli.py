"""`ropepp-lit fit` and `ropepp-lit validate`: LightningCLI with checks before a run and a summary after it."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ropepp_lit.arguments import OneLineErrors
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.files import local_path
from ropepp_lit.train.callbacks import Banner, ProgressBar, TextSample
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.checkpoints import Checkpoints, check_folder, folder_of
from ropepp_lit.train.checks import Checks, check_checkpointing, checkpoint_to_continue
from ropepp_lit.train.classes import CLASSES, check_classes
from ropepp_lit.train.evaluation import Evaluation
from ropepp_lit.train.fsdp import FSDP2Strategy
from ropepp_lit.train.garbage import GarbageCollection
from ropepp_lit.train.summary import rank_zero_print, stop_summary, training_summary, validation_summary


class _Parser(OneLineErrors, LightningArgumentParser):
    pass


class RecipeCLI(LightningCLI):
    """LightningCLI whose recipe overrides the checkpoint's, and which reports mistakes before anything is written."""

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
                "callbacks": [Banner(), GarbageCollection()],
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
        """Callbacks with options of their own; default classes, so that one of their settings can be given alone."""
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(TextSample, "sample")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.set_defaults({key: {"class_path": default.__name__} for key, (_, default) in CLASSES.items()})

    def _parse_ckpt_path(self) -> None:
        """Lightning's own method would replace the recipe's values by the checkpoint's."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """All that a run writes goes into its own folder, TensorBoard's events too."""
        config = self.config_init[self.subcommand].trainer
        check_checkpointing(config)
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
        except UsageError:
            raise
        except (MisconfigurationException, ValueError) as error:  # missing devices, an unknown strategy, and the like
            raise UsageError(f"trainer: {str(error).splitlines()[0]}") from error

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's own method would warn where a process with other arguments calls this one."""
        check_classes(args)
        self.config = parser.parse_args(args)
        options = self.config[self.config["subcommand"]]
        for key in ("trainer.default_root_dir", "data.cache_dir"):
            if options.get(key) is not None:
                local_path(key, str(options[key]))

    def before_fit(self) -> None:
        """Check everything that can be checked; then write the recipe into the run's folder."""
        self._started = time.monotonic()
        checks, options = self._checks(), self.config_init["fit"]
        checks.check_steps()
        options.weights_only = True
        options.ckpt_path = checkpoint_to_continue(options)
        self.model.loads_checkpoint = options.ckpt_path is not None
        checks.open_checkpoint(options.ckpt_path)
        self._check(checks)
        check_folder(folder_of(self.trainer.default_root_dir), options.ckpt_path)
        recipe = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml"))["fit"]
        recipe = {name: value for name, value in recipe.items() if name not in self._subcommand_method_arguments["fit"]}
        self.model.recipe = recipe
        self._write_recipe(recipe)

    def before_validate(self) -> None:
        """Check everything that can be checked."""
        checks, options = self._checks(), self.config_init["validate"]
        options.weights_only, options.verbose = True, False
        if options.ckpt_path is None:
            raise UsageError("ckpt_path is missing: name the checkpoint to validate by --ckpt_path")
        checks.open_checkpoint(options.ckpt_path, way="validate")
        self._check(checks)
        self.model.loads_checkpoint = True

    def _checks(self) -> Checks:
        strategy = self.trainer.strategy
        return Checks(
            self.model,
            self.datamodule,
            self.config_init[self.subcommand],
            strategy=strategy if isinstance(strategy, FSDP2Strategy) else None,
            world_size=self.trainer.world_size,
        )

    def _check(self, checks: Checks) -> None:
        lines = checks.check_recipe(has_gpu=not isinstance(self.trainer.accelerator, CPUAccelerator))
        self.datamodule.check()
        self.datamodule.prepare_data()
        self.datamodule.setup("check")
        for line in [*lines, *checks.check_data(), *checks.compare()]:
            rank_zero_print(line)

    @rank_zero_only
    def _write_recipe(self, recipe: dict[str, Any]) -> None:
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")

    def after_fit(self) -> None:
        """Validate the last step unless that is done, and print the summary."""
        self._leave_if_stopped()
        steps = {figures["step"] for figures in self.model.last_validation.values()}
        if steps != {self.model.steps_taken}:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        rank_zero_print(validation_summary(self.model, self.datamodule))
        prompt, seconds = self.config_init["fit"].sample.prompt, time.monotonic() - self._started
        rank_zero_print(training_summary(self.model, self.trainer, prompt=prompt, seconds=seconds))

    def _leave_if_stopped(self) -> None:
        """After a signal, exit with the code of a program that the signal ended."""
        checkpoints = self.trainer.checkpoint_callback
        assert isinstance(checkpoints, Checkpoints)
        number = checkpoints.stop.received
        if number is None:
            return
        rank_zero_print(stop_summary(self.model, self.trainer, number=number))
        # Rank 0 alone: a launcher ends the others when one of them fails.
        sys.exit(128 + number if self.trainer.is_global_zero else 0)

    def after_validate(self) -> None:
        """Print the results."""
        rank_zero_print(validation_summary(self.model, self.datamodule))


def quiet() -> None:
    """Silence Lightning's messages."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # reading costs next to nothing
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # torchmetrics has reduced over the ranks already
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
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
