"""Disk space for checkpoints: estimated size, and warnings."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ropepp_lit.nn import Decoder, DecoderConfig, FoPE, Frequencies, RoPEPP
from ropepp_lit.nn.lora import LoRA, inject
from ropepp_lit.train.checkpoint_writer import size_of
from ropepp_lit.train.disk_space import DiskSpace, checkpoint_bytes
from ropepp_lit.train.optimizer import AdamW, Muon
from ropepp_lit.train.run_log import RunLog, read_run_log


def make(scheme=None, **changes):
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = DecoderConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes)
    return Decoder(config, scheme or RoPEPP(), Frequencies())


CASES = {
    "AdamW": (make, AdamW(), None, "bf16-mixed"),
    "Muon": (make, Muon(), None, "32-true"),
    "tied": (lambda: make(tie_word_embeddings=True), AdamW(), None, "32-true"),
    "half precision": (make, AdamW(), None, "bf16-true"),
    "buffers": (lambda: make(FoPE(context_length=64)), AdamW(), None, "32-true"),
    "adapters": (make, AdamW(), LoRA(rank=4), "32-true"),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_a_checkpoint(tmp_path, case):
    """The estimate equals the size of a file with the same tensors, except for metadata."""
    make, optimizer, lora, precision = CASES[case]
    with torch.device("meta"):
        estimate = checkpoint_bytes(make(), optimizer, lora=lora, precision=precision)
    decoder = make().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    if lora is not None:
        inject(decoder, lora)
    trained = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.ones_like(parameter)
    built = optimizer.build(decoder)
    built.step()
    weights = decoder.state_dict() if lora is None else trained
    torch.save({"state_dict": weights, "optimizer_states": [built.state_dict()]}, tmp_path / "step=1.ckpt")
    assert 0 < size_of(tmp_path / "step=1.ckpt") - estimate < 60_000


# Number of checkpoints to keep and saved, free space in checkpoints, and the warning.
ROOM = [
    (2, 2, 1.1, None),
    (2, 2, 0.9, "the next checkpoint does not fit"),
    (2, 1, 2.1, None),
    (2, 1, 1.9, "the checkpoint after the next does not fit"),
    (0, 9, 1.9, "the checkpoint after the next does not fit"),
    (0, 9, 2.1, None),
]


@pytest.mark.parametrize(("keep", "saved", "free", "warning"), ROOM)
def test_disk_space_for_the_next_checkpoints(tmp_path, monkeypatch, capsys, keep, saved, free, warning):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free * 2**20)))
    space = DiskSpace(keep)
    for step in (1, 2):
        space.check(tmp_path, size=2**20, saved=saved, step=step, run_log=RunLog())
    errors = capsys.readouterr().err
    assert (
        errors.count(f"Notice: {tmp_path}: {warning}: it takes 1.0 MiB, and ")
        == errors.count("Notice")
        == bool(warning)
    )


@pytest.mark.end_to_end
def test_a_run_that_fills_the_disk(fit, monkeypatch, capsys):
    """Space for four and a half checkpoints: only the third save prints the warning."""

    def disk_usage(path):
        saved = [path.stat().st_size for path in Path("room/checkpoints").glob("step=*.ckpt")]
        return SimpleNamespace(free=int(4.5 * saved[0]) - sum(saved) if saved else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    folder = fit("room", "--trainer.limit_val_batches", 0)
    assert capsys.readouterr().err.count("the checkpoint after the next does not fit: it takes") == 1
    (warning,) = (event for event in read_run_log(folder) if event["event"] == "warning")
    assert (warning["step"], warning["reason"]) == (6, "the checkpoint after the next does not fit")
    assert warning["bytes"] < warning["free_bytes"] < 2 * warning["bytes"]


def test_no_disk_space_for_the_first_checkpoint(mistake, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**17))
    line = mistake("--trainer.default_root_dir", "run")
    assert "run/checkpoints: a checkpoint takes" in line
    assert "and 128.0 KiB are free; make room, or choose another --trainer.default_root_dir" in line
