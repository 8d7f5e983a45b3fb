"""Conversations and completions as shards: from every kind of row, in parts, after a stop, and what is reported."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from chat_templates import make_chat_folder
from conversation_stores import ROWS, STORES, messages, sharegpt, store, write
from corpora import contents

from ropepp_lit.data import encoders, preparation
from ropepp_lit.data.prepare import Settings, fingerprint_of, prepare
from ropepp_lit.data.report import shown
from ropepp_lit.data.shards import Manifest
from ropepp_lit.data.shares import Share, merge
from ropepp_lit.data.trained_tokens import is_trained, mark, token_ids
from ropepp_lit.errors import UsageError
from ropepp_lit.text.sources import find_files
from ropepp_lit.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a tokenizer with a chat template that knows tools."""
    return make_chat_folder("reasoning", tmp_path_factory.mktemp("model") / "qwen")


def run(source, out, model, **options):
    settings = Settings(**{"tokenizer": str(model), "format": "chat", **options})
    return prepare([source], settings, out=out, show_progress=False)


def documents(folder, split="train"):
    """The stored tokens of each document, by litdata's format: a count, offsets, tokens."""
    found = []
    for chunk in Manifest.read(folder).splits[split].chunks:
        data = (folder / split / chunk.filename).read_bytes()
        count = int(np.frombuffer(data, np.uint32, 1)[0])
        bounds = np.frombuffer(data, np.uint32, count + 1, offset=4)
        found += [np.frombuffer(data[a:b], np.int32) for a, b in itertools.pairwise(bounds)]
    return found


def texts(folder, model, split="train"):
    """Each document, decoded, with what is trained in brackets."""
    return [shown(stored, load_tokenizer(str(model))) for stored in documents(folder, split)]


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """The shards of the rows by what is trained, from JSON lines."""
    folder = tmp_path_factory.mktemp("reference")
    source = write(folder, messages(ROWS))
    for train_on in ("assistant", "last"):
        run(source, folder / train_on, model, train_on=train_on, validation_fraction=0.2)
    return folder


