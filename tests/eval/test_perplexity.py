"""Loss by length and position, compared with a reference loop over windows."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from ropepp_lit.eval.models import load_model
from ropepp_lit.eval.tasks import Request
from ropepp_lit.eval.tasks.perplexity import Perplexity, more_context, windows
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import open_checkpoint


@pytest.fixture
def load():
    return lambda path, dtype=torch.float64: load_model(str(path), dtype=dtype, device=torch.device("cpu"))


def measure(model, texts, *, length, **options):
    documents = [model.tokenizer.encode_whole(text) for text in texts]
    request = Request(length=length, lengths=(length,), limit=50, texts=texts, documents=documents, **options)
    with torch.no_grad():
        return Perplexity().measure(model, request)


def reference_loop(model, text, length, stride):
    """Compute nats and token counts with a separate forward pass for each window."""
    ids = torch.tensor([model.tokenizer.bos_token_id, *model.encode(text)])
    nats, tokens, done = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        window = ids[start : start + length + 1]
        if len(window) < 2:
            break
        losses = F.cross_entropy(model.decoder(window[None, :-1])[0], window[1:], reduction="none")
        new = losses[max(0, done - start) :]
        nats, tokens, done = nats + float(new.sum()), tokens + len(new), start + len(losses)
    return nats, tokens


@pytest.mark.parametrize("stride", [None, 7, 16])
@pytest.mark.parametrize("variant", ["rope", "eh", "ec"])
@torch.no_grad()
def test_loss_matches_a_reference_loop(small_checkpoints, documents, load, variant, stride):
    model = load(small_checkpoints[variant])
    for length in (16, 50, 1000):
        loss, perplexity, bits, *by_position = measure(model, documents, length=length, stride=stride)
        expected = [reference_loop(model, text, length, stride or length) for text in documents]
        assert loss.denominators == [tokens for _, tokens in expected]
        assert loss.denominators == [len(text.encode()) for text in documents]  # each byte is predicted once
        assert loss.numerators == pytest.approx([nats for nats, _ in expected], abs=1e-9)
        assert perplexity.value == pytest.approx(math.exp(loss.value))
        assert bits.value == pytest.approx(loss.value / math.log(2))
        assert [sum(item.numerators) for item in by_position] != []
        assert sum(sum(item.numerators) for item in by_position) == pytest.approx(sum(loss.numerators))
        assert sum(sum(item.denominators) for item in by_position) == sum(loss.denominators)
        assert [item.position for item in by_position] == sorted({item.position for item in by_position})


@pytest.mark.parametrize("variant", ["rope", "ec"])
def test_exports_and_chunks_have_the_same_loss(small_checkpoints, documents, load, tmp_path, variant):
    path = small_checkpoints[variant]
    export(open_checkpoint(path), tmp_path / "hf", dtype=None, max_shard_bytes=10**9, check=False)
    native, exported = (load(source, torch.float32) for source in (path, tmp_path / "hf"))
    overall = measure(native, documents, length=100)[0]
    for actual in (
        measure(exported, documents, length=100)[0],
        measure(native, documents, length=100, chunk_tokens=9)[0],
    ):
        assert actual.numerators == pytest.approx(overall.numerators, abs=1e-4)
        assert actual.denominators == overall.denominators


def test_windows_predict_each_token_once_within_their_length():
    choose = random.Random(0)
    for _ in range(200):
        totals = [choose.randint(1, 60) for _ in range(3)]
        length = choose.randint(1, 70)
        stride = choose.randint(1, length)
        predicted = [[] for _ in totals]
        for window in windows(totals, length=length, stride=stride):
            assert 0 <= window.start < window.first <= window.end < totals[window.document]
            assert window.end - window.start <= length
            predicted[window.document] += range(window.first, window.end + 1)
        assert predicted == [list(range(1, total)) for total in totals]


def test_overlapping_windows_have_more_context(small_checkpoints, documents, load):
    model = load(small_checkpoints["ec"])
    apart, overlapping = (measure(model, documents, length=32, stride=stride)[0] for stride in (32, 8))
    assert apart.denominators == overlapping.denominators
    assert apart.numerators[:2] == pytest.approx(overlapping.numerators[:2])  # documents of a single window
    assert abs(apart.numerators[-1] - overlapping.numerators[-1]) > 1e-3


def test_share_of_tokens_with_more_context():
    """With windows of 8 instead of 4 tokens, 4 of 9 predicted tokens have more context."""
    actual = more_context([10, 3, 1], length=8, before=4)
    assert actual.numerators == [4, 0, 0]
    assert actual.denominators == [9, 2, 0]
    assert actual.value == pytest.approx(100 * 4 / 11)
