"""Commands `ropepp-lit fit` and `ropepp-lit validate`: LightningCLI with checks before a run and a summary after it."""

from __future__ import annotations

import gc
import logging
import os
import shlex
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import DoublePrecision

from ropepp_lit.arguments import OneLineErrors, check_given
from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.files import held, local_path
from ropepp_lit.train.callbacks import Banner, ProgressBar, TextSample
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.checkpoint_writer import checkpoint_path, saved_steps
from ropepp_lit.train.checkpoints import Checkpoints, check_folder, folder_of
from ropepp_lit.train.checks import Checks, checkpoint_to_continue, require_a_step
from ropepp_lit.train.classes import CLASSES, check_classes, check_nulls, check_sections
from ropepp_lit.train.diagnostics import Diagnostics
from ropepp_lit.train.disk_space import check_first
from ropepp_lit.train.evaluation import Evaluation
from ropepp_lit.train.finite import DivergedError
from ropepp_lit.train.fsdp import FSDP2Strategy
from ropepp_lit.train.garbage import GarbageCollection
from ropepp_lit.train.lightning_errors import check_launcher, in_one_line
from ropepp_lit.train.metric_logging import truncate_logs
from ropepp_lit.train.recipe import write_recipe
from ropepp_lit.train.run_log import describe_start
from ropepp_lit.train.spikes import LossSpikes, RollBack, SpikeError, forget_skipped, roll_back, skipped_samples
from ropepp_lit.train.summary import (
    divergence_summary,
    rank_zero_print,
    stop_summary,
    training_summary,
    validation_summary,
)
from ropepp_lit.train.trainer_options import check_folders, check_options, dry_run, has_progress_bar
from ropepp_lit.train.validations import is_due, validated_step
from ropepp_lit.train.watchdog import Watchdog


class _Parser(OneLineErrors, LightningArgumentParser):
    pass


