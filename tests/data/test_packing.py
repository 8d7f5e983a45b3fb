"""Packing of conversations: complete, once per pass, independent of ranks, workers and the resumed position."""

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from marked import conversations, found_pairs, trained_pairs, write_marked

from ropepp_lit.data.comparison import CHAT_TEMPLATE, compare, continued_at
from ropepp_lit.data.conversations import merge_settings
from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.packing import Lengths, PackedPlan
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.data.verify import verify
from ropepp_lit.errors import UsageError
from ropepp_lit.files import checksum
from ropepp_lit.nn.context_parallel import ContextShard

TRAIN, HELD_OUT = conversations(150), conversations(31, seed=1)
CONTEXT = 64


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_marked(tmp_path_factory.mktemp("marked") / "chats", train=TRAIN, validation=HELD_OUT)


def open_data(source, *, max_steps=10, replicas=1, rank=0, **settings):
    settings = {"context_length": CONTEXT, "batch_size": 4, **settings}
    data = TokenData(source=source if isinstance(source, dict) else str(source), **settings)
    sampling = {"num_replicas": replicas, "rank": rank}
    data.trainer = SimpleNamespace(max_steps=max_steps, accumulate_grad_batches=1, distributed_sampler_kwargs=sampling)
    data.setup("fit")
    return data


def test_passes_pack_different_conversations_together():
    lengths = Lengths([np.arange(400) * 20], [np.repeat([7, 9, 11, 13], 100)], 7, 13, 0, 0)
    plan = PackedPlan(lengths, row_length=40, seed=0)
    count = plan.samples_per_pass
    first, second = ({frozenset(plan.locate(k + epoch * count)) for k in range(count)} for epoch in range(2))
    assert len(first & second) < count / 10


def test_the_order_never_changes():
    # A change here makes running experiments read other data after they resume.
    kept = [np.array([3, 9, 4, 5, 3, 6]), np.array([9, 2, 2, 7])]
    lengths = Lengths([np.arange(len(each)) * 9 for each in kept], kept, 2, 9, 0, 0)
    plan = PackedPlan(lengths, row_length=9, seed=3)
    rows = [[tuple(span) for span in plan.locate(k)] for k in range(plan.samples_per_pass)]
    assert rows == [
        [(1, 0, 9)],
        [(0, 45, 6), (0, 36, 3)],
        [(0, 27, 5), (0, 18, 4)],
        [(1, 27, 7), (1, 9, 2)],
        [(0, 9, 9)],
        [(1, 18, 2)],
        [(0, 0, 3)],
    ]


@pytest.mark.parametrize(("replicas", "num_workers"), [(1, 0), (2, 0), (3, 2)])
def test_every_trained_token_once_per_pass_for_any_ranks_and_workers(chats, replicas, num_workers):
    """Starting in the middle of the first pass, one pass of samples reads everything once."""
    (plan,) = open_data(chats).train_samples.plans
    batches, rest = divmod(plan.samples_per_pass, replicas)
    loaders = [
        open_data(chats, batch_size=1, replicas=replicas, rank=rank, num_workers=num_workers, max_steps=batches + rest)
        .train_dataloader() for rank in range(replicas)
    ]  # fmt: skip
    rows = [list(loader) for loader in loaders]
    order = [batch for together in zip(*rows, strict=True) for batch in together][: plan.samples_per_pass]
    found = Counter(pairs for batch in order for pairs in found_pairs(batch))
    assert found == Counter(trained_pairs(*document) for document in TRAIN)
    alone = open_data(chats, batch_size=3, max_steps=99).train_dataloader()
    alone.load_state_dict({"samples": 6, "identity": open_data(chats).identity})
    rows = [row for _, batch in zip(range(2), alone, strict=False) for row in batch.input_ids]
    assert torch.equal(torch.stack(rows), torch.cat([batch.input_ids for batch in order[6:12]]))


