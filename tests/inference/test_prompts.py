"""The command `generate` with a file of prompts: results, resumption and errors."""

import json
import signal
import subprocess
import time

import pytest

from ropepp_lit.cli import main
from ropepp_lit.inference.completion import Stream
from ropepp_lit.inference.model import GenerationSettings, load_model
from ropepp_lit.nn.generation import Row
from ropepp_lit.text.chat import ChatTemplate

ROWS = [
    {"prompt": "The quick brown", "id": 7, "nested": {"a": [1.5, None]}},
    {"prompt": "", "name": "漢字 \ud83d"},
    {"id": "x", "prompt": "def add(first, second):\n"},
    *({"prompt": "a fox " * number} for number in range(9)),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_preserve_order_and_keys(base, tmp_path, capsys):
    write(tmp_path / "in.jsonl", ROWS)
    options = ["--max_new_tokens", "9", "--top_k", "50", "--seed", "3", "--stop", '["o", "\\n"]']
    command = ["generate", str(base), "--prompts", str(tmp_path / "in.jsonl"), *options]
    for size in (1, 5, 100):
        main([*command, "--out", str(tmp_path / f"{size}.jsonl"), "--batch_size", str(size)])
    assert f"{tmp_path / '5.jsonl'}: 12 rows\n" in capsys.readouterr().out
    rows = read(tmp_path / "5.jsonl")
    assert read(tmp_path / "1.jsonl") == rows == read(tmp_path / "100.jsonl")
    assert [{key: row[key] for key in source} for source, row in zip(ROWS, rows, strict=True)] == ROWS
    assert all(list(row)[-3:] == ["text", "finish_reason", "tokens"] for row in rows)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    main(
        ["generate", str(base), "--prompt", ROWS[0]["prompt"], *options]
    )  # the first prompt has the same random numbers
    assert capsys.readouterr().out == ROWS[0]["prompt"] + rows[0]["text"] + "\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "100.jsonl", "5.jsonl", "in.jsonl"]


def test_conversations_with_a_chat_template(talker, tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A fox?"}]
    parts = [{"type": "text", "text": "A "}, {"type": "text", "text": "fox?"}]
    rows = [{"messages": messages}, {"prompt": "A fox?"}, {"conversations": [{"from": "human", "value": "A fox?"}]}]
    rows.append({"messages": [{"role": "user", "content": parts}]})
    write(tmp_path / "in.jsonl", rows)
    command = ["generate", str(talker), "--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    main([*command, "--chat", "true", "--temperature", "0", "--max_new_tokens", "12"])
    model = load_model(str(talker))
    template = ChatTemplate.from_tokenizer(model.tokenizer)
    actual = read(tmp_path / "out.jsonl")
    for source, row in zip((messages, *[messages[1:]] * 3), actual, strict=True):
        text = template.render(source, add_generation_prompt=True)
        assert text.endswith("<|im_start|>assistant\n")
        ids = template.tokens.encode([text], [[]])[0][0].tolist()
        assert row["text"] == "".join(Stream(model, Row(model.decoder), ids, GenerationSettings(max_new_tokens=12)))
    assert actual[0]["text"] != actual[1]["text"] == actual[2]["text"] == actual[3]["text"]


@pytest.mark.end_to_end
def test_a_killed_and_resumed_run_has_identical_output(base, command_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [{"prompt": "fox " * (number % 7), "n": number} for number in range(24)])
    options = ["--max_new_tokens", "40", "--batch_size", "3", "--prompts", "in.jsonl"]
    command = ["generate", str(base), *options, "--out"]
    process = subprocess.Popen([command_path, *command, "out.jsonl"], stderr=subprocess.DEVNULL)
    partial, deadline = tmp_path / "out.jsonl.partial", time.monotonic() + 120
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.jsonl").exists()
    finished = partial.read_bytes().count(b"\n") - 1
    assert 3 <= finished < 24
    with partial.open("ab") as file:
        file.write(b'{"row": 1, "te')  # a truncated line
    main([*command, "out.jsonl"])
    printed = capsys.readouterr()
    assert f"out.jsonl: 24 rows, {finished} of them before" in printed.out
    assert printed.err == ""  # the progress bar is for terminals
    main([*command, "whole.jsonl"])
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


@pytest.fixture
def begun(talker, tmp_path, monkeypatch):
    """Folder and command of a run that was interrupted after its first batch."""
    write(tmp_path / "in.jsonl", [{"prompt": "a fox"}] * 6)
    command = ["generate", str(talker), "--prompts", "in.jsonl", "--out", "out.jsonl", "--max_new_tokens", "5"]
    monkeypatch.chdir(tmp_path)
    from ropepp_lit.inference import prompts

    calls = []

    def interrupted(*arguments, **keywords):
        calls.append(None)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return complete(*arguments, **keywords)

    complete = prompts.complete
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "complete", interrupted)
        with pytest.raises(SystemExit) as stop:
            main([*command, "--batch_size", "2"])
    assert stop.value.code == 130
    return command


def refused(command, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ropepp-lit: error: ")]
    return line


def test_a_run_with_other_settings_is_not_resumed(begun, talker, tmp_path, capsys):
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    assert before.count(b"\n") == 3
    for option, value, name in (
        ("--batch_size", "3", "batch_size"),
        ("--seed", "1", "seed"),
        ("--stop", "x", "stop_texts"),
        ("--top_k", "9", "top_k"),
        ("--chat", "true", "chat template"),
    ):
        options = ["--batch_size", "2"] if option != "--batch_size" else []
        line = refused([*begun, *options, option, value], capsys)
        assert f"out.jsonl.partial was created with another value of {name}; use the same value" in line
    write(tmp_path / "in.jsonl", [{"prompt": "a box"}] * 6)
    assert "another value of prompts;" in refused([*begun, "--batch_size", "2"], capsys)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    (tmp_path / "out.jsonl.partial").write_bytes(before.replace(b'{"row"', b'["row"'))
    write(tmp_path / "in.jsonl", [{"prompt": "a fox"}] * 6)
    assert "out.jsonl.partial: damaged; delete it" in refused([*begun, "--batch_size", "2"], capsys)
    (tmp_path / "out.jsonl").write_text("mine")
    assert "out: out.jsonl: already exists" in refused([*begun, "--batch_size", "2"], capsys)
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_a_run_with_another_checkpoint_is_not_resumed(begun, base, tmp_path, capsys):
    line = refused(["generate", str(base), *begun[2:], "--batch_size", "2"], capsys)
    assert "another value of checkpoint, context_length;" in line


BAD = {
    "not JSON": ('{"prompt": 1', "not JSON"),
    "not UTF-8": ('{"prompt": "\udcff"}', "not UTF-8"),
    "no object": ("[1]", "not an object"),
    "no prompt": ('{"text_": "a"}', "no key 'prompt'"),
    "another type": ('{"prompt": 1}', "prompt is not a text"),
    "messages": ('{"messages": []}', "has messages but no prompt; add --chat true"),
    "a key of ours": ('{"prompt": "a", "tokens": 1}', "has a key 'tokens'"),
    "half a character": (r'{"prompt": "a\ud83d"}', "a text with an unpaired surrogate at character 2"),
    "too long": (json.dumps({"prompt": "fox " * 600}), "the prompt has 2,400 tokens and leaves no space in"),
}
BAD_CHATS = {
    "empty": ('{"messages": []}', "messages has no messages"),
    "no role": ('{"messages": [{"content": "a"}]}', "a message without a role"),
    "answered": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "the last message is from the assistant",
    ),
    "neither": ('{"id": 1}', "no key messages or conversations"),
    "a role": ('{"messages": [{"role": "robot", "content": "a"}]}', "unknown role 'robot', which the chat template"),
}


@pytest.mark.parametrize(("chat", "row", "expected"), [
    *(("false", *case) for case in BAD.values()), *(("true", *case) for case in BAD_CHATS.values())
], ids=[*BAD, *BAD_CHATS])  # fmt: skip
def test_an_invalid_row_is_reported_and_nothing_is_written(talker, tmp_path, capsys, monkeypatch, chat, row, expected):
    monkeypatch.chdir(tmp_path)
    content = '{"prompt": "a"}\n\n' + row + "\n"
    (tmp_path / "in.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    command = ["generate", str(talker), "--prompts", "in.jsonl", "--out", "new/out.jsonl", "--chat", chat]
    line = refused(command, capsys)
    assert line.startswith(f"ropepp-lit: error: in.jsonl:3: {expected}"), line
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_git_lfs_pointer(talker, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    command = ["generate", str(talker), "--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert "in.jsonl: a git-lfs pointer, not the file; run `git lfs pull` in" in refused(command, capsys)


def test_invalid_options(mistake, talker, base, tmp_path):
    def error_of(*options, model=talker):
        return mistake(model, *options, subcommand="generate", base=[])

    assert "prompts: give --prompts FILE.jsonl and --out" in error_of("--prompts", "in.jsonl")
    assert "prompts: give --prompts FILE.jsonl and --out" in error_of("--out", "out.jsonl")
    assert "prompt: give either" in error_of("--prompt", "a", "--prompts", "a", "--out", "b")
    assert "batch_size: 0 must be 1" in error_of("--batch_size", "0")
    assert "min_p: 2.0 must be" in error_of("--min_p", "2")
    assert "prompts: in.jsonl: No such file" in error_of("--prompts", "in.jsonl", "--out", "b")
    assert "chat_template: the tokenizer has no chat template" in error_of("--chat", "true", model=base)
    assert "prompt: it has 5 tokens and leaves no room" in error_of(
        "--prompt", "axb", "--context_length", "5", model=base
    )
    (tmp_path / "in.jsonl").write_text("\n")
    assert "in.jsonl: no prompts" in error_of("--prompts", "in.jsonl", "--out", "b")


def test_texts_that_end_at_the_context_are_reported(base, tmp_path, capsys):
    options = ["--context_length", "12", "--seed", "1"]
    main(["generate", str(base), "--prompt", "A", *options])
    error_of = "Notice: the text ends where the model's context of 12 tokens does; --context_length allows more.\n"
    assert capsys.readouterr().err == error_of
    main(["generate", str(base), "--prompt", "A", *options, "--max_new_tokens", "3"])
    assert capsys.readouterr().err == ""
    write(tmp_path / "in.jsonl", [{"prompt": "A"}, {"prompt": "A" * 5}])
    main(["generate", str(base), "--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), *options])
    rows = read(tmp_path / "out")
    count = sum(row["finish_reason"] == "length" for row in rows)
    assert count
    assert f"{count} texts end where the model's context of 12 tokens does" in capsys.readouterr().err


def test_a_full_disk(begun, tmp_path, capsys, monkeypatch):
    from ropepp_lit.inference import prompts

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prompts, "sync", full)
        line = refused([*begun, "--batch_size", "2"], capsys)
    assert line == "ropepp-lit: error: out.jsonl: cannot be written: No space left on device"
    main([*begun, "--batch_size", "2"])
    assert len(read(tmp_path / "out.jsonl")) == 6
