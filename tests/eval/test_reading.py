"""Associative recall and induction: texts, targets and predictions."""

import itertools
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from others import make_tokenizer
from tokenizers import Tokenizer, models

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model, load_model
from ropepp_lit.eval.reading import reading_documents
from ropepp_lit.eval.tasks import reading
from ropepp_lit.eval.tasks.base import Request
from ropepp_lit.eval.tasks.reading import MAX_PAIRS, RUN, Induction, Recall, induction_draft, recall_draft, recalls
from ropepp_lit.eval.tasks.stock import WORDS
from ropepp_lit.text.tokenizer import TextTokenizer, byte_tokenizer, load_tokenizer, train_tokenizer

TASKS = {"recall:4": Recall(4), "recall:16": Recall(16), "induction": Induction()}


@pytest.fixture(scope="module", params=["bytes", "bpe", "chat", "llama2"])
def tokenizer(request, tmp_path_factory):
    """Tokenizers; the chat tokenizer has truncation to 64 tokens, Llama 2's prepends a space to every text."""
    if request.param == "bytes":
        return byte_tokenizer()
    if request.param == "bpe":
        documents = reading_documents(["recall", "induction"], words=(20, 200), seed=3)
        return train_tokenizer(itertools.islice(documents, 100), vocab_size=600)
    folder = tmp_path_factory.mktemp(request.param)
    make_tokenizer(request.param, folder)
    return load_tokenizer(str(folder))


def _request(length, limit=8, **fields):
    return Request(length=length, lengths=(length,), limit=limit, **fields)


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_texts_have_the_exact_length_and_repeat_their_targets(tokenizer, task):
    rows = task.rows(tokenizer, length=1200, numbers=range(4), seed=0)
    assert rows == task.rows(tokenizer, length=1200, numbers=range(4), seed=0)
    assert rows[0] != task.rows(tokenizer, length=1200, numbers=[0], seed=1)[0]
    for row in rows:
        assert len(row.input_ids) == 1200 + 1
        assert tuple(row.input_ids[: len(tokenizer.opening)]) == tokenizer.opening
        text = tokenizer.decode(row.input_ids)
        for start, end, distance in row.words:
            word = tokenizer.decode(row.input_ids[start:end]).strip(" .")
            assert word in WORDS
            assert tokenizer.decode(row.input_ids[start - distance : end - distance]).strip(" .") == word
            before = tokenizer.decode(row.input_ids[:start]).split()[-1].replace("?", "[:?]")
            assert len(re.findall(rf"\b{before} {word}\b", text)) == 2
            assert len(re.findall(rf"\b{before} ", text)) == 2
    if isinstance(task, Recall):
        assert {len(row.words) for row in rows} == {task.pairs}


def test_distances_cover_the_full_text():
    """Each doubling of the distance has about the same number of predictions, up to the full length."""
    for task in TASKS.values():
        rows = task.rows(byte_tokenizer(), length=3000, numbers=range(50), seed=0)
        distances = [distance for row in rows for _, _, distance in row.words]
        actual, _ = np.histogram(np.log2(distances), bins=np.log2(3000) - [4, 3, 2, 1, 0])
        assert actual.min() > 0.6 * actual.max() > 20
        assert max(distances) > 2600


