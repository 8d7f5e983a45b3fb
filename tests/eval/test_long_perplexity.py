"""LongPPL: key tokens and measurements."""

import dataclasses

import numpy as np
import pytest
import torch

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import load_model
from ropepp_lit.eval.tasks import EvaluationSettings, Request
from ropepp_lit.eval.tasks import long_perplexity as module
from ropepp_lit.eval.tasks.long_perplexity import LongPerplexity
from ropepp_lit.eval.tasks.perplexity import Perplexity, token_losses

TEXTS = ["Größe über alles: ä, ö, ü. " * 4, "A short text.", " ".join(str(n * n) for n in range(60))]
LONG, SHORT = 64, 16


@pytest.fixture(scope="module")
def models(small_checkpoints):
    return {
        name: load_model(f"{name}={path}", dtype=torch.float64, device=torch.device("cpu"))
        for name, path in small_checkpoints.items()
    }


def _request(model, length=LONG, lengths=(SHORT, 32, LONG), **fields):
    documents = [model.tokenizer.encode_whole(text) for text in TEXTS]
    return Request(length=length, lengths=lengths, limit=3, texts=TEXTS, documents=documents, **fields)


@pytest.fixture
def task(small_checkpoints, models):
    return LongPerplexity(str(small_checkpoints["rope"]), "", load=lambda source, weights=True: models["rope"])


@torch.no_grad()
def _reference_loop(model, ids):
    """Return for each token after the first: nats with long and short context, and whether it counts."""
    actual = []
    for place in range(1, len(ids)):
        start = (place - 1) // LONG * LONG
        long = ids[start:place]
        # Windows of the short context start every quarter of it; the first that reaches the token predicts it.
        window_start = max(0, -(-(place - SHORT) // (SHORT // 4)) * (SHORT // 4))
        nats = [
            -float(model.decoder(torch.tensor([before]))[0, -1].log_softmax(-1)[ids[place]])
            for before in (long, ids[window_start:place])
        ]
        actual.append((*nats, len(long) > SHORT))
    return np.array(actual).reshape(-1, 3)


def test_key_tokens_match_a_reference_loop(models, task, monkeypatch):
    """A random model gains little from context, so the thresholds are lowered to have key tokens."""
    monkeypatch.setattr(module, "MIN_GAIN", 0.05)
    monkeypatch.setattr(module, "MAX_LOSS", 6.0)
    key_model, other = models["rope"], models["ec"]
    request = _request(other)
    keys, sums, gains, counts = [], [], [], []
    for ids in request.documents:
        long, short, counting = _reference_loop(key_model, ids).T
        keys.append((short - long > 0.05) & (long < 6.0) & (counting > 0))
        long, short, _ = _reference_loop(other, ids).T
        sums.append(long[keys[-1]].sum())
        gains.append((short - long)[counting > 0].sum())
        counts.append(counting.sum())
    assert 10 < sum(map(np.sum, keys)) < 0.9 * sum(counts)
    perplexity, loss, share, gain, *by_position = task.measure(other, request)
    assert loss.numerators == pytest.approx(sums)
    assert loss.denominators == share.numerators == [key.sum() for key in keys]
    assert perplexity.value == pytest.approx(np.exp(sum(sums) / sum(map(np.sum, keys))))
    assert share.denominators == gain.denominators == pytest.approx(counts)
    assert gain.numerators == pytest.approx(gains)
    assert [item.position for item in by_position] == list(range(SHORT, LONG, LONG // 16))
    assert sum(sum(item.numerators) for item in by_position) == pytest.approx(sum(gains))
    # The key tokens do not depend on the order of the models.
    again = dataclasses.replace(request, documents=_request(key_model).documents)
    loaded = []

    def load_once(source, weights=True):
        assert not weights, "it is the model that is measured"
        return loaded.append(source) or key_model

    fresh = LongPerplexity(task.source, "", load=load_once)
    assert fresh.measure(key_model, again)[2].numerators == share.numerators
    assert fresh.measure(other, request)[1].numerators == pytest.approx(sums)
    assert loaded == [task.source]


def test_long_windows_match_perplexity(models):
    model = models["ec"]
    request = _request(model)
    nats = token_losses(model, request.documents, length=LONG, stride=LONG)
    assert [losses.sum() for losses in nats] == pytest.approx(Perplexity().measure(model, request)[0].numerators)


def test_the_shortest_length_has_no_value(models, task):
    (nothing,) = task.measure(models["ec"], _request(models["ec"], length=SHORT))
    assert nothing.denominators == [0, 0, 0]


def test_missing_key_tokens_are_reported(models, task, capsys):
    actual = task.measure(models["rope"], _request(models["rope"]))
    assert not any(actual[0].denominators)
    assert actual[2].value == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(" finds no key tokens among 285 at 64 tokens, so longppl has no value")


def test_invalid_settings(models, task, small_checkpoints):
    model = models["ec"]
    task.check(model, _request(model))
    with pytest.raises(UsageError, match="longppl compares longer contexts with the shortest of lengths; give two"):
        task.check(model, _request(model, lengths=(LONG, LONG)))
    with pytest.raises(UsageError, match="longppl needs documents of more than 400 tokens, the shortest of lengths"):
        task.check(model, _request(model, lengths=(400, 800)))
    request = _request(model)
    other = [[0, *ids] for ids in request.documents]
    with pytest.raises(UsageError, match=r"of ec and .*, which finds the key tokens, encode the texts differently"):
        task.check(model, dataclasses.replace(request, documents=other))


def test_the_first_or_a_given_checkpoint_identifies_the_key_tokens():
    settings = EvaluationSettings(tasks=("longppl", "longppl:other.ckpt"), lengths=(16, 32), checkpoint="first.ckpt")
    assert [(task.source, str(task)) for task, _ in settings.parsed] == [
        ("first.ckpt", "longppl"), ("other.ckpt", "longppl:other.ckpt"),
    ]  # fmt: skip
