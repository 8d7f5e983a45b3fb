"""Pairs of a chosen and a rejected answer: parsed from all row formats, stored in shards, and packed into rows."""

import itertools

import numpy as np
import pytest
import torch
from chat_templates import make_chat_folder
from conversation_stores import write
from marked import answer_pairs, trained_pairs, write_marked
from transformers import AutoTokenizer

from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.report import highlight_trained
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.data.trained_tokens import join_pair, mark, split_pair, token_ids
from ropepp_lit.data.verify import verify
from ropepp_lit.errors import UsageError
from ropepp_lit.nn.context_parallel import ContextShard
from ropepp_lit.text.conversations import PAIR_COLUMNS, RowError, parse_conversation_pair
from ropepp_lit.text.tokenizer import load_tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


PROMPT, GOOD, BAD = [user("Hi")], [assistant("Good")], [assistant("Bad")]
TALK = [user("Hi"), assistant("Hello"), user("And?")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}, PROMPT),
        ({"prompt": "Hi", "chosen": "Good", "rejected": "Bad"}, PROMPT),
        ({"prompt": "Hi", "chosen": GOOD, "rejected": BAD}, PROMPT),
        ({"prompt": PROMPT, "chosen": "Good", "rejected": BAD}, PROMPT),
        ({"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}, PROMPT),
        ({"prompt": None, "chosen": TALK + GOOD, "rejected": TALK + BAD}, TALK),
        ({"prompt": "Hi", "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}, PROMPT),
        ({"prompt": PROMPT, "chosen": TALK + GOOD, "rejected": TALK + BAD}, TALK),
        ({"prompt": TALK, "chosen": GOOD, "rejected": BAD}, TALK),
        (
            {"system": "Be brief.", "prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
            [{"role": "system", "content": "Be brief."}, *PROMPT],
        ),
    ],
)
def test_parsing_rows(row, prompt):
    chosen, rejected = parse_conversation_pair(row, PAIR_COLUMNS)
    assert (chosen.messages, rejected.messages) == (prompt + GOOD, prompt + BAD)
    assert chosen.prompt_messages == rejected.prompt_messages == len(prompt)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": PROMPT, "chosen": GOOD}, "no key 'rejected'"),
        ({"prompt": PROMPT, "chosen": GOOD, "rejected": GOOD}, "chosen and rejected are the same"),
        ({"chosen": PROMPT + GOOD, "rejected": [user("Other"), *BAD]}, "no prompt"),
        ({"chosen": GOOD, "rejected": BAD}, "no prompt"),
        ({"chosen": PROMPT + GOOD, "rejected": PROMPT}, "no answer in rejected"),
        ({"prompt": PROMPT, "chosen": "", "rejected": BAD}, "an empty answer"),
        ({"prompt": 3, "chosen": GOOD, "rejected": BAD}, "prompt is not a list of messages"),
        ({"prompt": PROMPT, "chosen": [{"content": "a"}], "rejected": BAD}, "a message without a role"),
    ],
)
def test_invalid_rows(row, problem):
    with pytest.raises(RowError, match=problem):
        parse_conversation_pair(row, PAIR_COLUMNS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_folder("reasoning", tmp_path_factory.mktemp("model") / "qwen")


def run(rows, folder, model, **options):
    settings = PrepareSettings(**{"tokenizer": str(model), "format": "chat_pairs", **options})
    return prepare([write(folder, rows)], settings, out=folder / "out", show_progress=False)


def stored(folder, split="train"):
    tokens, offsets = TokenShards(folder, Manifest.read(folder), split).open_chunk(0)
    return np.split(tokens, (offsets[1:-1].astype(np.int64) - offsets[0]) // 4)


def test_stored_tokens(model, tmp_path):
    rows = [{"prompt": TALK, "chosen": f"Good {n} 🙂", "rejected": "Bad " * (n % 4 + 1)} for n in range(40)]
    manifest = run([*rows, {"prompt": TALK, "chosen": "a", "rejected": "a"}], tmp_path, model, on_error="skip",
                   validation_fraction=0.2)  # fmt: skip
    assert manifest.holds_pairs
    assert manifest.skipped == {"chosen and rejected are the same": 1}
    assert sum(split.documents for split in manifest.splits.values()) == 40
    tokenizer, kept = AutoTokenizer.from_pretrained(model), stored(tmp_path / "out")
    expected = {
        tuple(token for name in ("chosen", "rejected") for token in tokenizer.apply_chat_template(
            [*row["prompt"], assistant(row[name])], return_dict=False))
        for row in rows
    }  # fmt: skip
    assert {tuple(token_ids(one)) for one in kept} < expected
    (first,) = (one for one in kept if "Good 0 " in highlight_trained(one, load_tokenizer(str(model))))
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
    head += "<|im_start|>assistant\n"
    assert highlight_trained(first, load_tokenizer(str(model))) == (
        f"{head}[[<think>\n\n</think>\n\nGood 0 🙂<|im_end|>]]\n\n--- rejected ---\n"
        f"{head}[[<think>\n\n</think>\n\nBad <|im_end|>]]\n"
    )
    documents = list(TokenShards(tmp_path / "out", manifest, "train").documents())
    assert all(np.array_equal(one, token_ids(split_pair(pair)[0])) for one, pair in zip(documents, kept, strict=True))
    assert verify(tmp_path / "out") == []


def test_completions(model, tmp_path):
    rows = [{"q": "2 + 2 =", "good": " 4", "bad": " 5<|im_end|>"}]
    run(rows, tmp_path, model, format="completion_pairs", text_key="q,good,bad")
    (pair,) = stored(tmp_path / "out")
    assert highlight_trained(pair, load_tokenizer(str(model))) == (
        "2 + 2 =[[ 4<|endoftext|>]]\n--- rejected ---\n2 + 2 =[[ 5<|im_end|><|endoftext|>]]"
    )
    for options, message in (
        ({"text_key": "q,good"}, "text_key: q,good: for --format completion_pairs pass the keys of prompt, chosen and"),
        ({"train_on": "all"}, "train_on: all is not valid with --format completion_pairs"),
        ({"format": "chat_pairs", "train_on": "all"}, "train_on: all is not valid with --format chat_pairs"),
        ({"text_key": "q,good,other"}, "rows.jsonl:1: no key 'other'"),
        ({"text_key": "q,good,good"}, "rows.jsonl:1: good and good are the same"),
    ):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=message):
            run(rows, other, model, **{"format": "completion_pairs", "text_key": "q,good,bad", **options})


def test_join_and_split_pairs_with_any_token_ids():
    for last in (0, 2**30 - 1):
        ids = np.array([last, 5, last])
        pair = join_pair(mark(ids, ids == 5), mark(ids, np.array([False, True, True])))
        assert pair.dtype == np.int32
        assert token_ids(pair).tolist() == [*ids, *ids]
        assert [len(part) for part in split_pair(pair)] == [3, 3]


TRAIN, HELD_OUT = answer_pairs(150), answer_pairs(30, seed=1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_marked(tmp_path_factory.mktemp("marked") / "pairs", train=TRAIN, validation=HELD_OUT)


def pair_key(pair):
    return tuple(trained_pairs(*answer) for answer in pair)


def batch_pairs(batch):
    """Return the pairs of a batch by their keys, each in the form of :func:`pair_key`."""
    bounds, answers = batch.documents.cu_seqlens.tolist(), []
    inputs, labels = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist()
    for start, end in itertools.pairwise(bounds):
        positions = [position for position in range(start, end) if labels[position] != -100]
        if positions:
            trained = tuple((position - start + 1, labels[position]) for position in positions)
            answers.append((tuple(inputs[start : start + trained[-1][0]]), trained))
    assert batch.pairs.num_tokens.flatten().tolist() == [len(trained) for _, trained in answers]
    assert batch.pairs.lengths.tolist() == [len(trained) for _, trained in answers]
    return dict(zip(batch.pairs.keys, zip(answers[::2], answers[1::2], strict=True), strict=True))


@pytest.mark.parametrize("context", [30, 31, 97])
def test_every_pair_is_complete_and_read_once_per_pass(pairs, context):
    data = TokenData(source=str(pairs), context_length=context, batch_size=3)
    data.setup("fit")
    fitting = [pair for pair in TRAIN if sum(len(ids) for ids, _ in pair) <= context + 1]
    assert len(fitting) < len(TRAIN) or context == 97
    rows, keys, seen = len(data.train_samples), [], {}
    for epoch in range(2):
        read = []
        for first in range(epoch * rows, (epoch + 1) * rows):
            batch = data.train_samples.collate(data.train_samples.__getitems__([first]))
            assert batch.pairs.num_counted == len(batch.pairs.keys)
            by_key = batch_pairs(batch)
            read += by_key.values()
            assert all(seen.setdefault(key, pair) == pair for key, pair in by_key.items())
        keys.append(sorted(seen))
        assert sorted(read) == sorted(pair_key(pair) for pair in fitting)
    assert keys[0] == keys[1]
    assert len(keys[0]) == len(fitting)
    if len(fitting) < len(TRAIN):
        line = f"{len(TRAIN) - len(fitting)} of 150 pairs of answers are longer than data.context_length {context}"
        assert any(line in notice and "data.too_long" not in notice for notice in data.notices)


def test_ranks_that_share_rows_count_each_pair_once(pairs):
    data = TokenData(source=str(pairs), context_length=80, batch_size=2)
    data.setup("fit")
    samples = data.train_samples
    for first in range(0, 20, 2):
        full = samples.collate(samples.__getitems__([first, first + 1]))
        for mode in ("heads", "gather"):
            shards = [ContextShard(2, rank, mode) for rank in (0, 1)]
            parts = [samples.collate(samples.__getitems__([first, first + 1]), shard=shard) for shard in shards]
            assert all(part.pairs.keys == full.pairs.keys for part in parts)
            assert all(torch.equal(part.pairs.num_tokens, full.pairs.num_tokens) for part in parts)
            assert torch.equal(sum(part.pairs.lengths for part in parts), full.pairs.lengths)
            assert sum(part.pairs.is_counted.int() for part in parts).tolist() == [1] * len(full.pairs.keys)
            assert sum(part.pairs.num_counted for part in parts) == full.pairs.num_counted


def test_incomplete_pairs_are_refused(pairs):
    """An untrusted manifest can claim that any documents are pairs."""
    data = TokenData(source=str(pairs), context_length=80, batch_size=1)
    data.setup("fit")
    tokens, starts = data.train_samples.__getitems__([0])
    second = int(starts[0].nonzero()[1])
    tokens[0, second : int(starts[0].nonzero()[2])] = ~0
    with pytest.raises(UsageError, match="data: a rejected answer does not follow each chosen one"):
        data.train_samples.collate((tokens, starts))


def test_incompatible_sets_are_refused(pairs, tmp_path):
    chats = write_marked(tmp_path / "chats", train=[answer for pair in TRAIN[:9] for answer in pair],
                         validation=[answer for pair in HELD_OUT[:9] for answer in pair])  # fmt: skip
    for options, message in (
        ({"source": {str(pairs): 1, str(chats): 1}}, "data: pairs contains pairs of answers and chats does not"),
        ({"source": {str(chats): 1, str(pairs): 1}}, "data: pairs contains pairs of answers and chats does not"),
        ({"validation": {"other": str(chats)}}, "data: pairs contains pairs of answers and other does not"),
        (
            {"context_length": 8},
            "all pairs of answers of train in .* are longer than 8 tokens; set it to [0-9]+ or more$",
        ),
        ({"too_long": "cut"}, "data.too_long: pairs contains pairs of answers, which cannot be compared"),
        ({"intra_document_masking": False}, "data.intra_document_masking: with false, conversations"),
    ):
        data = TokenData(**{"source": str(pairs), "context_length": 97, **options})
        with pytest.raises(UsageError, match=message):
            data.setup("fit")
