"""Runs launched by torchrun as on two machines (here all on one), compared with a single process."""

import json
import os
from collections import Counter

import psutil
import pytest
import torch
from runs import curves

from ropepp_lit.checkpoint import KEY, decoder_weights, read_checkpoint

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

NODES, STEPS, BATCH = 2, 4, 16
PER_PROCESS = 0.4 * 2**30
"""Bytes that a forked process needs beside what all share."""

RECORDER = """
import json
import torch
from lightning.pytorch import Callback


class Recorder(Callback):
    def __init__(self, out: str):
        self.out = out

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        read = {
            "batch": batch_idx, "rank": trainer.global_rank, "node": trainer.node_rank, "local": trainer.local_rank,
            "rows": batch.input_ids.tolist(), "seed": torch.initial_seed(),
        }
        with open(f"{self.out}-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(read) + "\\n")
"""


@pytest.fixture(scope="module", params=[4, 8])
def per_node(request):
    """Number of processes per node."""
    needed, available = NODES * request.param * PER_PROCESS, psutil.virtual_memory().available
    if available < needed:
        pytest.skip(
            f"{NODES * request.param} processes need {needed / 2**30:.0f} GiB, {available / 2**30:.0f} are free"
        )
    return request.param


@pytest.fixture(scope="module")
def fit(command_server, command_path, free_port, tiny, tmp_path_factory):
    """Train on nodes × processes; returns the folder with the run and the rows that each rank read."""
    root = tmp_path_factory.mktemp("nodes")
    (root / "recorder.py").write_text(RECORDER)

    def ask(**job):
        print(json.dumps(job), file=command_server.stdin, flush=True)
        return int(command_server.stdout.readline())

    def fit(name, *options, nodes=1, per_node=1, steps=STEPS):
        world = nodes * per_node
        arguments = [
            command_path, "fit", *tiny, "--trainer.callbacks", "recorder.Recorder", "--trainer.callbacks.out",
            f"{name}-read", "--trainer.default_root_dir", name, "--trainer.num_nodes", nodes, "--trainer.devices",
            per_node, "--data.batch_size", BATCH // world, "--trainer.max_steps", steps, "--sample.max_new_tokens", 2,
            "--model.schedule.total_steps", 2 * STEPS, "--checkpoints.keep", 0, *options,
        ]  # fmt: skip
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        shared |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(per_node)}
        started = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank % per_node, "GROUP_RANK": rank // per_node}
            place = {key: str(value) for key, value in place.items()} | shared if world > 1 else {}
            output = str(root / f"{name}-{rank}.txt")
            environment = {**os.environ, **place}
            job = {"command": [str(argument) for argument in arguments], "cwd": str(root), "environment": environment}
            started.append(ask(**job, output=output, errors=output, detached=True))
        codes = [ask(wait=process) for process in started]
        assert codes == [0] * world, "\n".join((root / f"{name}-{rank}.txt").read_text() for rank in range(world))
        return root / name

    return fit


@pytest.fixture(scope="module")
def alone(fit):
    """The run of one process."""
    return fit("alone")


STRATEGIES = {
    "ddp": ["--trainer.strategy", "ddp"],
    "fsdp2": ["--trainer.strategy", "FSDP2Strategy"],
    "hsdp": ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.replicate_size", NODES],
    "shards": ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"],
}


def records(folder):
    """Return the rows that each rank read, in order."""
    files = folder.parent.glob(f"{folder.name}-read-*.jsonl")
    return [json.loads(line) for file in sorted(files) for line in file.read_text().splitlines()]


def rows_by_batch(folder):
    """Return the rows that all ranks read, by the number of the batch."""
    rows = {}
    for record in records(folder):
        rows.setdefault(record["batch"], Counter()).update(map(tuple, record["rows"]))
    return rows


def files_of(folder):
    """Return the names of a run's files; the shards of a checkpoint count as one."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    names = {name.partition(".ckpt/")[0] + ".ckpt" if ".ckpt/" in name else name for name in names}
    return {"tensorboard" if name.startswith("tensorboard") else name for name in names}


def assert_same_run(folder, other, *, step):
    """Check that weights and logs of two runs agree up to the order of summation."""
    one, two = (read_checkpoint(run / f"checkpoints/step={step}.ckpt") for run in (folder, other))
    assert one["global_step"] == two["global_step"] == step
    assert one[KEY]["tokens_seen"] == two[KEY]["tokens_seen"] == step * BATCH * 64
    weights, others = decoder_weights(one), decoder_weights(two)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], atol=2e-4, rtol=0, msg=name)
    ours, theirs = curves(folder), curves(other)
    losses = [key for key in ours if "loss" in key[0]]
    assert losses
    for key in losses:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nodes_train_like_one_process(fit, alone, per_node, strategy):
    world = NODES * per_node
    folder = fit(f"{strategy}-{world}", *STRATEGIES[strategy], nodes=NODES, per_node=per_node)
    positions = {(record["rank"], record["node"], record["local"]) for record in records(folder)}
    assert positions == {(rank, rank // per_node, rank % per_node) for rank in range(world)}
    assert {record["seed"] for record in records(folder)} == {0}
    assert rows_by_batch(folder) == rows_by_batch(alone)
    assert sum(map(Counter.total, rows_by_batch(folder).values())) == STEPS * BATCH
    assert files_of(folder) == files_of(alone)
    if strategy == "shards":
        shards = {path.name for path in (folder / f"checkpoints/step={STEPS}.ckpt").glob("*.distcp")}
        assert shards == {f"__{rank}_0.distcp" for rank in range(world)}
    assert_same_run(folder, alone, step=STEPS)
    # Resumed with two processes, it ends like the uninterrupted single process.
    resumed = ["--ckpt_path", folder / f"checkpoints/step={STEPS}.ckpt"]
    other = "ddp" if strategy != "shards" else "fsdp2"  # required for sharded checkpoints
    resumed = fit(f"{strategy}-{world}-on", *STRATEGIES[other], *resumed, per_node=2, steps=STEPS + 2)
    baseline = alone.with_name("baseline")
    if not baseline.exists():
        fit("baseline", steps=STEPS + 2)
    read = rows_by_batch(baseline)
    assert rows_by_batch(resumed) == {batch: read[batch] for batch in (STEPS, STEPS + 1)}
    assert_same_run(resumed, baseline, step=STEPS + 2)