def test_labels_are_the_trained_tokens_and_padding_costs_little(chats):
    data = open_data(chats, batch_size=8)
    (loader,) = data.val_dataloader()
    found = Counter()
    for batch in loader:
        found.update(found_pairs(batch))
        assert batch.num_labels == int((batch.labels != -100).sum())
        assert torch.equal(batch.places, (batch.labels != -100).flatten().nonzero().flatten())
        starts = batch.documents.positions == 0
        assert (batch.labels[:, :-1][starts[:, 1:]] == -100).all()  # no label in another document
    assert found == Counter(trained_pairs(*document) for document in HELD_OUT)
    ends = sum(int((batch.labels == 0).sum()) for batch in data.val_dataloader()[0])
    assert ends == sum(int((ids[trained] == 0).sum()) for ids, trained in HELD_OUT)  # padding is not trained
    wide = open_data(chats, context_length=8192, batch_size=2)
    (batch,) = wide.val_dataloader()[0]
    assert batch.documents.longest <= 128
    assert batch.visible_pairs < 0.02 * 2 * 8192**2 / 2


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_conversations_longer_than_a_row(chats, too_long):
    data = open_data(chats, context_length=12, too_long=too_long)
    row_length = 13
    long = [document for document in TRAIN if len(document[0]) > row_length]
    short = [document for document in TRAIN if len(document[0]) <= row_length]
    kept = [pairs for document in long if (pairs := trained_pairs(*document, row_length))] if too_long == "cut" else []
    (plan,) = data.train_samples.plans
    assert plan.documents == len(short) + len(kept)
    rows = [data.train_samples.collate(data.train_samples.__getitems__([k])) for k in range(plan.samples_per_pass)]
    found = Counter(pairs for batch in rows for pairs in found_pairs(batch))
    assert found == Counter([*kept, *(trained_pairs(*document) for document in short)])
    line = next(line for line in data.notices if line.startswith("data: train in"))
    longest = max(len(ids) for ids, _ in TRAIN)
    expected = f"{len(long)} of 150 conversations are longer than data.context_length 12 (the longest has {longest} tok"
    assert expected in line
    if too_long == "cut":
        assert f"cut to their beginnings; {len(long) - len(kept)} of them keep no trained token and are left" in line
        assert len(long) > len(kept)
    else:
        assert line.endswith("left out; data.too_long cut keeps their beginnings")


def test_invalid_settings_and_sets(chats, texts, tmp_path):
    with pytest.raises(
        UsageError, match=r"data\.intra_document_masking: with false, .* and chats contains conversations"
    ):
        open_data(chats, intra_document_masking=False)
    shortest = min(len(ids) for ids, _ in TRAIN)
    with pytest.raises(
        UsageError,
        match=rf"data\.context_length: all conversations of train in .*chats are longer than 2 tokens; set it to "
        rf"{shortest - 1} or more, or data\.too_long to cut",
    ):
        open_data(chats, context_length=2)
    untrained = [(np.arange(30), np.arange(30) > 20)]
    late = write_marked(tmp_path / "late", train=untrained, validation=untrained)
    with pytest.raises(UsageError, match=r"no conversation of train in .*late has a trained token after truncation to"):
        open_data(late, context_length=10, too_long="cut")
    other = write_marked(tmp_path / "other", train=TRAIN[:9], validation=TRAIN[:9], template="other")
    with pytest.raises(UsageError, match=r"data\.source: other was rendered by a different chat template than chats"):
        open_data({str(chats): 1, str(other): 1})
    notes = open_data(chats, validation={"others": str(other)}).notices
    assert "Note: others was rendered by a different chat template than chats." in notes
    prepare([str(texts)], PrepareSettings(tokenizer="bytes"), out=tmp_path / "text", show_progress=False)
    mixed = open_data({str(chats): 1, str(tmp_path / "text"): 1})
    with pytest.raises(UsageError, match=r"model\.loss_average: conversations requires .* train in .*text is text;"):
        mixed.train_samples.average_conversations()


def test_a_mixture_with_text(chats, texts, tmp_path):
    """All tokens of text are trained, and marked ones of conversations; weights apply to rows."""
    out = tmp_path / "text"
    prepare([str(texts)], PrepareSettings(tokenizer="bytes"), out=out, show_progress=False)
    data = open_data({str(chats): 0.5, str(out): 0.5}, batch_size=10, max_steps=100)
    expected_conversations = {trained_pairs(*document) for document in TRAIN}
    packed = 0
    for batch in data.train_dataloader():
        for row in range(10):
            labels, starts = batch.labels[row], batch.documents.positions[row] == 0
            is_text = bool(((labels != -100) | torch.cat((starts[1:], torch.ones(1).bool()))).all())
            packed += not is_text
        assert set(found_pairs(batch)) & expected_conversations
    assert packed == 500
    assert data.bytes_per_token() is None
    assert data.bytes_per_token("chats") is None


