"""Options of the Trainer: supported ones, and one-line errors for others."""

import inspect

import lightning.pytorch as pl
import pytest
import torch.distributed as dist

from ropepp_lit.errors import LostProcessError
from ropepp_lit.train.lightning_errors import in_one_line
from ropepp_lit.train.trainer_options import REFUSED_OPTIONS, SUPPORTED_OPTIONS

pytestmark = pytest.mark.end_to_end

CALLBACKS = "--trainer.callbacks"


def test_every_option_of_the_trainer_is_supported_or_refused():
    options = set(inspect.signature(pl.Trainer).parameters)
    assert options == SUPPORTED_OPTIONS | REFUSED_OPTIONS.keys()
    assert not SUPPORTED_OPTIONS & REFUSED_OPTIONS.keys()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.max_epochs", "2"], "trainer.max_epochs: runs are counted in steps; set trainer.max_steps"),
        (["--trainer.min_epochs", "1"], "trainer.min_epochs: runs are counted in steps; set trainer.min_steps"),
        (["--trainer.limit_train_batches", "10"], "trainer.limit_train_batches: it would cut an optimizer step"),
        (["--trainer.limit_train_batches", "1"], "trainer.limit_train_batches: it would cut"),
        (["--trainer.limit_train_batches", "0.5"], "trainer.limit_train_batches: it would cut"),
        (["--trainer.overfit_batches", "2"], "trainer.overfit_batches: a run reads new batches in a fixed order"),
        (["--trainer.check_val_every_n_epoch", "1"], "trainer.check_val_every_n_epoch: runs are counted in steps"),
        (["--trainer.reload_dataloaders_every_n_epochs", "1"], "trainer.reload_dataloaders_every_n_epochs: a run is"),
        (["--trainer.limit_test_batches", "1"], "trainer.limit_test_batches: there is no test"),
        (["--trainer.limit_predict_batches", "1"], "trainer.limit_predict_batches: there is nothing to predict"),
        (["--trainer.barebones", "true"], "trainer.barebones: a run always saves and logs"),
        (["--trainer.use_distributed_sampler", "true"], "trainer.use_distributed_sampler: the data loader distrib"),
        (["--trainer.sync_batchnorm", "true"], "trainer.sync_batchnorm: the models have no batch norm"),
        (["--trainer.model_registry", "name"], "trainer.model_registry: checkpoints are files"),
        (["--trainer.val_check_interval", "0.5"], "trainer.val_check_interval: 0.5 must be a number of batches"),
        (["--trainer.val_check_interval", "00:00:10:00"], "trainer.val_check_interval: 00:00:10:00 must be a number"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval: 0 must be a number of batches, 1 or more"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches: 0 must be 1 or more"),
        (["--trainer.log_every_n_steps", "0"], "trainer.log_every_n_steps: 0 must be 1 or more"),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val: -1 must be 0 or more"),
        (["--trainer.min_steps", "9"], "trainer.min_steps: 9 is above trainer.max_steps 8"),
        (["--trainer.fast_dev_run", "-1"], "trainer.fast_dev_run: -1 must be 0 or more"),
        ([CALLBACKS, "EMAWeightAveraging"], "trainer.callbacks: EMAWeightAveraging is not supported: samples, eval"),
        ([CALLBACKS, "WeightAveraging"], "trainer.callbacks: WeightAveraging is not supported"),
        (
            [CALLBACKS, "StochasticWeightAveraging", f"{CALLBACKS}.swa_lrs", "0.1"],
            "trainer.callbacks: StochasticWeightAveraging is not supported: it averages by epochs",
        ),
        ([CALLBACKS, "BatchSizeFinder"], "trainer.callbacks: BatchSizeFinder is not supported"),
        ([CALLBACKS, "LearningRateFinder"], "trainer.callbacks: LearningRateFinder is not supported"),
        (
            [CALLBACKS, "GradientAccumulationScheduler", f"{CALLBACKS}.scheduling", "{0: 2}"],
            "trainer.callbacks: GradientAccumulationScheduler is not supported",
        ),
        ([CALLBACKS, "Timer", f"{CALLBACKS}.interval", "epoch"], "trainer.callbacks: Timer: a run is one epoch"),
        ([CALLBACKS, "nowhere.Callback"], "nowhere.Callback"),
        ([CALLBACKS, "NoSuchCallback"], "NoSuchCallback"),
    ],
)
def test_refused(mistake, options, expected):
    line = mistake(*options)
    assert expected in line
    assert mistake(*options, subcommand="plan") == line


