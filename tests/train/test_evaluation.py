"""Evaluation, diagnostics and samples during training."""

import contextlib
import json
import math

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters

from ropepp_lit.checkpoint import decoder_weights, load_decoder, read_checkpoint
from ropepp_lit.cli import main
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.nn import Probe

NAMES = "perplexity,retrieval:single,recall:1,noise:perplexity"
TASKS = ["--evaluation.every_n_steps", "3", "--evaluation.tasks", NAMES]
DIAGNOSTICS = ["--diagnostics.every_n_steps", "3", "--diagnostics.far", "16", "--diagnostics.max_tokens", "100"]
OPTIONS = [*TASKS, "--evaluation.lengths", "128,256", "--evaluation.limit", "4", *DIAGNOSTICS]
SHARDED = ["--trainer.devices", "2", "--trainer.strategy", "FSDP2Strategy"]


@pytest.fixture(scope="module")
def fit(run, tiny, tmp_path_factory):
    """Train 4 steps in float64 on 4 rows, once per set of options; returns the run's folder."""
    done = {}

    def fit(*options, rows=4):
        if (key := (*options, rows)) not in done:
            done[key] = tmp_path_factory.mktemp("run")
            common = [*tiny, "--trainer.precision", "64-true", "--trainer.max_steps", "4", "--data.batch_size", rows]
            run("fit", *common, *options, "--trainer.default_root_dir", done[key], cwd=done[key])
        return done[key]

    return fit


