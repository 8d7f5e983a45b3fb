"""FSDP2, context parallelism and their checkpoints: multiple processes compared with one on the same global batches."""

import itertools
import json
import random
import shutil
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ropepp_lit.checkpoint import KEY, decoder_weights, read_checkpoint

pytestmark = pytest.mark.end_to_end

STEPS = 20
COMMON = [
    "--trainer.accumulate_grad_batches",
    2,
    "--model.schedule.total_steps",
    STEPS,
    "--trainer.gradient_clip_val",
    0.3,
]
DOUBLE = ["--trainer.precision", "64-true"]
STRATEGY = ["--trainer.strategy", "FSDP2Strategy"]
CONTEXT = [*STRATEGY, "--trainer.strategy.context_parallel_size", 2]
WHOLE_GRADIENTS = ["--trainer.strategy.reduce_each_micro_batch", "false"]
GATHER = [*CONTEXT, "--trainer.strategy.context_parallel_mode", "gather"]
HEADS = [*CONTEXT, "--trainer.strategy.context_parallel_mode", "heads"]
SHARDED = [*STRATEGY, "--trainer.strategy.save_distributed_checkpoint", "true"]


@pytest.fixture(scope="module")
def fit(run, tiny, tmp_path_factory):
    """Trains once for each set of options; returns the folder of the run.

    With `folder`, that is a copy for the test alone; if the folder is there, its run goes on instead.
    """
    root, numbers, done = tmp_path_factory.mktemp("fsdp"), itertools.count(), {}

    def train(path, options, steps, devices, rows):
        run(
            "fit", *tiny, *COMMON, *options, "--trainer.max_steps", steps, "--trainer.devices", devices,
            "--data.batch_size", rows, "--trainer.default_root_dir", path, cwd=root,
        )  # fmt: skip
        return path

    def fit(*options, steps=STEPS, devices=1, rows=4, folder=None):
        settings = tuple(map(str, options)), steps, devices, rows
        if folder is not None and folder.exists():
            return train(folder, *settings)
        if settings not in done:
            done[settings] = train(root / str(next(numbers)), *settings)
        return done[settings] if folder is None else shutil.copytree(done[settings], folder, symlinks=True)

    return fit


def weights(folder):
    return decoder_weights(read_checkpoint(folder / "checkpoints" / "last.ckpt"))


def losses(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def assert_equal(one, other, *, tolerance=1e-9):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=tolerance, rtol=0, msg=name)
    assert losses(other)[-STEPS:] == pytest.approx(losses(one)[-STEPS:], abs=1e-5)


VARIANTS = {
    "rope": ["--model.positions", "RoPE"],
    "eh": ["--model.positions.variant", "eh"],
    "ec": ["--model.positions.variant", "ec"],
    "alibi": ["--model.positions", "ALiBi"],
    "fope": ["--model.positions", "FoPE", "--model.positions.context_length", 64],
    "nope": ["--model.positions", "NoPE"],
    "partial": ["--model.positions", "PartialRoPE"],
    "pope": ["--model.positions", "PoPE"],
}


