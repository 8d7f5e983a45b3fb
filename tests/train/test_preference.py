"""Preference tuning: losses, their mean over a step, and the reference of a run."""

import copy
import itertools
import math
import signal
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from marked import answer_pairs, conversations, write_marked
from runs import KILLER

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import DecoderConfig, Frequencies, RoPEPP
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.optimizer import AdamW
from ropepp_lit.train.pair_training import ENTRY, Reference
from ropepp_lit.train.plan import plan
from ropepp_lit.train.preference import DPO, ORPO, SimPO
from ropepp_lit.train.schedule import Cosine

CONFIG = DecoderConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
RECIPE = Path(__file__).parent / "tiny.yaml"


def dpo(sums, counts, reference, smoothing=0.0):
    margin = 0.2 * ((sums[0] - reference[0]) - (sums[1] - reference[1]))
    right = 1 / (1 + torch.exp(-margin))
    return -(1 - smoothing) * torch.log(right) - smoothing * torch.log(1 - right)


def simpo(sums, counts, reference):
    return -torch.log(1 / (1 + torch.exp(-(2 * sums[0] / counts[0] - 2 * sums[1] / counts[1] - 0.7))))


def orpo(sums, counts, reference):
    chosen, rejected = (torch.exp(total / count) for total, count in zip(sums, counts, strict=True))
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    return -sums[0] / counts[0] - 0.3 * torch.log(ratio / (1 + ratio))


LOSSES = {
    "dpo": (DPO(beta=0.2), dpo),
    "smoothed": (DPO(beta=0.2, label_smoothing=0.1), lambda *x: dpo(*x, smoothing=0.1)),
    "simpo": (SimPO(margin=0.7), simpo),
    "orpo": (ORPO(weight=0.3), orpo),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_reference_formulas(name):
    preference, plain = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    sums, reference = (-50 * torch.rand(20, 2, generator=generator, dtype=torch.float64) - 0.1 for _ in range(2))
    counts = torch.randint(1, 40, (20, 2), generator=generator)
    losses, rewards = preference(sums, counts, reference)
    expected = torch.stack([plain(*row) for row in zip(sums, counts, reference, strict=True)])
    torch.testing.assert_close(losses, expected, atol=1e-10, rtol=1e-10)
    assert rewards.shape == (20, 2)
    if name == "dpo":
        same, _ = preference(sums, counts, sums)
        torch.testing.assert_close(same, torch.full_like(same, math.log(2)), atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        (DPO(beta=0.0), "model.preference.beta: 0.0 must be above 0"),
        (DPO(beta=math.inf), "model.preference.beta: inf must be above 0"),
        (DPO(label_smoothing=0.5), "model.preference.label_smoothing: 0.5 must be 0 or more and below 0.5"),
        (SimPO(beta=-1.0), "model.preference.beta: -1.0 must be above 0"),
        (SimPO(margin=-1.0), "model.preference.margin: -1.0 must be 0 or more"),
        (ORPO(weight=math.nan), "model.preference.weight: nan must be above 0"),
    ],
)
def test_invalid_settings(preference, message):
    with pytest.raises(UsageError, match=message):
        make(preference)


