"""Truncated and corrupted checkpoints."""

import os
from pathlib import Path

import pytest
import torch

from ropepp_lit.checkpoint import read_checkpoint
from ropepp_lit.cli import main
from ropepp_lit.errors import UsageError
from ropepp_lit.train.checkpoint_writer import CheckpointWriter, step_of

pytestmark = pytest.mark.end_to_end

SHARDED = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"]
SHARDED += ["--trainer.limit_val_batches", 0]


def test_a_damaged_newest_checkpoint(fit, capsys):
    fit("damaged")
    folder = Path("damaged/checkpoints")
    for name in ("step=6.ckpt", "step=8.ckpt"):
        os.truncate(folder / name, 1000)
    fit("damaged", "--ckpt_path", "auto", "--trainer.max_steps", 7)
    printed = capsys.readouterr().out
    for step in (6, 8):
        assert f"{folder}/step={step}.ckpt is damaged: continuing from {folder}/step=4.ckpt; it is" in printed
    assert read_checkpoint(folder / "step=6.ckpt")["global_step"] == 6
    assert (folder / "step=8.ckpt").stat().st_size == 1000
    (folder / "step=8.ckpt").write_bytes(b"")
    fit("damaged", "--ckpt_path", "auto")
    assert f"{folder}/step=8.ckpt is damaged: continuing from {folder}/step=7.ckpt" in capsys.readouterr().out
    assert read_checkpoint(folder / "step=8.ckpt")["global_step"] == 8
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(SystemExit):
        fit("damaged", "--ckpt_path", "auto")
    assert f"{folder} has only damaged checkpoints (step=2.ckpt, step=4.ckpt" in capsys.readouterr().err


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    writer = CheckpointWriter(in_background=False, keep=2)
    for step in (4, 8, 10):
        (tmp_path / f"step={step}.ckpt").touch()
    writer.set_first_step(8)  # as 10 is damaged
    for step, kept in ((12, {8, 10, 12}), (16, {10, 12, 16})):
        (tmp_path / f".step={step}.ckpt.partial").touch()
        writer._publish(tmp_path / f"step={step}.ckpt")
        assert {step_of(path) for path in tmp_path.glob("step=*.ckpt")} == kept


def test_a_damaged_sharded_checkpoint(fit, capsys):
    folder = fit("shards", *SHARDED, "--trainer.max_steps", 4) / "checkpoints"
    (shard,) = (folder / "step=4.ckpt").glob("*.distcp")
    os.truncate(shard, shard.stat().st_size // 2)
    fit("shards", *SHARDED, "--ckpt_path", "auto", "--trainer.max_steps", 4)
    assert "step=4.ckpt is damaged: continuing from shards/checkpoints/step=2.ckpt" in capsys.readouterr().out
    (shard,) = (folder / "step=4.ckpt").glob("*.distcp")
    shard.unlink()
    fit("shards", *SHARDED, "--ckpt_path", "auto", "--trainer.max_steps", 4)
    assert "step=4.ckpt is damaged" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fit("shards", *SHARDED, "--ckpt_path", "shards/checkpoints/step=2.ckpt")
    assert "step=2.ckpt is step 2, and shards/checkpoints holds step 4" in capsys.readouterr().err


def flip_bits(path, *, of):
    """Change a byte of a checkpoint's tensor, without changing its length or the pickled data."""
    contents = bytearray(path.read_bytes())
    contents[contents.index(of.numpy().tobytes()) + 1] ^= 0xFF
    path.write_bytes(contents)


def test_a_weight_changed_on_disk(fit, tiny, capsys):
    folder = fit("changed", "--trainer.max_steps", 4) / "checkpoints"
    path = Path("changed/checkpoints/step=4.ckpt")
    weights = read_checkpoint(path)["state_dict"]
    flip_bits(path, of=next(iter(weights.values())).clone())
    read_checkpoint(path)  # torch does not detect it
    refused = f"{path}: not a readable checkpoint: the checksum of archive/data/0 in it is wrong"
    commands = {
        "validate": [*tiny, "--ckpt_path", path],
        "export": [path, "exported"],
        "evaluate": [path, "--out", "evaluated"],
        "upcycle": [path, "upcycled.ckpt", "--variant", "ec"],
    }
    capsys.readouterr()
    for options in (["--ckpt_path", path], ["--model.init_from", path, "--trainer.default_root_dir", "another"]):
        with pytest.raises(SystemExit):
            fit("changed", *options)
        assert refused in capsys.readouterr().err
    for command, words in commands.items():
        with pytest.raises(SystemExit):
            main([command, *map(str, words)])
        assert refused in capsys.readouterr().err
    assert not Path("another").exists()
    fit("changed", "--ckpt_path", "auto")
    assert f"{path} is damaged: continuing from changed/checkpoints/step=2.ckpt" in capsys.readouterr().out
    assert read_checkpoint(folder / "step=8.ckpt")["global_step"] == 8
    read_checkpoint(path, checksums=True)  # saved again


def test_a_shard_changed_on_disk(fit, capsys):
    folder = fit("changed_shards", *SHARDED, "--trainer.max_steps", 2) / "checkpoints/step=2.ckpt"
    (shard,) = folder.glob("*.distcp")
    flip_bits(shard, of=max(read_checkpoint(folder)["state_dict"].values(), key=torch.Tensor.numel))
    with pytest.raises(UsageError, match="a shard is damaged or missing"):
        read_checkpoint(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        fit("changed_shards", *SHARDED, "--ckpt_path", "auto", "--trainer.max_steps", 4)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "checkpoints/step=2.ckpt: not a readable checkpoint: a shard is damaged or missing" in line