@pytest.mark.parametrize(
    ("model", "options", "devices", "rows"),
    [
        pytest.param("ec", ["--trainer.strategy", "fsdp2"], 2, 2, marks=pytest.mark.slow),
        ("eh", GATHER, 2, 4),
        pytest.param("ec", [*STRATEGY, "--trainer.strategy.replicate_size", 2], 2, 2, marks=pytest.mark.slow),
        *(
            pytest.param(name, options, devices, rows, marks=pytest.mark.slow)
            for name in VARIANTS
            for options, devices, rows in ((["--trainer.strategy", "fsdp2"], 2, 2), (HEADS, 2, 4), (GATHER, 4, 2))
        ),
    ],
)  # fmt: skip
def test_multiple_processes_end_with_the_weights_of_one(fit, model, options, devices, rows):
    assert_equal(fit(*VARIANTS[model], *DOUBLE), fit(*VARIANTS[model], *DOUBLE, *options, devices=devices, rows=rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["--model.optimizer", "Muon"],
        ["--model.decoder.tie_word_embeddings", "true"],
        ["--model.activation_checkpointing", 1, "--model.mlp_chunk_tokens", 16],
        ["--model.activation_checkpointing", "attention"],
        ["--model.activation_checkpointing", 1, "--model.attention_head_groups", 2],
        ["--data.intra_document_masking", "false"],
        ["--model.compile", "true"],
    ],
    ids=["Muon", "tied", "levers", "attention", "head groups", "plain rows", "compiled"],
)
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--trainer.strategy", "fsdp2"], 2),
        ([*STRATEGY, *WHOLE_GRADIENTS, "--trainer.strategy.reshard_after_forward", "false"], 2),
        (GATHER, 4),
        (HEADS, 4),
    ],
    ids=["fsdp", "gathered once", "gather", "heads"],
)
def test_every_setting_ends_with_the_weights_of_one_process(fit, changes, options, rows):
    assert_equal(fit(*DOUBLE, *changes), fit(*DOUBLE, *changes, *options, devices=2, rows=rows))


def test_memory_options_do_not_change_results(fit):
    levers = ["--model.activation_checkpointing", "attention", "--model.mlp_chunk_tokens", 16]
    assert_equal(fit(*VARIANTS["ec"], *DOUBLE), fit(*VARIANTS["ec"], *DOUBLE, *levers), tolerance=1e-12)


PROBE = """
import json, os, zlib
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp
from lightning.pytorch import Callback

counts = {"reductions": 0}
reduce = fsdp.foreach_reduce


def counted(*arguments, **keywords):
    counts["reductions"] += 1
    return reduce(*arguments, **keywords)


class Probe(Callback):
    def on_train_start(self, trainer, module):
        fsdp.foreach_reduce = counted
        self.batches = []
        parameters = list(module.decoder.parameters())
        self.share = sum(p.to_local().nbytes for p in parameters) / sum(p.nbytes for p in parameters)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(zlib.crc32(batch.input_ids.numpy().tobytes()))

    def on_train_end(self, trainer, module):
        record = {**counts, "batches": self.batches, "share": self.share}
        open(f"rank{trainer.global_rank}.json", "w").write(json.dumps(record))
"""