@pytest.mark.parametrize("kind", STORES)
def test_every_store_gives_the_same_shards(kind, model, reference, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    name, rows, options = STORES[kind]
    # Of prompt and completion the last answer alone is trained, whatever train_on is.
    trained = options.pop("train_on", "assistant") if kind == "prompt and completion" else "assistant"
    run(store(tmp_path, name, rows), tmp_path / "out", model, validation_fraction=0.2, **options)
    assert contents(tmp_path / "out") == contents(reference / trained)


def test_what_is_stored(model, reference):
    manifest = Manifest.read(reference / "assistant")
    tokenizer = load_tokenizer(str(model))
    assert (manifest.dtype, manifest.marks_trained_tokens) == ("int32", True)
    assert manifest.chat_template == tokenizer.settings["chat_template"]
    assert [tokenizer.token(token) for token in manifest.end_of_turn] == ["<|im_end|>"]
    for name, split in manifest.splits.items():
        stored = documents(reference / "assistant", name)
        assert split.documents == len(stored)
        assert split.trained_tokens == sum(is_trained(one).sum() for one in stored)
        assert split.max_token_id == max(token_ids(one).max() for one in stored) < manifest.vocab_size
        assert split.longest == max(map(len, stored))
        assert not any(is_trained(one[:1]).any() for one in stored)
    assert texts(reference / "last", model)[:2] == [
        "<|im_start|>user\nQuestion 0<|im_end|>\n<|im_start|>assistant\nAnswer 0 <|im_end|>\n<|im_start|>user\n"
        "And then?<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nThen 0.<|im_end|>]]\n",
        "<|im_start|>user\nQuestion 1<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\n"
        "Answer 1 and so on 🙂 <|im_end|>]]\n",
    ]


def test_tools_and_further_columns(model, tmp_path):
    """Keys that only one row has are null in the others of a table, and no template sees them."""
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "2", "reasoning_content": "The tool says 2."},
            ],
            "tools": json.dumps(tools),
            "system": "Be brief.",
            "chat_template_kwargs": None,
        },
        {"messages": ROWS[1], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    for name in ("rows.jsonl", "rows.parquet"):
        run(store(tmp_path, name, rows), tmp_path / name.partition(".")[2], model)
    assert contents(tmp_path / "jsonl") == contents(tmp_path / "parquet")
    assert texts(tmp_path / "jsonl", model) == [
        f"<|im_start|>system\nBe brief.\n\n# Tools\n{json.dumps(tools[0])}<|im_end|>\n"
        "<|im_start|>user\n1 + 1?<|im_end|>\n"
        '<|im_start|>assistant\n[[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\nThe tool says 2.\n</think>\n\n2<|im_end|>]]\n",
        "<|im_start|>user\nQuestion 1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "[[Answer 1 and so on 🙂 <|im_end|>]]\n",
    ]


def test_what_is_shown_in_a_terminal(model, monkeypatch):
    """In colour, without control characters that a text has, and no more than fits."""
    tokenizer = load_tokenizer(str(model))
    ids = np.array(tokenizer.encode_text("read\x1b[31m" + "written"), dtype=np.int32)
    stored = mark(ids, np.arange(len(ids)) >= len(tokenizer.encode_text("read\x1b[31m")))
    assert shown(stored, tokenizer) == "read\\x1b[31m[[written]]"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(stored, tokenizer) == "read\\x1b[31m\x1b[32mwritten\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    long = mark(np.full(5000, ids[0]), np.arange(5000) == 3000)
    assert shown(long, tokenizer).startswith("… ")
    assert shown(long, tokenizer).count("[[") == 1
    assert shown(long, tokenizer).endswith(" … (1,750 more tokens)")


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WRONG = {
    "no messages": (
        {"text": "a"},
        "no key 'messages' or 'conversations' or .*; name the key of the messages by text_key",
    ),
    "empty": ({"messages": []}, "messages has no messages"),
    "not a list": ({"messages": 3}, "messages is not a list of messages"),
    "broken JSON": ({"messages": "[{"}, "messages is broken JSON"),
    "a text": ({"messages": ["a"]}, "a message is not an object"),
    "no role": ({"messages": [{"content": "a"}]}, "a message without a role"),
    "a wrong role": (
        {"messages": [{"role": "asistant", "content": "a"}]},
        "a role 'asistant', which the chat template",
    ),
    "another sender": (
        {"conversations": [{"from": "bing", "value": "a"}]},
        "a message from 'bing', which is not known",
    ),
    "a sender that is a list": (
        {"conversations": [{"from": [], "value": "a"}]},
        r"a message from '\[\]', which is not",
    ),
    "an empty answer": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an empty answer"),
    "a null answer": ({"messages": [USER, {"role": "assistant", "content": None}]}, "an empty answer"),
    "a number": ({"messages": [USER, {"role": "assistant", "content": 3}]}, "a message's content is not a text"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of a message is not text"),
    "tools": ({"messages": [USER, ANSWER], "tools": ["add"]}, "tools is not a list of objects"),
    "two systems": (
        {"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"},
        "both a system message and",
    ),
    "variables": ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
    "texts": ({"prompt": "a", "completion": "b"}, "prompt and completion are texts.*: use --format completion"),
    "one alone": ({"prompt": [USER]}, "no key messages or conversations, and no keys prompt and completion"),
    "a surrogate": ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "not UTF-8"),
    "the template": ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "the chat template cannot render it: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_row_that_is_no_conversation(case, model, tmp_path):
    row, message = WRONG[case]
    source = write(tmp_path, [*messages(ROWS[:1]), row, *messages(ROWS[1:2])])
    with pytest.raises(UsageError, match=f"rows.jsonl:2: {message}") as stop:
        run(source, tmp_path / "out", model)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()
    manifest = run(source, tmp_path / "skipped", model, on_error="skip")
    assert (manifest.splits["train"].documents, sum(manifest.skipped.values())) == (2, 1)
    assert len(manifest.examples) == 1


def test_conversations_without_a_trained_token_are_left_out(model, tmp_path):
    source = write(tmp_path, [*messages(ROWS[:3]), {"messages": ROWS[0][:1]}, {"messages": [USER, USER]}])
    manifest = run(source, tmp_path / "out", model)
    assert (manifest.splits["train"].documents, manifest.skipped) == (3, {"no trained token": 2})
    assert manifest.examples[0].endswith("rows.jsonl:4: no trained token")
    assert run(source, tmp_path / "all", model, train_on="all").splits["train"].documents == 5
    lengths = sorted(map(len, documents(tmp_path / "out")))
    manifest = run(source, tmp_path / "short", model, max_tokens=lengths[1])
    assert manifest.skipped == {"longer than max_tokens": 1, "no trained token": 2}
    assert sorted(map(len, documents(tmp_path / "short"))) == lengths[:2]
    with pytest.raises(UsageError, match=r"no documents for train in 1 files \(2 no trained token\)"):
        run(write(tmp_path, [{"messages": [USER]}, {"messages": [USER, USER]}]), tmp_path / "none", model)
    assert not (tmp_path / "none").exists()


def test_a_template_whose_messages_all_differ(model, tmp_path):
    """What it says is counted by itself, but not without end."""
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if 'Q' in messages[0].content %}{{ raise_exception(messages[0].content * 100) }}{% endif %}"
    rows = [{"messages": [{"role": "user", "content": f"Q{n}"}, ANSWER]} for n in range(60)]
    rows.append({"messages": [USER, ANSWER]})
    manifest = run(write(tmp_path, rows), tmp_path / "out", model, chat_template=template, on_error="skip")
    assert (len(manifest.skipped), sum(manifest.skipped.values())) == (51, 60)
    assert manifest.skipped["for other reasons"] == 10
    assert max(map(len, manifest.skipped)) < 250


def test_completions(model, tmp_path):
    rows = [{"prompt": "def add(a, b):", "completion": ' "Add."'}, {"prompt": "", "completion": "<|im_end|> 🙂"}]
    manifest = run(write(tmp_path, rows), tmp_path / "out", model, format="completion")
    assert texts(tmp_path / "out", model) == [
        'def add(a, b):[[ "Add."<|endoftext|>]]',
        "<[[|im_end|> 🙂<|endoftext|>]]",
    ]  # the first token of a document is never trained, and special tokens that a text spells are text
    assert (manifest.chat_template, manifest.end_of_turn, manifest.marks_trained_tokens) == (None, [], True)
    named = write(tmp_path, [{"question": row["prompt"], "answer": row["completion"]} for row in rows], "named.jsonl")
    run(named, tmp_path / "named", model, format="completion", text_key="question,answer")
    assert contents(tmp_path / "named") == contents(tmp_path / "out")
    run(write(tmp_path, rows), tmp_path / "all", model, format="completion", train_on="all")
    assert texts(tmp_path / "all", model)[0] == 'de[[f add(a, b): "Add."<|endoftext|>]]'
    run(write(tmp_path, rows), tmp_path / "opened", model, format="completion", bos_token="<|im_start|>")
    assert texts(tmp_path / "opened", model)[1] == "<|im_start|>[[<|im_end|> 🙂<|endoftext|>]]"
    for row, message in (
        ({"prompt": "a"}, "no key 'completion'"),
        ({"prompt": "a", "completion": ""}, "an empty completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt is not a text .lists of messages are for --format chat"),
    ):
        with pytest.raises(UsageError, match=f"rows.jsonl:1: {message}"):
            run(write(tmp_path, [row]), tmp_path / "wrong", model, format="completion")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tokenizer": "bytes"},
            "chat_template: the tokenizer has no chat template; pass a file with a Jinja template",
        ),
        ({"tokenizer": None, "train_tokenizer": 300}, "train_tokenizer: not with --format chat"),
        ({"format": "text", "train_on": "last"}, "train_on: last has no meaning for --format text"),
        ({"format": "completion", "train_on": "last"}, "train_on: last has no meaning for --format completion"),
        ({"format": "completion", "chat_template": "a"}, "chat_template: of use for --format chat and chat_pairs"),
        (
            {"format": "completion", "text_key": "a"},
            "text_key: a: for --format completion name the keys of prompt and completion: A,B",
        ),
        ({"chat_template": "{% if %}"}, "chat_template: it cannot render two questions with answers"),
    ],
)
def test_options_that_do_not_fit(options, message, model, tmp_path):
    source = write(tmp_path, messages(ROWS))
    with pytest.raises(UsageError, match=message):
        run(source, tmp_path / "out", model, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_the_template_is_part_of_the_fingerprint(model, tmp_path):
    files = find_files([write(tmp_path, messages(ROWS))], key="text")
    plain = Settings(tokenizer=str(model), format="chat")
    other = make_chat_folder("reasoning", tmp_path / "other", marks=True)  # the same tokenizer
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    found = {
        fingerprint_of(files, dataclasses.replace(plain, **changes))
        for changes in (
            {},
            {"tokenizer": str(other)},
            {"chat_template": template},
            {"train_on": "last"},
            {"format": "text"},
        )
    }
    assert len(found) == 5
    dated = template + "{{ strftime_now('%Y') }}"
    tokenizer = load_tokenizer(str(model))
    assert "date" not in plain.encoder(tokenizer).identity
    assert "date" in dataclasses.replace(plain, chat_template=dated).encoder(tokenizer).identity


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of conversations in several files, some repeated or not kept, and parts that are small."""
    monkeypatch.setattr(preparation, "PART_BYTES", 1500)
    monkeypatch.setattr(preparation, "CUT_BYTES", 2500)
    monkeypatch.setattr(encoders, "BATCH_BYTES", 700)
    rows = [*messages(ROWS), {"messages": [USER]}, *messages(ROWS[:9]), *sharegpt(ROWS[20:])]
    random.Random(0).shuffle(rows)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(3):
        write(folder, rows[number::3], f"{number}.jsonl")
    return str(folder)


def test_parts_merged_are_one_run(many, model, tmp_path):
    options = {"validation_fraction": 0.2, "chunk_bytes": 1500}
    manifest = run(many, tmp_path / "one", model, **options)
    settings = Settings(tokenizer=str(model), format="chat", **options)
    told = []
    for number in (2, 1, 3):
        share = Share(number, 3)
        prepare([many], settings, out=tmp_path / f"{number}", share=share, show_progress=False, tell=told.append)
    merge([tmp_path / f"{number}" for number in (3, 2, 1)], out=tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")
    assert len(manifest.splits["train"].chunks) > 2
    assert sum("what is trained marked" in text for text in told) == 2  # the third has no documents


KILLED = """
import os, pathlib, signal, sys
from ropepp_lit.data import encoders, part_writer, prepare, preparation
preparation.PART_BYTES, preparation.CUT_BYTES, encoders.BATCH_BYTES = 1500, 2500, 700
real, calls = part_writer.PartWriter.finish, []

def finish(*arguments, **keywords):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **keywords)

