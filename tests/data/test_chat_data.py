"""Conversations and completions as shards: row formats, parts, resuming, and reports."""

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
from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.parts import Part, merge
from ropepp_lit.data.prepare import PrepareSettings, fingerprint_of, prepare
from ropepp_lit.data.report import highlight_trained
from ropepp_lit.data.trained_tokens import is_trained, mark, token_ids
from ropepp_lit.errors import UsageError
from ropepp_lit.text.sources import find_files
from ropepp_lit.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Create a folder of a tokenizer with a chat template that supports tools."""
    return make_chat_folder("reasoning", tmp_path_factory.mktemp("model") / "qwen")


def run(source, out, model, **options):
    settings = PrepareSettings(**{"tokenizer": str(model), "format": "chat", **options})
    return prepare([source], settings, out=out, show_progress=False)


def documents(folder, split="train"):
    """Read the stored tokens of each document in litdata's format: a count, offsets, tokens."""
    found = []
    for chunk in Manifest.read(folder).splits[split].chunks:
        data = (folder / split / chunk.filename).read_bytes()
        count = int(np.frombuffer(data, np.uint32, 1)[0])
        bounds = np.frombuffer(data, np.uint32, count + 1, offset=4)
        found += [np.frombuffer(data[a:b], np.int32) for a, b in itertools.pairwise(bounds)]
    return found


def texts(folder, model, split="train"):
    """Decode each document, with its trained tokens in brackets."""
    return [highlight_trained(stored, load_tokenizer(str(model))) for stored in documents(folder, split)]


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """Shards of the rows from JSON lines, by `train_on`."""
    folder = tmp_path_factory.mktemp("reference")
    source = write(folder, messages(ROWS))
    for train_on in ("assistant", "last"):
        run(source, folder / train_on, model, train_on=train_on, validation_fraction=0.2)
    return folder


@pytest.mark.parametrize("kind", STORES)
def test_all_row_formats_result_in_the_same_shards(kind, model, reference, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    name, rows, options = STORES[kind]
    # Of prompt and completion, only the last answer is trained, for any train_on.
    trained = options.pop("train_on", "assistant") if kind == "prompt and completion" else "assistant"
    run(store(tmp_path, name, rows), tmp_path / "out", model, validation_fraction=0.2, **options)
    assert contents(tmp_path / "out") == contents(reference / trained)


def test_stored_tokens(model, reference):
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


def test_tools_and_other_columns(model, tmp_path):
    """Keys of only one row are null in the other rows of a table, and are not passed to templates."""
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


def test_highlighting_in_a_terminal(model, monkeypatch):
    """Trained tokens are in colour, control characters are escaped, and long texts are truncated."""
    tokenizer = load_tokenizer(str(model))
    ids = np.array(tokenizer.encode_text("read\x1b[31m" + "written"), dtype=np.int32)
    stored = mark(ids, np.arange(len(ids)) >= len(tokenizer.encode_text("read\x1b[31m")))
    assert highlight_trained(stored, tokenizer) == "read\\x1b[31m[[written]]"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert highlight_trained(stored, tokenizer) == "read\\x1b[31m\x1b[32mwritten\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    long = mark(np.full(5000, ids[0]), np.arange(5000) == 3000)
    assert highlight_trained(long, tokenizer).startswith("… ")
    assert highlight_trained(long, tokenizer).count("[[") == 1
    assert highlight_trained(long, tokenizer).endswith(" … (1,750 more tokens)")


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
INVALID_ROWS = {
    "no messages": (
        {"text": "a"},
        "no key 'messages' or 'conversations' or .*; set text_key to the key of the messages",
    ),
    "empty": ({"messages": []}, "messages has no messages"),
    "not a list": ({"messages": 3}, "messages is not a list of messages"),
    "broken JSON": ({"messages": "[{"}, "messages is broken JSON"),
    "a text": ({"messages": ["a"]}, "a message is not an object"),
    "no role": ({"messages": [{"content": "a"}]}, "a message without a role"),
    "a wrong role": (
        {"messages": [{"role": "asistant", "content": "a"}]},
        "unknown role 'asistant', which the chat template",
    ),
    "another sender": (
        {"conversations": [{"from": "bing", "value": "a"}]},
        "a message from an unknown role 'bing'",
    ),
    "a sender that is a list": (
        {"conversations": [{"from": [], "value": "a"}]},
        r"a message from an unknown role '\[\]'",
    ),
    "an empty answer": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an empty answer"),
    "a null answer": ({"messages": [USER, {"role": "assistant", "content": None}]}, "an empty answer"),
    "a number": ({"messages": [USER, {"role": "assistant", "content": 3}]}, "a message's content is not a string"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of a message is not text"),
    "tools": ({"messages": [USER, ANSWER], "tools": ["add"]}, "tools is not a list of objects"),
    "two systems": (
        {"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"},
        "both a system message and",
    ),
    "variables": ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
    "texts": ({"prompt": "a", "completion": "b"}, "prompt and completion are strings.*: use --format completion"),
    "one alone": ({"prompt": [USER]}, "no key messages or conversations, and no keys prompt and completion"),
    "a surrogate": ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "not UTF-8"),
    "the template": ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "the chat template cannot render it: "),
}