def make(preference):
    torch.manual_seed(0)
    return CausalLM(
        decoder=CONFIG, positions=RoPEPP(), frequencies=Frequencies(), optimizer=AdamW(lr=0.01), schedule=Cosine(),
        preference=preference,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marked") / "pairs"
    return write_marked(folder, train=answer_pairs(150), validation=answer_pairs(31, seed=1))


class Keep(Callback):
    """Store a copy of the decoder before each micro-batch."""

    def __init__(self):
        self.decoders = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.decoders.append(copy.deepcopy(module.decoder))


def train(pairs, folder, preference, *, batch_size=4, max_steps=2, **settings):
    model, keep = make(preference), Keep()
    data = TokenData(source=str(pairs), context_length=64, batch_size=batch_size)
    options = {
        "accelerator": "cpu", "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0,
        "enable_model_summary": False, "default_root_dir": folder, "precision": "64-true",
    }  # fmt: skip
    trainer = pl.Trainer(**{**options, **settings}, max_steps=max_steps, callbacks=[keep])
    trainer.fit(model, data)
    return model, trainer, keep


def answers_of(decoder, batch):
    """Return log-probability and length of each answer, computed separately."""
    ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
    sums_and_counts = []
    for start, end in itertools.pairwise(batch.documents.cu_seqlens.tolist()):
        targets = labels[start:end]
        if (targets != -100).any():
            logits = decoder(ids[None, start:end])[0]
            sums_and_counts.append((-F.cross_entropy(logits, targets, reduction="sum"), int((targets != -100).sum())))
    sums, counts = zip(*sums_and_counts, strict=True)
    return torch.stack(sums).view(-1, 2), torch.tensor(counts).view(-1, 2)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_step_is_the_mean_over_pairs(name, pairs, tmp_path):
    """At the second step, when the model differs from the reference, with and without micro-batches."""
    preference, plain = LOSSES[name]
    full_batch, trainer, keep = train(pairs, tmp_path, preference, batch_size=8, gradient_clip_val=0.1)
    reference, decoder = keep.decoders
    samples = trainer.datamodule.train_samples
    losses, rewards = [], []
    for row in range(8, 16):
        batch = samples.collate(samples.__getitems__([row]))
        with torch.no_grad():
            before, _ = answers_of(reference, batch)
        sums, counts = answers_of(decoder, batch)
        losses += [plain(*one) for one in zip(sums, counts, before, strict=True)]
        rewards += preference(sums.detach(), counts, before)[1]
    assert len({len(losses), 8, 0}) == 3
    mean = torch.stack(losses).mean()
    mean.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in decoder.parameters()])
    parts, other, _ = train(pairs, tmp_path, preference, batch_size=2, accumulate_grad_batches=4, gradient_clip_val=0.1)
    chosen, rejected = torch.stack(rewards).T
    for metrics in (trainer.logged_metrics, other.logged_metrics):
        assert metrics["train/loss"].item() == pytest.approx(mean.item(), rel=1e-9)
        assert metrics["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-6)
        assert metrics["train/chosen_reward"].item() == pytest.approx(chosen.mean().item(), rel=1e-9)
        assert metrics["train/rejected_reward"].item() == pytest.approx(rejected.mean().item(), rel=1e-9)
        assert metrics["train/accuracy"].item() == pytest.approx((chosen > rejected).double().mean().item())
        assert metrics["pairs_per_second"] > 0
        assert "train/perplexity" not in metrics
    for one, two in zip(full_batch.decoder.parameters(), parts.decoder.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_first_loss_is_log_2(precision, pairs, tmp_path):
    model, trainer, _ = train(pairs, tmp_path, DPO(), max_steps=1, precision=precision)
    assert trainer.logged_metrics["train/loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.logged_metrics["gradient_norm"] > 0
    assert len(model.pairs.reference) == 150 + 31
    assert model.decoder.training


def test_references_are_indexed_by_the_tokens_of_a_pair():
    keys, values = np.array([5, -3, 5, 8]), np.arange(8.0).reshape(4, 2)
    reference = Reference.from_entry(Reference(keys, values).entry())
    assert len(reference) == 3
    assert reference.look_up([8, 5, 5, -3]).tolist() == [[6, 7], [0, 1], [0, 1], [2, 3]]
    assert reference.look_up([]).shape == (0, 2)
    for unknown in ([7], [9], [-4]):
        with pytest.raises(UsageError, match="pairs of answers that were not there when the run started"):
            reference.look_up(unknown)


@pytest.mark.end_to_end
@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_killed_and_resumed(lora, run, pairs, tmp_path):
    """Also with a sharded checkpoint, and on two devices sharing rows. With dropout, LoRA's reference is the base."""
    (tmp_path / "killer.py").write_text(KILLER)

    def fit(folder, *options, returncode=0):
        return run(
            "fit", "--config", RECIPE, "--trainer.precision", "64-true", "--sample.max_new_tokens", 0,
            "--trainer.default_root_dir", folder, *options, cwd=tmp_path, returncode=returncode,
        ).stdout  # fmt: skip

    fit("base", "--trainer.max_steps", 1)
    options = [
        "--data.source", pairs, "--data.tokenizer", "null", "--model.preference", "DPO", "--model.init_from",
        "base/checkpoints/last.ckpt", "--model.optimizer.lr", 0.01, "--data.batch_size", 4, "--trainer.max_steps", 4,
        "--trainer.accumulate_grad_batches", 2, "--model.schedule.total_steps", 4,
    ]  # fmt: skip
    options += ["--model.lora.rank", 4, "--model.lora.dropout", 0.2] if lora else []
    printed = fit("baseline", *options)
    assert "DPO, beta 0.1; the reference is the model at the start of the run" in printed
    assert "Held-out pairs of pairs at step 4, " in printed
    killer = ["--trainer.callbacks", "killer.Kill", "--trainer.callbacks.at", 5]
    fit("killed", *options, *killer, returncode=-signal.SIGKILL)
    fit("killed", *options, "--ckpt_path", "auto")
    baseline, killed = (read_checkpoint(tmp_path / f"{name}/checkpoints/last.ckpt") for name in ("baseline", "killed"))
    for name, value in baseline["state_dict"].items():
        assert torch.equal(killed["state_dict"][name], value), name
    for key in ("validation", "tokens_seen", "train_loss"):
        assert killed[KEY][key] == baseline[KEY][key]
    assert set(baseline[KEY]["train_loss"]) == {"nats", "tokens", "rewards"}
    for name, value in baseline[KEY][ENTRY].items():
        assert torch.equal(killed[KEY][ENTRY][name], value)
    if lora:
        return  # dropout differs between ranks
    ranks = ["--trainer.devices", 2, "--trainer.strategy", "FSDP2Strategy"]
    ranks += ["--trainer.strategy.save_distributed_checkpoint", "true"]
    fit("two", *options, *ranks, "--trainer.strategy.context_parallel_size", 2, "--trainer.max_steps", 2)
    fit("two", *options, *ranks, "--data.batch_size", 2, "--ckpt_path", "auto")
    two = read_checkpoint(tmp_path / "two/checkpoints/last.ckpt")
    for actual, expected in ((two["state_dict"], baseline["state_dict"]), (two[KEY][ENTRY], baseline[KEY][ENTRY])):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, atol=1e-8, rtol=0)


@pytest.mark.end_to_end
def test_mistakes(run, pairs, tmp_path):
    chats = write_marked(tmp_path / "chats", train=conversations(20), validation=conversations(9))
    other = write_marked(tmp_path / "other", train=answer_pairs(40, seed=9), validation=answer_pairs(9, seed=8))
    recipe = ["--config", str(RECIPE), "--trainer.default_root_dir", str(tmp_path / "run"), "--simulate", "false",
              "--data.cache_dir", str(tmp_path / "cache"), "--sample.max_new_tokens", "0"]  # fmt: skip
    fit = ["fit", *recipe[:4], *recipe[6:]]
    run(*fit, "--trainer.max_steps", 1, "--trainer.default_root_dir", "base", cwd=tmp_path)
    base = str(tmp_path / "base/checkpoints/last.ckpt")
    data = ["--data.source", str(pairs), "--data.tokenizer", "null"]
    tune = ["--model.preference", "DPO"]
    for options, message in (
        (data, "model.preference: the data are pairs of answers; choose their loss: DPO, SimPO or ORPO"),
        (["--data.source", str(chats), *data[2:], *tune], "model.preference: the data are not pairs of answers; prep"),
        ([*data, *tune], "model.preference: DPO starts from a fine-tuned model; set model.init_from"),
        ([*data, *tune, "--ckpt_path", base], "stores no reference for model.preference; initialize from its"),
        ([*data, *tune, "--model.init_from", base, "--model.loss_average", "all_tokens"], "model.loss_average: all_to"),
        ([*data, *tune, "--model.preference.beta", "0"], "model.preference.beta: 0.0 must be above 0"),
        ([*data, *tune, "--model.preference.gamma", "0"], "DPO': Option 'gamma' is not accepted"),
        ([*data, "--model.preference", "KTO"], "model.preference: no class 'KTO'; choose one of DPO, SimPO, ORPO"),
    ):
        with pytest.raises(UsageError) as error:
            plan([*recipe, *options])
        assert message in str(error.value)
        assert "Union" not in str(error.value)
    # A loss without a reference can continue a run on text, whose training loss has another kind of metric.
    simpo = ["--model.preference", "SimPO", "--ckpt_path", base, "--trainer.default_root_dir", "simpo"]
    assert "Held-out pairs" in run(*fit, *data, *simpo, "--trainer.max_steps", 2, cwd=tmp_path).stdout
    options = [*data, *tune, "--model.init_from", base]
    run(*fit, *options, "--trainer.max_steps", 2, cwd=tmp_path)
    wrong = [*options, "--ckpt_path", "auto", "--data.source", other]
    printed = run(*fit, *wrong, cwd=tmp_path, returncode=2).stderr
    assert "pairs of answers that were not there when the run started" in printed
