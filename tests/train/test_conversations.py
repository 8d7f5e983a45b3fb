"""Training on conversations: average of the loss, packing, and checkpoints."""

import copy
import itertools
import json
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from marked import END, conversations, write_marked
from runs import KILLER

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.data.batch import Batch
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPEPP
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.optimizer import AdamW
from ropepp_lit.train.schedule import Cosine

CONFIG = DecoderConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
AVERAGES = ["trained_tokens", "conversations"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marked") / "chats"
    return write_marked(folder, train=conversations(150), validation=conversations(31, seed=1))


class Keep(Callback):
    """Store a copy of the decoder before the first step."""

    def on_train_start(self, trainer, module):
        self.decoder = copy.deepcopy(module.decoder)


@pytest.fixture
def train(chats, tmp_path):
    def train(*, average=None, batch_size=4, precision="64-true", max_steps=2, **settings):
        torch.manual_seed(0)
        model = CausalLM(
            decoder=CONFIG, positions=RoPEPP(), frequencies=Frequencies(), optimizer=AdamW(lr=0.01), schedule=Cosine(),
            loss_average=average,
        )  # fmt: skip
        data = TokenData(source=str(chats), context_length=64, batch_size=batch_size)
        options = {
            "accelerator": "cpu", "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
            "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0,
            "enable_model_summary": False, "default_root_dir": tmp_path, "max_steps": max_steps, "precision": precision,
        }  # fmt: skip
        trainer = pl.Trainer(**{**options, **settings})
        trainer.fit(model, data)
        return model, trainer

    return train


def plain_mean(decoder, data, rows, average):
    """Return the mean loss over rows, computed one conversation at a time."""
    means, counts = [], []
    for row in rows:
        batch = data.train_samples.collate(data.train_samples.__getitems__([row]))
        logits = decoder(batch.input_ids, documents=batch.documents)[0]
        losses = F.cross_entropy(logits, batch.labels[0], reduction="none")
        lengths = batch.documents.cu_seqlens.diff().tolist()
        for loss, labels in zip(losses.split(lengths), batch.labels[0].split(lengths), strict=True):
            if (labels != -100).any():
                means.append(loss[labels != -100].mean())
                counts.append(int((labels != -100).sum()))
    assert len(set(counts)) > 3
    weights = torch.tensor(counts if average == "trained_tokens" else [1] * len(counts))
    return (torch.stack(means) * weights).sum() / weights.sum()


@pytest.mark.parametrize("average", AVERAGES)
def test_the_loss_of_a_step_does_not_depend_on_the_distribution_of_rows(train, average):
    keep, settings = Keep(), {"average": average, "max_steps": 1, "gradient_clip_val": 0.1}
    full_batch, trainer = train(batch_size=8, callbacks=[keep], **settings)
    mean = plain_mean(keep.decoder, trainer.datamodule, range(8), average)
    mean.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in keep.decoder.parameters()])
    parts, other = train(batch_size=2, accumulate_grad_batches=4, **settings)
    for metrics in (trainer.logged_metrics, other.logged_metrics):
        assert metrics["train/loss"].item() == pytest.approx(mean.item(), rel=1e-6)
        assert metrics["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-6)
        assert metrics[f"{average}_per_second"] > 0
        assert "train/bits_per_byte" not in metrics
    for one, two in zip(full_batch.decoder.parameters(), parts.decoder.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_conversations_are_averaged_by_tokens_by_default(train):
    assert train(max_steps=1)[0].step_average.over == "trained_tokens"
    model, trainer = train(max_steps=1, average="all_tokens")
    assert model.step_average.over == "all_tokens"
    assert trainer.logged_metrics["gradient_norm"] > 0


def test_scaled_gradients_are_averaged_and_unscaled_before_clipping(train):
    runs = []
    for scale in (None, 2.0**10):
        precision = MixedPrecision("bf16-mixed", "cpu", scaler=None)
        precision.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        model, trainer = train(precision=None, plugins=[precision], gradient_clip_val=0.05)
        runs.append((trainer.logged_metrics["gradient_norm"].item(), model.state_dict()))
    (plain_norm, plain), (scaled_norm, scaled) = runs
    assert scaled_norm == pytest.approx(plain_norm, rel=1e-2)
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_packing_does_not_change_loss_and_gradients_of_a_conversation(chats, dtype, tolerance):
    torch.manual_seed(0)
    decoder = Decoder(CONFIG, RoPEPP(), Frequencies()).to(dtype)
    data = TokenData(source=str(chats), context_length=64, batch_size=2)
    data.setup("fit")
    batch = data.train_samples.collate(data.train_samples.__getitems__([0, 1]))

    def measure(input_ids, labels, documents):
        decoder.zero_grad()
        marked = Batch.create(input_ids, labels, documents)
        loss = decoder.loss(input_ids, labels, documents=documents, label_indices=marked.places, reduction="sum")
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in decoder.parameters())]

    flat_ids, flat_labels, checked = batch.input_ids.flatten(), batch.labels.flatten(), 0
    for start, end in itertools.pairwise(batch.documents.cu_seqlens.tolist()):
        labels = torch.full_like(flat_labels, -100)
        labels[start:end] = flat_labels[start:end]
        if (labels == -100).all():
            continue
        packed = measure(batch.input_ids, labels.view_as(batch.labels), batch.documents)
        alone = measure(flat_ids[None, start:end], flat_labels[None, start:end], None)
        for one, two in zip(packed, alone, strict=True):
            torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)
        assert torch.equal(batch.documents.positions.flatten()[start:end], torch.arange(end - start))
        checked += 1
    assert checked > 3