part_writer.PartWriter.finish = finish
settings = prepare.Settings(tokenizer=sys.argv[2], format="chat", validation_fraction=0.2, dedup=True)
prepare.prepare([sys.argv[1]], settings, out=pathlib.Path("out"), show_progress=False)
"""


@pytest.mark.end_to_end
def test_killed_and_resumed(run_file, many, model, tmp_path):
    options = {"validation_fraction": 0.2, "dedup": True}
    expected = run(many, tmp_path / "one", model, **options)
    assert expected.skipped["repeats an earlier one"] == 29
    (tmp_path / "killed.py").write_text(KILLED)
    run_file(tmp_path / "killed.py", many, model, cwd=tmp_path, returncode=-9)
    assert len(list((tmp_path / ".out.partial" / "parts").glob("*.json"))) == 2
    with pytest.raises(UsageError, match=r"finished parts .* of another preparation, with other train_on;"):
        run(many, tmp_path / "out", model, train_on="last", **options)
    run(many, tmp_path / "out", model, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.end_to_end
def test_the_command(run_file, command_path, model, tmp_path):
    rows = [*messages(ROWS), {"messages": [{"role": "user", "content": "<|im_end|>"}, ANSWER]}, {"messages": [USER]}]
    source = write(tmp_path, rows)
    options = ["prepare", source, "--tokenizer", model, "--format", "chat"]
    printed = run_file(command_path, *options, "--out", "out", cwd=tmp_path).stdout
    example, _, report = printed.partition("split ")
    assert "rows.jsonl:1, with what is trained marked:" in example
    assert "<|im_start|>assistant\n[[Answer 0 <|im_end|>]]\n<|im_start|>user\nAnd then?<|im_end|>\n" in example
    split = Manifest.read(tmp_path / "out").splits["train"]
    share = f"{split.trained_tokens / split.tokens:.1%}"
    assert f"train {split.documents} {split.tokens:,} {split.trained_tokens:,} {share} {split.longest}" in " ".join(
        report.split()
    )
    assert "left out: 1 (no trained token)" in report
    assert "Notice: special tokens in message contents are parsed as special tokens: in 1 documents" in report
    assert "A turn ends with <|im_end|>." in report
    again = run_file(command_path, *options, "--out", "out", "--workers", "1", cwd=tmp_path).stdout
    assert again.partition("split ")[2] == report
    (tmp_path / "template").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    named = ["--chat_template", "template", "--out", "named", "--validation_fraction", "0.2"]
    printed = run_file(command_path, *options, *named, cwd=tmp_path).stdout
    assert "Notice: the chat template ends turns with no token of its own" in printed
    assert "let it write eos_token (<|endoftext|>) behind answers" in printed
    assert "Notice: no end-of-turn token after a trained turn: in 41 documents" in printed
    failed = run_file(
        command_path, *options[:-2], "--format", "chat", "--text_key", "b", "--out", "x", cwd=tmp_path, returncode=2
    )
    assert failed.stderr.strip().endswith("--on_error skip")
    assert "no key 'b'" in failed.stderr