def test_ranks_shard_weights_read_distinct_rows_and_reduce_once_per_step(run, tiny, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    options = ["--trainer.devices", 2, *STRATEGY, *WHOLE_GRADIENTS]
    options += ["--trainer.callbacks+", "probe.Probe"]
    run("fit", *tiny, *COMMON, *options, "--trainer.max_steps", 3, cwd=tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for record in ranks:
        # Two blocks, embedding, output layer and the root, in each step of two micro-batches.
        assert record["reductions"] == 3 * (2 + 3)
        assert record["share"] == pytest.approx(0.5, abs=0.02)
        assert len(set(record["batches"])) == 6
    assert not set(ranks[0]["batches"]) & set(ranks[1]["batches"])


ONE, TWO = ([], 1, 4), (["--trainer.strategy", "fsdp2"], 2, 2)
FSDP_ONE, SHARDED_TWO, CONTEXT_TWO = (["--trainer.strategy", "fsdp2"], 1, 4), (SHARDED, 2, 2), (GATHER, 2, 4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SHARDED_TWO, FSDP_ONE),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                (TWO, TWO), (SHARDED_TWO, SHARDED_TWO), (TWO, ONE), (ONE, TWO), (ONE, SHARDED_TWO), (CONTEXT_TWO, TWO),
                (CONTEXT_TWO, ONE), (SHARDED_TWO, CONTEXT_TWO),
            )
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("optimizer", ["AdamW", pytest.param("Muon", marks=pytest.mark.slow)])
def test_continued_on_other_devices(fit, tmp_path, before, after, optimizer):
    common = [*DOUBLE, "--model.optimizer", optimizer]
    (options, devices, rows), (other_options, other_devices, other_rows) = before, after
    fit(*common, *options, steps=4, devices=devices, rows=rows, folder=tmp_path / "run")
    fit(*common, *other_options, "--ckpt_path", "auto", devices=other_devices, rows=other_rows, folder=tmp_path / "run")
    baseline = fit(*common, *options, devices=devices, rows=rows)
    actual, expected = weights(tmp_path / "run"), weights(baseline)
    for name, value in expected.items():
        if before is after:
            assert torch.equal(actual[name], value), name
        else:
            torch.testing.assert_close(actual[name], value, atol=1e-9, rtol=0, msg=name)


def test_all_commands_accept_a_sharded_checkpoint(fit, run, tmp_path):
    folder = fit(*SHARDED, steps=4, devices=2, rows=2, folder=tmp_path / "run")
    last = folder / "checkpoints" / "last.ckpt"
    assert last.resolve().is_dir()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step=2.ckpt",
        "step=4.ckpt",
    ]
    assert read_checkpoint(last)[KEY]["tokens_seen"] == 4 * 2 * 2 * 2 * 64
    run("generate", last, "--max_new_tokens", 4, cwd=tmp_path)
    begun = fit("--model.init_from", last, "--model.optimizer.lr", 1e-12, steps=1, folder=tmp_path / "begun")
    for name, value in weights(folder).items():
        torch.testing.assert_close(weights(begun)[name], value, atol=1e-9, rtol=0, msg=name)
    run("export", last, "hf", "--check", "false", cwd=tmp_path)
    failed = run("fit", "--config", folder / "recipe.yaml", "--trainer.strategy", "auto", "--trainer.devices", 1,
                 "--ckpt_path", "auto", cwd=tmp_path, returncode=2)  # fmt: skip
    assert "is sharded; continue it by --trainer.strategy fsdp2, on any devices" in failed.stderr
    shard = next(last.resolve().glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    assert f"the shard {shard.name} is damaged or missing" in run("generate", last, cwd=tmp_path, returncode=2).stderr


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_metadata_of_a_sharded_checkpoint_executes_no_code(fit, tmp_path, capsys):
    import pickle

    from ropepp_lit.errors import UsageError

    folder = fit(*SHARDED, steps=4, devices=2, rows=2, folder=tmp_path / "run") / "checkpoints" / "last.ckpt"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match="not a readable checkpoint"):
        read_checkpoint(folder)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("in_background", ["true", "false"])
@pytest.mark.parametrize("kind", [SHARDED, STRATEGY], ids=["sharded", "one file"])
def test_killed_while_saving_at_every_step(
    start_training, run, tiny, tmp_path, command_path, kind, in_background, number
):
    options = [
        *tiny,
        *kind,
        "--trainer.devices",
        2,
        "--checkpoints.every_n_steps",
        1,
        "--checkpoints.async_save",
        in_background,
        "--trainer.default_root_dir",
        "run",
    ]
    command = [command_path, "fit", *options, "--trainer.max_steps", 100_000, "--model.schedule.total_steps", 100_000]
    process = start_training(*command, cwd=tmp_path)
    last = tmp_path / "run/checkpoints/last.ckpt"
    time.sleep(random.Random(number).uniform(0, 1.5))
    for rank in [*process.children(recursive=True), process]:
        rank.kill()
    process.wait()
    step = read_checkpoint(last)["global_step"]
    options += ["--model.schedule.total_steps", 100_000, "--ckpt_path", "auto", "--trainer.max_steps"]
    printed = run("fit", *options, step + 3, cwd=tmp_path).stdout
    assert "Continuing from run/checkpoints/step=" in printed
    assert read_checkpoint(last)["global_step"] == step + 3