SLURM = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
RESTARTS = {**TORCHRUN, "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (["--trainer.devices", "0"], {}, "trainer: "),
        (["--trainer.devices", "1.5"], {}, "devices"),
        (["--trainer.devices", "many"], {}, "trainer: "),
        (["--trainer.accelerator", "cuda"], {}, "trainer: "),
        (["--trainer.accelerator", "abacus"], {}, "trainer: You selected an invalid accelerator name"),
        (["--trainer.strategy", "ddp_9"], {}, "trainer: You selected an invalid strategy name"),
        (["--trainer.num_nodes", "0"], {}, "trainer.num_nodes: 0 must be 1 or more"),
        (["--trainer.precision", "fp8"], {}, "precision"),
        (["--trainer.precision", "transformer-engine"], {}, ""),
        (["--trainer.precision", "16-mixed"], {}, "trainer.precision: 16-mixed is for GPUs; use bf16-mixed"),
        (["--trainer.precision", "16"], {}, "trainer.precision: 16-mixed is for GPUs; use bf16-mixed"),
        (["--trainer.gradient_clip_algorithm", "sum"], {}, "trainer: `gradient_clip_algorithm` sum is invalid"),
        (["--trainer.deterministic", "maybe"], {}, "deterministic"),
        (["--trainer.profiler", "stopwatch"], {}, "trainer: "),
        (["--trainer.plugins", "nowhere.Plugin"], {}, "nowhere.Plugin"),
        (["--trainer.logger", "WandbLogger"], {}, "wandb"),
        ([CALLBACKS, "ModelCheckpoint", f"{CALLBACKS}.every_n_train_steps", "-1"], {}, "every_n_train_steps"),
        ([CALLBACKS, "EarlyStopping"], {}, "monitor"),
        ([CALLBACKS, "EarlyStopping", f"{CALLBACKS}.monitor", "x", f"{CALLBACKS}.mode", "up"], {}, "`mode` can be"),
        ([], SLURM, "the cluster's environment variables: You set `--ntasks=2` in your SLURM bash script"),
        ([], {**SLURM, "SLURM_NTASKS": "many"}, "the cluster's environment variables: invalid literal"),
        ([], {**SLURM, "SLURM_NTASKS_PER_NODE": "2"}, "environment variables: You set `devices=1` in Lightning, but"),
        ([], TORCHRUN, "the cluster's environment variables: WORLD_SIZE is not set"),
        ([], {**TORCHRUN, "WORLD_SIZE": "2"}, "environment variables: You set `devices=1` and `num_nodes=1`"),
        (["--trainer.devices", "2"], {**TORCHRUN, "WORLD_SIZE": "3"}, "environment variables: You set `devices=2`"),
        (["--trainer.devices", "2"], RESTARTS, "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"),
    ],
)
def test_refused_by_lightning(mistake, monkeypatch, options, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert expected in mistake(*options)


GLOO = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:8861. This is"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(f"{GLOO} typically caused by a crash."), "(Connection closed by peer [127.0.0.1]:8861)"),
        (dist.DistBackendError("NCCL error: remote process exited"), "(NCCL error: remote process exited)"),
        (dist.DistNetworkError("Connection reset by peer"), "(Connection reset by peer)"),
    ],
)
def test_a_process_that_was_killed(error, expected):
    with pytest.raises(LostProcessError) as lost, in_one_line("trainer"):
        raise error
    assert f"another process of the run cannot be reached any more {expected}; its own last lines" in str(lost.value)


def test_other_errors_are_not_lost_processes():
    with pytest.raises(RuntimeError, match="shapes"), in_one_line("trainer"):
        raise RuntimeError("shapes do not match")