class RecipeCLI(LightningCLI):
    """LightningCLI that reports errors before it writes anything; recipes override settings of the checkpoint."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments, self._started = arguments, time.monotonic()
        self.rollback_path: str | None = None
        """Checkpoint to which the run rolled back, and from which the command continues."""
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
                "check_val_every_n_epoch": None,  # val_check_interval counts across epochs
                "enable_model_summary": False,  # the banner replaces it
                "inference_mode": False,
                "use_distributed_sampler": False,  # the data loader distributes samples over ranks
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return those of Lightning's subcommands that are supported."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Create the parser of a subcommand, with our help for `--ckpt_path`, which accepts `auto`."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        (action,) = (action for action in parser._actions if action.dest == "ckpt_path")
        auto = "`auto` selects the newest valid one in the run's folder, or starts a new run if there is none."
        action.help = "Checkpoint to validate." if subcommand == "validate" else f"Checkpoint to continue from. {auto}"
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks' options, and default classes, so that single settings of a class can be given."""
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(TextSample, "sample")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(Diagnostics, "diagnostics")
        parser.add_lightning_class_args(LossSpikes, "spikes")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.set_defaults({key: {"class_path": default.__name__} for key, (_, default) in CLASSES.items() if default})

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's method replaces the recipe's values by those of the checkpoint."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Create the trainer; everything is written to the run's folder, including TensorBoard's events."""
        config = self.config_init[self.subcommand].trainer
        check_options(config)
        self.is_dry_run = bool(config.fast_dev_run)
        if self.is_dry_run:
            for key, value in dry_run(config).items():
                config[key] = value
        if self.subcommand == "validate":
            kwargs["logger"] = False  # do not add to the logs of the run
        else:
            self.config_init.fit.checkpoints.is_dry_run = self.is_dry_run
        if config.enable_progress_bar is not False and not has_progress_bar(config.callbacks):
            kwargs["callbacks"] = [*config.callbacks, ProgressBar()]
        if isinstance(config.strategy, FSDP2Strategy):
            if config.precision == "64-true":
                # Lightning has the plugin, but rejects its name for a strategy object.
                kwargs |= {"precision": None, "plugins": [*config.plugins, DoublePrecision()]}
            config.strategy.check_precision(str(config.precision))
        if config.logger in (None, True) and self.subcommand == "fit":
            folder = config.default_root_dir or "."
            kwargs["logger"] = TensorBoardLogger(folder, name="tensorboard", version="")
        trainer = super().instantiate_trainer(**kwargs)
        if str(config.precision) in ("16", "16-mixed") and trainer.precision == "bf16-mixed":
            raise UsageError("trainer.precision: 16-mixed is for GPUs; use bf16-mixed on a CPU")
        # Validate before files are written, and for one device too: each process of a launcher would be a run.
        environment = trainer._accelerator_connector.cluster_environment
        environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
        check_launcher(os.environ)
        return trainer

    def instantiate_classes(self) -> None:
        """Instantiate the classes; errors of Lightning or a cluster's environment are reported in one line."""
        with in_one_line("trainer"):
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the subcommand, log its end, and report user errors, a full disk and divergence in one line."""
        with ExitStack() as self._until_end:
            self._until_end.push(self._log_end)
            self._run_in_one_line(subcommand)

    def _run_in_one_line(self, subcommand: str) -> None:
        try:
            with in_one_line("trainer"):
                super()._run_subcommand(subcommand)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # a second Ctrl-C, which Lightning hides
                raise error.__context__ from None
            raise
        except DivergedError as error:
            self.config_init.fit.checkpoints.finish()
            if not self.trainer.is_global_zero:
                sys.exit(0)  # with another code the launcher could kill rank 0 before it prints the error
            if isinstance(error, SpikeError):
                raise UsageError(str(error)) from error
            raise UsageError(f"{error}; {divergence_summary(self.model, self.trainer)}") from error
        except RollBack as rollback:
            self._roll_back(rollback)

    def _roll_back(self, rollback: RollBack) -> None:
        """Set the checkpoint from which the command continues, skipping the data read since."""
        checkpoints, folder = self.config_init.fit.checkpoints, folder_of(self.trainer.default_root_dir)
        checkpoints.finish()
        checkpoints.stop.uninstall()
        path = checkpoint_path(folder, rollback.to_step)
        if self.trainer.is_global_zero:
            roll_back(path, rollback, self.model)
        self.trainer.strategy.barrier("rollback")  # before other ranks read the folder
        self.rollback_path = str(path)

    def _log_end(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Write the last event of the run's log, and close it."""
        trainer, model, values = self.trainer, self.model, dict[str, Any]()
        if not model.run_log.is_open or self.rollback_path is not None:
            model.run_log.close()
            return
        if error is None:
            reason = "finished" if model.steps_taken >= trainer.max_steps else "stopped"
        elif isinstance(error, SystemExit) and self.config_init.fit.checkpoints.stop.received is not None:
            reason = "signal"
        else:
            reason = "diverged" if isinstance(error.__cause__, DivergedError) else "error"
            values = {"error": type(error).__name__, "message": " ".join(str(error).split())}
        seconds = round(time.monotonic() - self._started, 3)
        values |= {"tokens": model.tokens_seen, "skipped_steps": model.skipped_steps, "seconds": seconds}
        model.run_log.write("end", step=model.steps_taken, reason=reason, **values)
        model.run_log.close()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, without the warning of Lightning's method if `sys.argv` differs from them."""
        check_classes(args)
        try:
            self.config = parser.parse_args(args)
        except UsageError:
            raise
        except (ImportError, OverflowError, ValueError) as error:  # URL without its library, huge number, NUL
            raise UsageError(f"config: {error}") from error
        options = self.config[self.config["subcommand"]]
        check_sections(options)
        check_nulls(options)
        check_given(args[1:], options)
        seed = options.seed_everything
        if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UsageError(f"seed_everything: {seed} must be 0 or more and below 2^32")
        for key in ("trainer.default_root_dir", "data.cache_dir"):
            if options.get(key) is not None:
                local_path(key, str(options[key]))

    def before_fit(self) -> None:
        """Run all checks; then write the recipe and the first events of the log into the run's folder."""
        checks, options = self._checks(), self.config_init["fit"]
        checks.check_steps()
        options.weights_only = True
        options.ckpt_path = checkpoint_to_continue(options)
        checkpoint = None if options.ckpt_path is None else read_checkpoint(options.ckpt_path, shapes_only=True)
        self._first_step = 0 if checkpoint is None else checkpoint["global_step"]
        if self.is_dry_run:
            options.trainer.max_steps += self._first_step
            self.trainer.fit_loop.epoch_loop.max_steps = options.trainer.max_steps
        self.model.loads_checkpoint = options.ckpt_path is not None
        checks.open_checkpoint(options.ckpt_path)
        notes = self._check(checks)
        self.model.recipe = self._as_plain(self.config)
        if self.is_dry_run:
            return
        folder = Path(self.trainer.default_root_dir)
        check_first(folder_of(folder), checks.checkpoint_bytes)
        self._lock(folder)
        check_folder(folder_of(folder), options.ckpt_path)
        check_folders(options.trainer.callbacks, folder_of(folder))
        self.datamodule.skipped_samples = skipped_samples(
            folder_of(folder), options.ckpt_path, self.datamodule.identity
        )
        if self.trainer.is_global_zero:
            if options.ckpt_path is None:
                forget_skipped(folder_of(folder))
            write_recipe(folder / "recipe.yaml", self.model.recipe, self._read_recipe)
            self._log_start(folder, notes)
        self._truncate_logs(checkpoint)

    def _log_start(self, folder: Path, notes: list[str]) -> None:
        """Write the first events of the run's log.

        Args:
            folder: Folder of the run.
            notes: Lines that the checks printed.
        """
        log, path = self.model.run_log, self.config_init.fit.ckpt_path
        log.open(folder)
        command = shlex.join(["ropepp-lit", *self._arguments])
        log.write("start", step=self._first_step, **describe_start(self.trainer, command), notes=notes)
        if path is not None:
            saved = sorted(saved_steps(folder_of(folder)))  # later ones are damaged, as the checks found
            damaged = [str(checkpoint_path(folder_of(folder), step)) for step in saved if step > self._first_step]
            log.write("resume", step=self._first_step, checkpoint=path, damaged=damaged)

    def _lock(self, folder: Path) -> None:
        """Lock the run's folder until this run ends; raise UsageError if another run holds the lock."""
        if not self.trainer.is_global_zero:
            return
        busy = f"{folder}: another run is training in it; let it end, or choose another --trainer.default_root_dir"
        if not self._until_end.enter_context(held(folder / ".lock", busy=busy)):
            print(
                f"Notice: {folder} is on a file system without locks; make sure that no other run writes to it.",
                file=sys.stderr,
            )

    def before_validate(self) -> None:
        """Run all checks."""
        checks, options = self._checks(), self.config_init["validate"]
        options.weights_only, options.verbose = True, False
        if options.ckpt_path is None:
            raise UsageError("ckpt_path is missing: set --ckpt_path to the checkpoint to validate")
        read_checkpoint(options.ckpt_path, shapes_only=True, checksums=True)
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

    def _check(self, checks: Checks) -> list[str]:
        lines = checks.check_recipe(has_gpu=not isinstance(self.trainer.accelerator, CPUAccelerator))
        self.datamodule.check()
        self.datamodule.prepare_data()
        self.datamodule.setup("check")
        lines += [*checks.check_data(), *checks.compare()]
        for line in lines:
            rank_zero_print(line)
        return lines

    def _as_plain(self, config: Any) -> dict[str, Any]:
        """Return the recipe of parsed options of `fit`, without arguments of the method, such as `ckpt_path`."""
        recipe = yaml.safe_load(self.parser.dump(config, skip_unset=False, format="yaml"))["fit"]
        method_arguments = self._subcommand_method_arguments["fit"]
        return {name: value for name, value in recipe.items() if name not in method_arguments}

    def _read_recipe(self, path: Path) -> dict[str, Any]:
        return self._as_plain(self.parser.parse_args(["fit", f"--config={path}"]))

    def _truncate_logs(self, checkpoint: dict[str, Any] | None) -> None:
        """Remove metrics logged after the checkpoint from which the run continues; all of them if it starts anew."""
        trainer = self.trainer
        folder = Path(trainer.default_root_dir)
        if checkpoint is None:
            truncate_logs(trainer.loggers, 0, run_folder=folder, validates=False)
            return
        accumulated = trainer.accumulate_grad_batches
        interval = self.config_init.fit.trainer.val_check_interval or trainer.max_steps * accumulated
        step = checkpoint["global_step"]
        validates = trainer.limit_val_batches != 0 and is_due(
            step,
            validated_step(checkpoint[KEY].get("validation") or {}),
            accumulate_grad_batches=accumulated,
            interval=interval,
        )
        truncate_logs(trainer.loggers, step, run_folder=folder, validates=validates)

    def after_fit(self) -> None:
        """Validate the last step if it was not validated, and print the summary.

        Raises:
            UsageError: the run ended without a step.
        """
        self._exit_if_stopped()
        require_a_step(self.trainer, first_step=self._first_step)
        if self.is_dry_run:
            rank_zero_print(f"\nDry run: trained to step {self.model.steps_taken:,} and validated; nothing is saved.")
            return
        if self.model.validated_step != self.model.steps_taken:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            self.config_init.fit.checkpoints.add_validation(self.trainer, self.model)
        rank_zero_print(validation_summary(self.model, self.datamodule))
        prompt, seconds = self.config_init["fit"].sample.prompt, time.monotonic() - self._started
        rank_zero_print(training_summary(self.model, self.trainer, prompt=prompt, seconds=seconds))

    def _exit_if_stopped(self) -> None:
        """After a signal, exit with the conventional code, 128 + the signal's number."""
        number = self.config_init.fit.checkpoints.stop.received
        if number is None:
            return
        rank_zero_print(stop_summary(self.model, self.trainer, number=number))
        # Only rank 0: a launcher ends the other ranks when one of them fails.
        sys.exit(128 + number if self.trainer.is_global_zero else 0)

    def after_validate(self) -> None:
        """Print the results."""
        rank_zero_print(validation_summary(self.model, self.datamodule))


def quiet() -> None:
    """Silence Lightning's messages."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # reading data is cheap
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # torchmetrics already reduces over ranks
    warnings.filterwarnings("ignore", ".*The `srun` command is available.*")  # using SLURM is optional
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")


def main(arguments: list[str]) -> None:
    """Run `fit` or `validate`.

    Args:
        arguments: The subcommand and its options.
    """
    quiet()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # torch's flight recorder, which the watchdog reads
    # Set first, as threads inherit it. CPUs are slow with denormal numbers, which ALiBi's softmax gives distant keys.
    torch.set_flush_denormal(True)
    rollback_path = RecipeCLI(arguments).rollback_path
    while rollback_path is not None:  # after a loss spike: resume in the same processes
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rollback_path = RecipeCLI([*arguments, "--ckpt_path", rollback_path]).rollback_path