def test_validation_does_not_depend_on_the_batch_size(train):
    results = []
    for batch_size in (1, 3, 16):
        model, trainer = train(batch_size=4, max_steps=1)
        trainer.limit_val_batches = 1.0
        data = TokenData(source=str(trainer.datamodule.weights and next(iter(trainer.datamodule.weights))),
                         context_length=64, batch_size=batch_size)  # fmt: skip
        pl.Trainer(accelerator="cpu", logger=False, precision="64-true", enable_progress_bar=False).validate(
            model, data, verbose=False
        )
        results.append(model.last_validation["chats"])
    for figures in results[1:]:
        assert figures["loss"] == pytest.approx(results[0]["loss"], rel=1e-9)
        assert figures["tokens"] == results[0]["tokens"] == sum(x.sum() for _, x in conversations(31, seed=1))


@pytest.mark.end_to_end
def test_killed_and_resumed_and_on_two_devices(run, chats, tmp_path):
    """With the command and workers; the checkpoint stores the chat template and end-of-turn tokens."""
    (tmp_path / "killer.py").write_text(KILLER)
    recipe = Path(__file__).parent / "tiny.yaml"

    def fit(folder, *options, returncode=0, rows=4):
        return run(
            "fit", "--config", recipe, "--data.source", chats, "--data.tokenizer", "null", "--model.loss_average",
            "conversations", "--trainer.precision", "64-true", "--trainer.accumulate_grad_batches", 2,
            "--data.batch_size", rows, "--sample.max_new_tokens", 0, "--trainer.default_root_dir", folder, *options,
            cwd=tmp_path, returncode=returncode,
        ).stdout  # fmt: skip

    printed = fit("baseline", "--data.num_workers", 2)
    assert "mean over the conversations of a step of the means over their trained tokens" in printed
    assert "chats: 150 conversations in " in printed
    assert "trained tokens:\n  loss" in printed
    assert "bits per byte" not in printed
    killer = ["--trainer.callbacks", "killer.Kill", "--trainer.callbacks.at", 9]
    fit("killed", "--data.num_workers", 2, *killer, returncode=-signal.SIGKILL)
    fit("killed", "--data.num_workers", 1, "--ckpt_path", "auto")
    context = ["--trainer.devices", 2, "--trainer.strategy", "FSDP2Strategy"]
    fit("two", *context, "--trainer.strategy.context_parallel_size", 2)
    baseline, killed, two = (
        read_checkpoint(tmp_path / f"{x}/checkpoints/last.ckpt") for x in ("baseline", "killed", "two")
    )
    for name, value in baseline["state_dict"].items():
        assert torch.equal(killed["state_dict"][name], value), name
        torch.testing.assert_close(two["state_dict"][name], value, atol=1e-8, rtol=0)
    for key in ("validation", "tokens_seen", "train_loss"):
        assert killed[KEY][key] == baseline[KEY][key]
    assert json.loads(baseline[KEY]["tokenizer_config"])["chat_template"] == "{{ messages }}"
    assert json.loads(baseline[KEY]["generation_config"])["eos_token_id"] == [1, END]
