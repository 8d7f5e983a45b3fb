"""The LightningModule with a plain Trainer, as in a user's script."""

import math
import time
import traceback
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from torch.utils._python_dispatch import TorchDispatchMode

from ropepp_lit.data.token_data import TokenData
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPEPP, kernels
from ropepp_lit.train import throughput
from ropepp_lit.train.callbacks import TextSample
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.costs import training_flops
from ropepp_lit.train.metrics import PairLoss, TokenLoss
from ropepp_lit.train.optimizer import AdamW, Muon
from ropepp_lit.train.schedule import Cosine
from ropepp_lit.train.throughput import Throughput

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


def test_tokens_have_equal_weight_in_micro_batches(train):
    full_batch, _ = train(batch_size=4, gradient_clip_val=0.5)
    parts, _ = train(batch_size=1, accumulate_grad_batches=4, gradient_clip_val=0.5)
    for one, other in zip(full_batch.decoder.parameters(), parts.decoder.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    assert full_batch.tokens_seen == parts.tokens_seen == 4 * 4 * 64


def test_gradient_norm_is_logged_before_clipping(train):
    _, trainer = train(max_steps=1)
    norm = trainer.logged_metrics["gradient_norm"].item()
    _, clipped = train(max_steps=1, gradient_clip_val=norm / 2)
    assert clipped.logged_metrics["gradient_norm"].item() == pytest.approx(norm)


def test_utilization_counts_visible_pairs(train, monkeypatch):
    monkeypatch.setattr(throughput, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    read = []
    monkeypatch.setattr(Throughput, "add", lambda self, tokens, pairs: read.append((self, tokens, pairs)))
    model, _ = train(max_steps=2)
    for _, tokens, pairs in read:
        assert tokens == 2 * 64
        assert tokens < pairs <= 2 * 64 * 65 // 2
    clock = read[-1][0]
    monkeypatch.undo()
    clock.add(1000, 5000)
    figures = clock.read()
    flops = training_flops(model.config, model.decoder.head_layout, tokens=1000, pairs=5000)
    utilization = figures["tokens_per_second"] / 1000 * flops / 989e12
    assert figures["model_flops_utilization"] == pytest.approx(utilization)
    assert "model_flops_utilization" not in train(max_steps=1)[1].logged_metrics


def test_the_clock_resumes_after_an_exception():
    clock = Throughput(CONFIG, RoPEPP().head_layout(num_attention_heads=4, num_key_value_heads=2, head_dim=16), 1)

    def fail():
        with clock.paused():
            time.sleep(0.2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.add(1000, 0)
    assert clock.read()["tokens_per_second"] > 1000 / 0.15


class HostReads(TorchDispatchMode):
    """Record stack traces of reads of tensor values, such as by `item`, `float` or `tolist`."""

    def __init__(self):
        super().__init__()
        self.stacks = []

    def __enter__(self):
        self.patch = patch.object(
            torch.Tensor, "tolist", lambda tensor: [value.item() for value in tensor]
        )  # on a CPU it bypasses the dispatcher
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.stop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.stacks.append("".join(traceback.format_stack(limit=12)))
        return func(*args, **(kwargs or {}))


class WatchHostReads(Callback):
    """Record reads from the device in each micro-batch, from the transfer of its batch to that of the next one."""

    def __init__(self):
        self.counts, self.mode = [], None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.counts.append(self.mode.stacks)
        self.mode = HostReads().__enter__()

    def on_train_end(self, trainer, module):
        self.mode.__exit__(None, None, None)


def test_only_logging_synchronizes_with_the_device(train, monkeypatch):
    # On a CPU attention reads the lengths of documents, and ids are checked; on a GPU neither happens.
    monkeypatch.setattr(Decoder, "_check_ids", lambda self, input_ids: None)
    monkeypatch.setattr(kernels, "attend_packed", lambda q, k, v, segments, **_: q)
    watch = WatchHostReads()
    train(max_steps=6, accumulate_grad_batches=2, log_every_n_steps=3, gradient_clip_val=1.0, callbacks=[watch])
    # Batches are created on the CPU, before they are copied.
    reads = [[stack for stack in stacks if "collate" not in stack] for stacks in watch.counts]
    assert [len(stacks) > 0 for stacks in reads] == [False] * 5 + [True] + [False] * 5, reads
    assert len(reads[5]) == 2


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.01), Muon(lr=0.01)])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_scaled_gradients_are_unscaled_before_clipping(train, optimizer, algorithm):
    # Fused AdamW unscales in its step, too late for clipping; Lightning unscales Muon's gradients.
    runs = []
    for scale in (None, 2.0**10):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        precision = MixedPrecision("bf16-mixed", "cpu", scaler=None)
        precision.scaler = scaler
        model, trainer = train(
            precision=None, plugins=[precision], optimizer=optimizer, max_steps=3, gradient_clip_val=0.05,
            gradient_clip_algorithm=algorithm,
        )  # fmt: skip
        runs.append((trainer.logged_metrics["gradient_norm"].item(), model.state_dict()))
    (plain_norm, plain), (scaled_norm, scaled) = runs
    assert scaled_norm == pytest.approx(plain_norm, rel=1e-2)
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, atol=2e-3, rtol=0)


def test_tokens_are_logged_exactly(train, tmp_path):
    class ManyTokens(Callback):
        def on_train_start(self, trainer, module):
            module.tokens_seen = 2**24 + 1

    train(max_steps=1, callbacks=[ManyTokens()], logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("tokens_seen")
    assert tensor_util.make_ndarray(event.tensor_proto).item() == 2**24 + 1 + 2 * 64
    assert {"train/loss", "gradient_norm", "tokens_per_second", "lr"} <= set(events.Tags()["scalars"])


class NormAtStep(Callback):
    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.decoder.parameters() if p.grad is not None]
        if gradients:
            self.norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()


@pytest.mark.parametrize("metric", [TokenLoss, PairLoss])
def test_a_checkpoint_stores_sums_exactly(metric):
    one, other = metric(), metric()
    for value in one.states.values():
        value += 1 / 3 if value.is_floating_point() else 2**40 + 1
    other.add_sums({name: value.tolist() for name, value in one.states.items()})
    assert all(torch.equal(other.states[name], value) for name, value in one.states.items())


def test_gradients_are_clipped_by_norm(train):
    watch = NormAtStep()
    train(max_steps=2, gradient_clip_val=0.01, callbacks=[watch])
    assert watch.norm == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_follows_the_schedule(train):
    schedule = Cosine(warmup_steps=1, total_steps=10)
    _, trainer = train(optimizer=AdamW(lr=0.5), schedule=schedule, max_steps=5)
    # The value logged at step 5 is that of step 6.
    assert trainer.logged_metrics["lr"] == pytest.approx(0.5 * schedule.factor(5, 10))


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-true", "bf16-mixed"])
def test_validation_metrics_equal_a_reference_loop(train, precision):
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
    assert figures["tokens"] == count == tokens.predicted(documents_apart=data.intra_document_masking)
    assert figures["loss"] == pytest.approx(total / count, rel=tolerance)
    assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=10 * tolerance)
    bits = total / math.log(2) / data.manifest.splits["validation"].bytes
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=tolerance)


def test_sampling_does_not_change_the_random_state_of_training(train):
    plain, _ = train(val_check_interval=1)
    state = torch.random.get_rng_state()
    sampled, _ = train(val_check_interval=1, callbacks=[TextSample(max_new_tokens=5)])
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(plain.decoder.parameters(), sampled.decoder.parameters(), strict=True):
        assert torch.equal(one, other)