def test_a_position_depends_on_too_long(chats):
    state = {**open_data(chats).train_dataloader().state_dict(), "samples": 12}
    assert continued_at(state, open_data(chats).identity) == (12, "")
    reason = "data.too_long is cut instead of drop"
    assert continued_at(state, open_data(chats, too_long="cut").identity) == (0, reason)


def test_weights_average_over_conversations(chats):
    data = open_data(chats, batch_size=2)
    data.train_samples.average_conversations()
    for first in range(0, 20, 2):
        samples = data.train_samples.__getitems__([first, first + 1])
        batch = data.train_samples.collate(samples)
        sums = [part.sum().item() for part in batch.weights.flatten().split(batch.documents.cu_seqlens.diff().tolist())]
        conversations = [total for total in sums if total]
        assert conversations == pytest.approx([1.0] * batch.num_documents)
        assert ((batch.weights > 0) == (batch.labels != -100)).all()
        parts = [data.train_samples.collate(samples, shard=ContextShard(2, rank, "gather")) for rank in (0, 1)]
        assert sum(part.num_documents for part in parts) == batch.num_documents
        assert sum(part.weights.sum() for part in parts) == pytest.approx(batch.weights.sum())


def test_held_out_documents_are_token_ids(chats):
    data = open_data(chats)
    found = list(data.held_out_documents("chats"))
    assert all(np.array_equal(one, ids) for one, (ids, _) in zip(found, HELD_OUT, strict=True))
    decode = data.text_tokenizer.decode
    assert set(data.held_out_texts(1000)["chats"]) <= {decode(ids.tolist()) for ids, _ in HELD_OUT}


def test_verify_counts_trained_tokens(tmp_path):
    folder = write_marked(tmp_path / "chats", train=TRAIN[:20], validation=HELD_OUT[:5])
    assert verify(folder) == []
    manifest = Manifest.read(folder)
    manifest.splits["train"].trained_tokens += 1
    manifest.write(folder)
    assert verify(folder) == [f"{folder}/manifest.json: the totals of train differ from its chunks"]
    path = folder / "train" / manifest.splits["train"].chunks[0].filename
    stored = np.fromfile(path, dtype=np.int32)
    tokens = stored[22 : 22 + len(TRAIN[0][0])]
    tokens[1:] = np.where(tokens[1:] >= 0, ~tokens[1:], tokens[1:])
    path.write_bytes(stored.tobytes())
    chunk = manifest.splits["train"].chunks[0]
    manifest.splits["train"].chunks[0] = dataclasses.replace(chunk, sha256=checksum(path))
    manifest.write(folder)
    assert verify(folder) == [f"{path}: 1 documents have no trained token after the first one"]


def test_merging_chat_settings_into_those_of_a_base_model(chats):
    entry = open_data(chats).entry
    base = {
        "tokenizer_config": json.dumps({"chat_template": "older", "pad_token": "<pad>"}),
        "generation_config": json.dumps({"eos_token_id": 7, "top_p": 0.9}),
    }
    merged = merge_settings({**base, "card": None}, entry)
    assert json.loads(merged["tokenizer_config"]) == {"chat_template": "{{ messages }}", "pad_token": "<pad>"}
    assert json.loads(merged["generation_config"]) == {"eos_token_id": [7, 1, 0], "top_p": 0.9}
    assert merged["card"] is None
    assert merge_settings(base, {}) == base
    stored = {"architecture": {}, "tokenizer_config": base["tokenizer_config"]}
    assert compare(stored, entry) == {CHAT_TEMPLATE: "other turns"}
    assert compare({**stored, "tokenizer_config": entry["tokenizer_config"]}, entry) == {}
    assert compare({**stored, "tokenizer_config": None}, entry) == {}