@pytest.mark.parametrize("case", INVALID_ROWS)
def test_invalid_rows(case, model, tmp_path):
    row, message = INVALID_ROWS[case]
    source = write(tmp_path, [*messages(ROWS[:1]), row, *messages(ROWS[1:2])])
    with pytest.raises(UsageError, match=f"rows.jsonl:2: {message}") as stop:
        run(source, tmp_path / "out", model)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()
    manifest = run(source, tmp_path / "skipped", model, on_error="skip")
    assert (manifest.splits["train"].documents, sum(manifest.skipped.values())) == (2, 1)
    assert len(manifest.examples) == 1


def test_conversations_without_trained_tokens_are_skipped(model, tmp_path):
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


def test_the_number_of_skip_reasons_is_limited(model, tmp_path):
    """Each message of a template is counted separately, up to a maximum."""
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
    ]  # the first token of a document is never trained, and special tokens in a text are plain text
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
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt is not a string .lists of messages are for --format chat"),
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
        ({"tokenizer": None, "train_tokenizer": 300}, "train_tokenizer: cannot be used with --format chat"),
        ({"format": "text", "train_on": "last"}, "train_on: last is not valid with --format text"),
        ({"format": "completion", "train_on": "last"}, "train_on: last is not valid with --format completion"),
        ({"format": "completion", "chat_template": "a"}, "chat_template: only valid with --format chat and chat_pairs"),
        (
            {"format": "completion", "text_key": "a"},
            "text_key: a: for --format completion pass the keys of prompt and completion: A,B",
        ),
        ({"chat_template": "{% if %}"}, "chat_template: it cannot render two questions with answers"),
    ],
)
def test_invalid_options(options, message, model, tmp_path):
    source = write(tmp_path, messages(ROWS))
    with pytest.raises(UsageError, match=message):
        run(source, tmp_path / "out", model, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_the_template_is_part_of_the_fingerprint(model, tmp_path):
    files = find_files([write(tmp_path, messages(ROWS))], key="text")
    plain = PrepareSettings(tokenizer=str(model), format="chat")
    other = make_chat_folder("reasoning", tmp_path / "other", marks=True)  # the same tokenizer
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    fingerprints = {
        fingerprint_of(files, dataclasses.replace(plain, **changes))
        for changes in (
            {},
            {"tokenizer": str(other)},
            {"chat_template": template},
            {"train_on": "last"},
            {"format": "text"},
        )
    }
    assert len(fingerprints) == 5
    dated = template + "{{ strftime_now('%Y') }}"
    tokenizer = load_tokenizer(str(model))
    assert "date" not in plain.encoder(tokenizer).identity
    assert "date" in dataclasses.replace(plain, chat_template=dated).encoder(tokenizer).identity


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Write conversations to multiple files, with duplicates and skipped rows; set a small segment size."""
    monkeypatch.setattr(preparation, "SEGMENT_BYTES", 1500)
    monkeypatch.setattr(preparation, "CUT_BYTES", 2500)
    monkeypatch.setattr(encoders, "BATCH_BYTES", 700)
    rows = [*messages(ROWS), {"messages": [USER]}, *messages(ROWS[:9]), *sharegpt(ROWS[20:])]
    random.Random(0).shuffle(rows)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(3):
        write(folder, rows[number::3], f"{number}.jsonl")
    return str(folder)


def test_merged_parts_equal_a_single_run(many, model, tmp_path):
    options = {"validation_fraction": 0.2, "chunk_bytes": 1500}
    manifest = run(many, tmp_path / "one", model, **options)
    settings = PrepareSettings(tokenizer=str(model), format="chat", **options)
    reported = []
    for number in (2, 1, 3):
        part = Part(number, 3)
        prepare([many], settings, out=tmp_path / f"{number}", part=part, show_progress=False, report=reported.append)
    merge([tmp_path / f"{number}" for number in (3, 2, 1)], out=tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")
    assert len(manifest.splits["train"].chunks) > 2
    assert sum("with the trained tokens marked" in text for text in reported) == 2  # the third part has no documents


KILLED = """
import os, pathlib, signal, sys
from ropepp_lit.data import encoders, segment_writer, prepare, preparation
preparation.SEGMENT_BYTES, preparation.CUT_BYTES, encoders.BATCH_BYTES = 1500, 2500, 700
real, calls = segment_writer.SegmentWriter.finish, []

def finish(*arguments, **keywords):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **keywords)

segment_writer.SegmentWriter.finish = finish
settings = prepare.PrepareSettings(tokenizer=sys.argv[2], format="chat", validation_fraction=0.2, dedup=True)
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
    with pytest.raises(UsageError, match=r"finished segments .* of another preparation, which differs in train_on;"):
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
    assert "rows.jsonl:1, with the trained tokens marked:" in example
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
    assert "Notice: the chat template does not end turns with a dedicated token" in printed
    assert "change it to write eos_token (<|endoftext|>) after answers" in printed
    assert "Notice: no end-of-turn token after a trained turn: in 41 documents" in printed
    failed = run_file(
        command_path, *options[:-2], "--format", "chat", "--text_key", "b", "--out", "x", cwd=tmp_path, returncode=2
    )
    assert failed.stderr.strip().endswith("--on_error skip")
    assert "no key 'b'" in failed.stderr
