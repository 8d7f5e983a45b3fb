"""Fixture that trains in the process of the tests."""

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import BASE

from ropepp_lit.cli import main
from ropepp_lit.train.cli import RecipeCLI


@pytest.fixture(scope="module")
def fit(tiny, tmp_path_factory):
    """Train in this process, in a subfolder of the tests' folder; callbacks are objects."""
    root = tmp_path_factory.mktemp("steps")
    before = Path.cwd()
    os.chdir(root)
    previous = signal.signal(signal.SIGTERM, lambda *_: None)

    def fit(folder, *options, callbacks=(), subcommand="fit"):
        def instantiate_trainer(self, **keywords):
            trainer = original(self, **keywords)
            trainer.callbacks[:0] = callbacks
            return trainer

        with pytest.MonkeyPatch.context() as patch:
            original = RecipeCLI.instantiate_trainer
            patch.setattr(RecipeCLI, "instantiate_trainer", instantiate_trainer)
            try:
                main([subcommand, *tiny, *map(str, [*BASE, "--trainer.default_root_dir", folder, *options])])
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        return root / folder

    yield fit
    signal.signal(signal.SIGTERM, previous)
    os.chdir(before)
