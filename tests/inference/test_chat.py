"""The command `chat`: in a pseudo-terminal, with a pipe, and beyond the context."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from ropepp_lit.cli import main
from ropepp_lit.errors import UsageError
from ropepp_lit.inference.completion import complete
from ropepp_lit.inference.conversation import Conversation
from ropepp_lit.inference.model import GenerationSettings, load_model
from ropepp_lit.inference.prompts import encode_messages
from ropepp_lit.nn import Decoder
from ropepp_lit.nn.sampling import Sampling
from ropepp_lit.text.chat import ChatTemplate
from ropepp_lit.text.conversations import parse_conversation


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, command, cwd):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, pattern, timeout=180):
        """Read until the pattern matches; return and consume the output up to its end."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, self.seen
            if not select.select([self.master], [], [], 1)[0]:
                continue
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"ended: {self.seen}") from None
        actual, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return actual

    def type(self, keys):
        os.write(self.master, keys.encode())

    def interrupt(self, pattern):
        """Send Ctrl-C until the pattern matches.

        CPython's input() handles a signal that arrives just before it waits only at the next key or signal.
        """
        for _ in range(8):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(pattern, timeout=20)
        raise AssertionError(self.seen)


@pytest.fixture(autouse=True)
def interrupts():
    """Restore the handling of SIGINT, which shells ignore in background processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def terminal(command_path, tmp_path):
    """Function that starts the command in a pseudo-terminal."""
    started = []

    def terminal(*words):
        started.append(Terminal([command_path, *words], tmp_path))
        return started[-1]

    yield terminal
    for session in started:
        if session.process.poll() is None:
            session.process.kill()
        session.process.wait()
        os.close(session.master)


PROMPT = r"\[([\d,]+)/100,000\] > "


@pytest.mark.end_to_end
def test_a_conversation_in_a_terminal(terminal, talker, tmp_path):
    """Ctrl-C stops a reply of 100,000 tokens, which would take minutes, and the conversation continues."""
    options = ["--temperature", "0", "--max_new_tokens", "90000", "--context_length", "100000", "--system", "Be brief."]
    chat = terminal("chat", talker, *options)
    assert chat.until(PROMPT).endswith("[0/100,000] > ")
    chat.type("half a line")
    chat.until("half a line")
    chat.interrupt(PROMPT)  # clears the line
    chat.type("What is a fox?\r")
    chat.until(r"What is a fox\?\r\n[^\[]{5}")
    count = int(re.search(PROMPT, chat.interrupt(PROMPT))[1].replace(",", ""))
    assert 40 < count < 50_000
    chat.type("/save talk.jsonl\r")
    assert "[saved: talk.jsonl]" in chat.until(PROMPT)
    chat.type("/save talk.jsonl\r")
    assert "talk.jsonl: already exists; name another file" in chat.until(PROMPT)
    chat.type("/reset\r")
    assert chat.until(PROMPT).endswith("[0/100,000] > ")
    chat.type("/help\r")
    assert "/save FILE" in chat.until(PROMPT)
    chat.type("\x04")
    assert chat.process.wait(60) == 0
    (line,) = (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()
    system, question, answer = parse_conversation(json.loads(line)).messages  # as `prepare --format chat` reads it
    assert (system, question) == (
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a fox?"}
    )  # fmt: skip
    assert answer["role"] == "assistant"
    assert answer["content"]


@pytest.fixture
def type_lines(monkeypatch):
    """Function that writes lines to a pipe that replaces stdin."""

    def type_lines(text):
        read, write = os.pipe()
        os.write(write, text.encode())
        os.close(write)
        monkeypatch.setattr("sys.stdin", os.fdopen(read))

    yield type_lines
    sys.stdin.close()


def test_messages_from_a_pipe(type_lines, talker, tmp_path, monkeypatch, capsys):
    """stdout contains only replies, without escape codes or prompts; the end of the input is not an error."""
    monkeypatch.chdir(tmp_path)
    type_lines("Hello\n\n/nothing\n /etc\n/save talk.jsonl")
    main(["chat", str(talker), "--temperature", "0", "--max_new_tokens", "9"])
    printed = capsys.readouterr()
    model = load_model(str(talker))
    template = ChatTemplate.from_tokenizer(model.tokenizer)
    messages, generation = [], GenerationSettings(max_new_tokens=9)
    for text in ("Hello", "/etc"):
        messages.append({"role": "user", "content": text})
        ids = encode_messages(template, {"messages": messages})
        (reply,) = complete(model, [ids], generation, indices=[0], stop_token_ids=template.end_of_turn)
        messages.append({"role": "assistant", "content": reply.text})
    assert printed.out == "".join(message["content"] + "\n" for message in messages[1::2])
    cut = "[the reply is truncated: max_new_tokens is 9]"
    expected = [cut, "[no command /nothing; /help lists them]", cut, "[saved: talk.jsonl]"]
    assert printed.err.splitlines() == expected
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == {"messages": messages}


@pytest.fixture
def start_conversation(talker):
    """Function that creates a conversation and returns it with its notices, model and template."""

    def start_conversation(*, system="", context_length=None, **settings):
        model, notices = load_model(str(talker), context_length=context_length), []
        template = ChatTemplate.from_tokenizer(model.tokenizer)
        generation = GenerationSettings(
            **{"max_new_tokens": 12, "sampling": Sampling(temperature=1.0, top_k=5), **settings}
        )
        return Conversation(model, template, generation, system=system, notify=notices.append), notices, model, template

    return start_conversation


def test_replies_match_those_without_a_cache(start_conversation):
    """Reusing the cache does not change replies, and each turn processes only its new tokens."""
    conversation, _, model, template = start_conversation(system="Be brief.")
    lengths = []
    model.decoder.model.embed_tokens.register_forward_hook(
        lambda module, inputs, out: lengths.append(inputs[0].numel())
    )
    for turn, text in enumerate(["What is a fox?", "And a dog?", "And the rest of it?"]):
        del lengths[:]
        reply = "".join(conversation.ask(text))
        read = lengths[0]
        messages = [{"role": "system", "content": "Be brief."}, *conversation.messages[:-1]]
        assert (messages[-1]["content"], conversation.messages[-1]["content"]) == (text, reply)
        ids = encode_messages(template, {"messages": messages})
        generation = GenerationSettings(max_new_tokens=12, sampling=Sampling(temperature=1.0, top_k=5))
        (expected,) = complete(model, [ids], generation, indices=[turn], stop_token_ids=template.end_of_turn)
        assert reply == expected.text
        assert conversation.num_tokens == len(ids) + expected.num_tokens
        assert conversation.status == f"{conversation.num_tokens}/512"
        assert read < len(ids) / 2 or not turn


def test_the_oldest_turns_are_dropped_from_a_full_context(start_conversation):
    conversation, notices, model, template = start_conversation(system="Be brief.", context_length=120)
    prompts = []
    model.decoder.model.embed_tokens.register_forward_hook(
        lambda module, inputs, out: prompts.append(inputs[0].numel())
    )
    for number in range(6):
        "".join(conversation.ask(f"Number {number}?"))
        assert conversation.num_tokens <= 120
    assert len(conversation.messages) == 12  # no message is lost
    dropped = [notice for notice in notices if "oldest" in notice]
    assert dropped
    assert all(
        re.fullmatch(r"the \d+ oldest messages are dropped .*: the context length is 120 tokens", n) for n in dropped
    )
    left_out = sum(int(notice.split()[1]) for notice in dropped)
    assert left_out % 2 == 0
    ids, again = conversation._fit([*conversation.messages, {"role": "user", "content": "Last?"}])
    remaining = [{"role": "system", "content": "Be brief."}, *conversation.messages[again:]]
    assert ids == encode_messages(template, {"messages": [*remaining, {"role": "user", "content": "Last?"}]})
    assert left_out <= again <= left_out + 4


def test_messages_and_replies_that_exceed_the_context(start_conversation):
    conversation, notices, _, _ = start_conversation(context_length=60, max_new_tokens=100)
    with pytest.raises(UsageError, match=r"the message has [0-9]+ tokens .* the context length is 60; shorten it"):
        next(conversation.ask("fox " * 40))
    assert (conversation.messages, notices) == ([], [])
    "".join(conversation.ask("A fox?"))
    assert notices[-1] in ("the reply is truncated: end of the context", *notices[:-1])
    assert conversation.num_tokens <= 60


def test_an_interrupted_reply(start_conversation, tmp_path):
    """A partial reply is added to the history; a message without a reply is not."""
    conversation, notices, model, _ = start_conversation(max_new_tokens=200)
    with pytest.raises(UsageError, match="no messages to save"):
        conversation.save(str(tmp_path / "file"))
    reply = conversation.ask("A fox?")
    partial_reply = next(reply) + next(reply)
    reply.close()
    assert conversation.messages[1] == {"role": "assistant", "content": partial_reply}
    before = list(conversation.messages)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.decoder.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(conversation.ask("A dog?"))
    hook.remove()
    assert conversation.messages == before
    token = next(iter(model.tokenizer.stop_token_ids))

    def end(module, inputs, logits):
        logits[..., token] = 1e4

    hook = model.decoder.lm_head.register_forward_hook(end)
    assert list(conversation.ask("A dog?")) == []
    assert (conversation.messages, notices[-1]) == (before, "the reply is empty; the message was removed")


def test_templates(mistake, base, tmp_path, capsys, type_lines):
    assert "chat_template: the tokenizer has no chat template; pass a file" in mistake(base, subcommand="chat", base=[])
    missing = mistake(base, "--chat_template", "none.jinja", subcommand="chat", base=[])
    assert "chat_template: none.jinja: No such file" in missing
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    options = ["--chat_template", template, "--system", "Be brief."]
    assert "no system" in mistake(base, *options, subcommand="chat", base=[])
    type_lines("A fox?\n")
    main(["chat", str(base), "--chat_template", str(template), "--max_new_tokens", "3", "--temperature", "0"])
    model = load_model(str(base))
    own = ChatTemplate.from_tokenizer(model.tokenizer, template.read_text())
    ids = own.tokens.encode(["[user] A fox?</s>[assistant]"], [[]])[0][0].tolist()
    (expected,) = complete(model, [ids], GenerationSettings(max_new_tokens=3), indices=[0])
    assert capsys.readouterr().out == expected.text + "\n"


def test_ctrl_c_ends_a_chat_with_a_pipe(type_lines, talker, monkeypatch, capsys):
    """An interrupted script does not continue with its next line."""
    type_lines("A fox?\nA dog?\n")
    calls, forward = [], Decoder.forward

    def interrupted(self, *arguments, **keywords):
        calls.append(None)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(Decoder, "forward", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["chat", str(talker), "--temperature", "0"])
    assert (stop.value.code, len(calls)) == (130, 5)
    assert capsys.readouterr().err == "ropepp-lit: error: interrupted\n"
