"""The LightningModule under a plain Trainer, as from a script of one's own."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback

from ropepp_lit.data.token_data import TokenData
from ropepp_lit.nn import DecoderConfig, Frequencies, RoPEPP
from ropepp_lit.train.callbacks import TextSample
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.costs import training_flops_per_token
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


@pytest.fixture
def train(tiny, texts, tmp_path):
    cache = tiny[tiny.index("--data.cache_dir") + 1]

    def train(*, batch_size=2, optimizer=None, schedule=None, callbacks=(), precision="64-true", **settings):
        torch.manual_seed(0)
        model = CausalLM(
            decoder=CONFIG,
            positions=RoPEPP(),
            frequencies=Frequencies(),
            optimizer=optimizer or AdamW(lr=0.01),
            schedule=schedule or Cosine(),
        )
        data = TokenData(
            source=str(texts),
            tokenizer="bytes",
            context_length=64,
            batch_size=batch_size,
            validation_fraction=0.2,
            cache_dir=cache,
        )
        trainer = pl.Trainer(
            **{
                "accelerator": "cpu",
                "max_steps": 4,
                "precision": precision,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": tmp_path,
                "callbacks": list(callbacks),
                **settings,
            }
        )
        trainer.fit(model, data)
        return model, trainer

    return train


def test_micro_batches_weigh_every_token_the_same(train):
    whole, _ = train(batch_size=4, gradient_clip_val=0.5)
    parts, _ = train(batch_size=1, accumulate_grad_batches=4, gradient_clip_val=0.5)
    for one, other in zip(whole.decoder.parameters(), parts.decoder.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    assert whole.tokens_seen == parts.tokens_seen == 4 * 4 * 64


def test_gradient_norm_is_logged_before_clipping(train):
    _, trainer = train(max_steps=1)
    norm = trainer.logged_metrics["gradient_norm"].item()
    _, clipped = train(max_steps=1, gradient_clip_val=norm / 2)
    assert clipped.logged_metrics["gradient_norm"].item() == pytest.approx(norm)


def test_utilization_of_a_known_device_is_logged(train, monkeypatch):
    monkeypatch.setattr("ropepp_lit.train.causal_lm.device_name", lambda: "NVIDIA H100 80GB HBM3")
    model, trainer = train(max_steps=2)
    metrics = trainer.logged_metrics
    flops = training_flops_per_token(model.config, model.decoder.head_layout, 64)
    expected = metrics["tokens_per_second"] * flops / 989e12
    assert metrics["model_flops_utilization"] == pytest.approx(float(expected), rel=1e-5)
    monkeypatch.setattr("ropepp_lit.train.causal_lm.device_name", lambda: None)
    assert "model_flops_utilization" not in train(max_steps=1)[1].logged_metrics


class NormAtStep(Callback):
    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.decoder.parameters() if p.grad is not None]
        if gradients:
            self.norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()


def test_gradients_are_clipped_by_norm(train):
    watch = NormAtStep()
    train(max_steps=2, gradient_clip_val=0.01, callbacks=[watch])
    assert watch.norm == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_follows_the_schedule(train):
    schedule = Cosine(warmup_steps=1, total_steps=10)
    _, trainer = train(optimizer=AdamW(lr=0.5), schedule=schedule, max_steps=5)
    # What is logged at step 5 is what step 6 would take.
    assert trainer.logged_metrics["lr"] == pytest.approx(0.5 * schedule.factor(5, 10))


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-true", "bf16-mixed"])
def test_validation_figures_equal_a_plain_loop(train, precision):
    model, trainer = train(precision=precision)
    trainer.validate(model, datamodule=trainer.datamodule, verbose=False)
    data, total, count = trainer.datamodule, 0.0, 0
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        (loader,) = data.val_dataloader()
        for batch in loader:
            logits = model.decoder(batch.input_ids, documents=batch.documents).double()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            total, count = total + losses.sum().item(), count + (batch.labels >= 0).sum().item()
    ((name, tokens),) = data.validation_sets.items()
    figures = model.last_validation[name]
    tolerance = 1e-5 if precision.startswith(("32", "64")) else 1e-3
    assert figures["tokens"] == count == data.predicted_tokens(tokens)
    assert figures["loss"] == pytest.approx(total / count, rel=tolerance)
    assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=10 * tolerance)
    bits = total / math.log(2) / data.manifest.splits["validation"].bytes
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=tolerance)


def test_sampling_leaves_the_random_numbers_of_training_alone(train):
    plain, _ = train(val_check_interval=1)
    state = torch.random.get_rng_state()
    sampled, _ = train(val_check_interval=1, callbacks=[TextSample(max_new_tokens=5)])
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(plain.decoder.parameters(), sampled.decoder.parameters(), strict=True):
        assert torch.equal(one, other)
