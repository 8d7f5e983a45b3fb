"""Evaluation at length while a model trains."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ropepp_lit.checkpoint import decoder_weights, read_checkpoint

TASKS = ["--evaluation.every_n_steps", 3, "--evaluation.tasks", "perplexity,retrieval:single,noise:perplexity"]
OPTIONS = [*TASKS, "--evaluation.lengths", "128,256", "--evaluation.limit", 4]


@pytest.mark.end_to_end
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_logs_what_evaluate_finds_and_leaves_training_alone(run, tiny, tmp_path, devices):
    common = [*tiny, "--trainer.max_steps", 4, "--trainer.devices", devices, "--data.batch_size", 2]
    common += ["--trainer.strategy", "fsdp2"] if devices > 1 else []
    run("fit", *common, *OPTIONS, "--trainer.default_root_dir", "with", cwd=tmp_path)
    run("fit", *common, "--trainer.default_root_dir", "without", cwd=tmp_path)
    checkpoints = [tmp_path / name / "checkpoints" / "last.ckpt" for name in ("with", "without")]
    one, other = (decoder_weights(read_checkpoint(path)) for path in checkpoints)
    assert all(torch.equal(one[name], value) for name, value in other.items())
    events = EventAccumulator(str(tmp_path / "with" / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
    assert {"eval/perplexity/128/loss", "eval/perplexity/256/perplexity", "eval/retrieval/single/256/score"} <= {*tags}
    assert "eval/perplexity/256/loss/noise_imaginary_0.5" in tags
    (third, last) = events.Scalars("eval/perplexity/256/loss")
    assert third.value != last.value
    options = ["--tasks", "perplexity", "--lengths", 256, "--limit", 4, "--out", "found"]
    run("evaluate", "with/checkpoints/last.ckpt", *options, cwd=tmp_path)
    rows = json.loads((tmp_path / "found" / "results.json").read_text())["scores"]
    assert rows[0]["metric"] == "loss"
    assert rows[0]["value"] == pytest.approx(last.value, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--evaluation.every_n_steps", "-1"], "evaluation.every_n_steps: -1 must be 0 (never) or more"),
        (["--evaluation.tasks", "speed"], "evaluation.tasks: no task 'speed'"),
        (["--evaluation.tasks", "attention"], "evaluation.tasks: while training perplexity, retrieval and noise"),
        (["--evaluation.lengths", "0"], "evaluation.lengths: '0' is no number of tokens"),
        (
            ["--evaluation.every_n_steps", "1", "--evaluation.lengths", "40"],
            "evaluation.lengths: 40 tokens are too few for retrieval:single",
        ),
    ],
)
def test_mistakes(mistake, options, said):
    assert said in mistake(*options)