class _Reader:
    """Model that predicts the token after the last earlier occurrence of the longest suffix of up to 16 tokens.

    Question marks are treated as colons.
    """

    def __init__(self, tokenizer):
        self.question, self.colon = (tokenizer.encode_text(f"a{mark}")[-1] for mark in "?:")
        self.vocab_size = tokenizer.vocab_size
        self.lm_head = torch.nn.Identity()
        self.lm_head.weight = torch.zeros(self.vocab_size, 1)

    def hidden_states(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.masked_fill(input_ids == self.question, self.colon).tolist()):
            seen = {}
            for place in range(len(ids)):
                ends = [tuple(ids[max(0, place + 1 - size) : place + 1]) for size in range(16, 0, -1)]
                logits[row, place, next((seen[end] for end in ends if end in seen), 0)] = 20
                if place + 1 < len(ids):
                    seen |= dict.fromkeys(ends, ids[place + 1])
        return logits


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_a_copier_predicts_everything(tokenizer, task, monkeypatch):
    monkeypatch.setattr(Model, "device", torch.device("cpu"))
    model = Model(name="copier", path="", decoder=_Reader(tokenizer), tokenizer=tokenizer, fingerprint="")
    task.check(model, _request(1200, limit=2))
    if "<0x00>" in tokenizer.tokenizer.get_vocab() and isinstance(task, Recall):
        return  # of ": " it makes one token, of "? " two
    score, loss, *by_distance = task.measure(model, _request(1200, limit=2))
    assert (score.metric, loss.metric) == ("score", "loss")
    if "<0x00>" in tokenizer.tokenizer.get_vocab():  # Llama 2's tokens may hold the end of a word and the next space
        assert score.value > 90
        return
    assert (score.value, loss.value) == (100, pytest.approx(0, abs=1e-4))
    scores = [item for item in by_distance if item.metric == "score"]
    assert [item.position for item in scores] == sorted({item.position for item in scores})
    assert sum(sum(item.denominators) for item in scores) == sum(score.denominators)
    assert {item.value for item in scores} == {100}


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_a_random_model_scores_0_with_and_without_chunks(small_checkpoints, task):
    model = load_model(str(small_checkpoints["ec"]), dtype=torch.float64, device=torch.device("cpu"))
    score, loss, *_ = actual = task.measure(model, _request(600, limit=4))
    assert score.value < 2
    assert 4 < loss.value < 9
    again = task.measure(model, _request(600, limit=4, chunk_tokens=97))
    for one, other in zip(actual, again, strict=True):
        assert one.numerators == pytest.approx(other.numerators)
    # Reference: a loop over the logits of the model.
    (row, *_) = task.rows(model.tokenizer, length=600, numbers=range(4), seed=0)
    logits = model.decoder(torch.tensor([row.input_ids]))[0].log_softmax(-1)
    nats = -sum(logits[place - 1, row.input_ids[place]] for start, end, _ in row.words for place in range(start, end))
    assert loss.numerators[0] == pytest.approx(float(nats.detach()))
    assert loss.denominators[0] == sum(end - start for start, end, _ in row.words)


def test_tokenizers_that_merge_words_are_rejected():
    tokenizer = TextTokenizer(tokenizer=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")), eos_token_id=0)
    with pytest.raises(UsageError, match="recall:4: this tokenizer maps different words to the same tokens"):
        TASKS["recall:4"].check(SimpleNamespace(tokenizer=tokenizer), _request(512))


def test_short_lengths_and_invalid_numbers_are_rejected():
    for task in TASKS.values():
        with pytest.raises(UsageError, match=f"60 tokens are too few for {task} .*; give [0-9]+ or") as refused:
            task.check(SimpleNamespace(tokenizer=byte_tokenizer()), _request(60))
        least = int(str(refused.value).split("give ")[1].split()[0])
        assert len(task.rows(byte_tokenizer(), length=least, numbers=range(8), seed=0)) == 8
    assert [str(task) for part in ("", "2+300"[:1], "1+64") for task in recalls(part)] == [
        "recall:4", "recall:16", "recall:2", "recall:1", "recall:64",
    ]  # fmt: skip
    for part in ("0", "x", "4+", f"{MAX_PAIRS + 1}"):
        with pytest.raises(UsageError, match=re.escape(f"recall:{part}: give numbers of pairs from 1 to {MAX_PAIRS}")):
            recalls(part)


def test_training_documents_differ_from_evaluation_texts():
    kinds = ("recall", "induction", "pairs")
    documents = list(itertools.islice(reading_documents(kinds, words=(8, 200), seed=0), 100))
    assert len(set(documents)) == 100
    assert documents == list(itertools.islice(reading_documents(kinds, words=(8, 200), seed=0), 100))
    assert documents[0] != next(reading_documents(kinds, words=(8, 200), seed=1))
    recall, induction, pairs = documents[::3], documents[1::3], documents[2::3]
    pairs_by_text = [re.findall(r"\w+: \w+\.", text) for text in recall]
    for text in recall + pairs:
        queried = [question.replace("?", ":") for question in re.findall(r"\w+\? \w+\.", text)]
        assert sorted(queried) == sorted(re.findall(r"\w+: \w+\.", text)) != []
    assert 40 < max(text.count("?") for text in pairs) < 50  # of 200 words
    _, copies = recall_draft(random.Random("0/recall:200/0"), pairs=MAX_PAIRS, units=100)
    assert len({pair for pairs in pairs_by_text for pair in pairs}) > 150
    assert len({copy.first for copy in copies} & {pair for pairs in pairs_by_text for pair in pairs}) < 20  # of 68 * 67
    assert {word for text in induction for word in text.split()} <= set(WORDS)
    _, copies = induction_draft(random.Random(0), units=10_000)
    assert len(copies) == reading.MAX_RUNS
    assert len({word for copy in copies for word in copy.first.split()}) == reading.MAX_RUNS * RUN < len(WORDS)