def events(folder):
    """Return what TensorBoard shows of validation, evaluation and samples: values by step for each tag."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    scalars = {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    text = [event.tensor_proto.string_val for event in accumulator.Tensors("sample/text_summary")]
    return {tag: values for tag, values in scalars.items() if tag.startswith(("eval/", "val/", "attention/"))}, text


@pytest.mark.end_to_end
def test_logged_results_equal_evaluate_and_training_is_unchanged(fit, run, tmp_path):
    folder = fit(*OPTIONS)
    one, other = (decoder_weights(read_checkpoint(path / "checkpoints/last.ckpt")) for path in (folder, fit()))
    assert all(torch.equal(one[name], value) for name, value in other.items())
    scalars, _ = events(folder)
    expected = ("perplexity/128/loss", "perplexity/256/perplexity", "retrieval/single/256/score", "recall/1/128/loss")
    assert {f"eval/{name}" for name in expected} <= {*scalars}
    assert "eval/perplexity/256/loss/noise_imaginary_0.5" in scalars
    third, last = scalars["eval/perplexity/256/loss"]
    assert third != last
    options = ["--tasks", "perplexity", "--lengths", 256, "--limit", 4, "--out", "evaluation"]
    run("evaluate", folder / "checkpoints/last.ckpt", *options, cwd=tmp_path)
    rows = json.loads((tmp_path / "evaluation" / "results.json").read_text())["scores"]
    assert rows[0]["metric"] == "loss"
    assert rows[0]["value"] == pytest.approx(last, abs=1e-4)


def test_diagnostics_equal_reference_formulas(fit):
    folder = fit(*OPTIONS)
    scalars, _ = events(folder)
    config = yaml.safe_load((folder / "recipe.yaml").read_text())["data"]
    decoder = load_decoder(read_checkpoint(folder / "checkpoints/last.ckpt"), dtype=torch.float64)
    with contextlib.chdir(folder):
        data = TokenData(**config)
        data.setup("fit")
        batch = data.train_samples.collate(data.train_samples.__getitems__([0]))
    seen, length = [], batch.input_ids.shape[1]

    class Keep(Probe):
        def scores(self, layer, scores):
            seen.append([scores[0], None])
            return scores

        def weights(self, layer, weights):
            seen[-1][1] = weights[0]

    with decoder.probed(Keep()), torch.no_grad():
        decoder(batch.input_ids, documents=batch.documents)
    ids = batch.documents.ids[0]
    for kind, name in enumerate(("real", "imaginary")):
        largest, entropy, beyond, columns = [], [], [], []
        for layer, (scores, weights) in enumerate(seen):
            sees = [(q, k) for q in range(length) for k in range(q + 1) if ids[q] == ids[k]]
            largest.append(max(scores[h, q, k].item() for h in range(kind, len(scores), 2) for q, k in sees))
            rows = [weights[h, q] for h in range(kind, len(weights), 2) for q in range(length)]
            entropy.append(sum(-(row[row > 0] * row[row > 0].log()).sum().item() for row in rows) / len(rows))
            far = [weights[h, q, max(0, q - 16) :].sum() for h in range(kind, len(weights), 2) for q in range(length)]
            beyond.append(100 * sum(1 - near.item() for near in far) / len(far))
            weight = decoder.blocks[layer].self_attn.o_proj.weight
            columns.append(weight.unflatten(1, (-1, 2, 8))[:, :, kind].norm().item())
            assert scalars[f"attention/layer_{layer}/{name}/entropy"][-1] == pytest.approx(entropy[-1], rel=1e-5)
        expected = {"largest_score": max(largest), "entropy": sum(entropy) / 2, "share_beyond_16": sum(beyond) / 2}
        expected["output_norm"] = math.hypot(*columns)
        actual = {figure: scalars[f"attention/{name}/{figure}"][-1] for figure in expected}
        assert actual == pytest.approx(expected, rel=1e-5)
        assert 0 < scalars[f"attention/{name}/output_gradient_norm"][-1] <= 1  # clipped to 1


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ([*SHARDED, "--trainer.strategy.context_parallel_size", "2"], 4),
        (SHARDED, 2),
    ],
    ids=["context", "fsdp"],
)
@pytest.mark.slow
def test_two_processes_have_the_results_of_one(fit, options, rows):
    (scalars, text), (expected, expected_text) = events(fit(*OPTIONS, *options, rows=rows)), events(fit(*OPTIONS))
    assert text == expected_text
    assert scalars.keys() == expected.keys()
    for tag, values in expected.items():
        assert scalars[tag] == pytest.approx(values, abs=1e-6), tag


def test_evaluation_and_samples_compile_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graphs = []
    for options in (["--sample.max_new_tokens", "0"], ["--sample.max_new_tokens", "12", *OPTIONS]):
        torch.compiler.reset()
        counters.clear()
        common = [*tiny, "--trainer.max_steps", "4", "--trainer.default_root_dir", str(len(graphs))]
        with torch.compiler.set_stance(force_backend="eager"):
            main(["fit", *common, "--model.compile", "true", "--data.intra_document_masking", "false", *options])
        graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert graphs[0] == graphs[1] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--evaluation.every_n_steps", "-1"], "evaluation.every_n_steps: -1 must be 0 (never) or more"),
        (["--evaluation.tasks", "speed"], "evaluation.tasks: no task 'speed'"),
        (
            ["--evaluation.tasks", "attention"],
            "evaluation.tasks: only perplexity, retrieval, recall, induction and noise during training",
        ),
        (["--evaluation.lengths", "0"], "evaluation.lengths: '0' is not a number of tokens"),
        (
            ["--evaluation.every_n_steps", "1", "--evaluation.lengths", "40"],
            "evaluation.lengths: 40 tokens are too few for retrieval:single",
        ),
        (["--diagnostics.every_n_steps", "-1"], "diagnostics.every_n_steps: -1 must be 0 (never) or more"),
        (["--diagnostics.max_tokens", "1"], "diagnostics.max_tokens: 1 must be 2 or more"),
        (
            ["--diagnostics.every_n_steps", "1", "--diagnostics.far", "64"],
            "diagnostics.far: 64 must be less than the 64 tokens that are read",
        ),
    ],
)
def test_mistakes(mistake, options, expected):
    assert expected in mistake(*options)


def test_a_resumed_run_evaluates_only_at_ends_of_steps(run, tiny, tmp_path):
    """With two batches per step: at steps 2 and 4, not after the first batch that follows step 2."""
    options = [*tiny, "--trainer.accumulate_grad_batches", "2", "--data.batch_size", "1"]
    options += ["--sample.max_new_tokens", "0", "--diagnostics.every_n_steps", "2", "--diagnostics.far", "8"]
    options += ["--model.schedule.total_steps", "4"]
    options += ["--trainer.default_root_dir", "run"]
    run("fit", *options, "--trainer.max_steps", "2", cwd=tmp_path)
    run("fit", *options, "--trainer.max_steps", "4", "--ckpt_path", "auto", cwd=tmp_path)
    accumulator = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("attention/real/entropy")] == [2, 4]
