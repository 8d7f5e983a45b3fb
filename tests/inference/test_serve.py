"""The command `serve` as a process, with OpenAI's client."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import psutil
import pytest
from others import make_folder
from safetensors.torch import load_file, save_file

from ropepp_lit.inference.completion import complete
from ropepp_lit.inference.model import GenerationSettings, load_model
from ropepp_lit.inference.prompts import encode_messages
from ropepp_lit.nn.sampling import Sampling
from ropepp_lit.text.chat import ChatTemplate
from ropepp_lit.text.tokenizer import load_tokenizer

openai = pytest.importorskip("openai")
pytest.importorskip("litserve")
pytestmark = pytest.mark.end_to_end

FOX = [{"role": "user", "content": "A fox?"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    *FOX,
    {"role": "assistant", "content": "It sleeps."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "the dog?"}]},
]
LONG = {"messages": FOX, "temperature": 0, "max_tokens": 90000}
"""An answer of minutes."""

KEY = "fox-and-dog"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """Checkpoint of a model with a chat template, whose greedy responses never end."""
    folder = make_folder("chat", tmp_path_factory.mktemp("models") / "endless")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][load_tokenizer(str(folder)).eos_token_id] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(start_server, talker):
    """A server for two concurrent requests."""
    options = ["--max_requests", 2, "--context_length", 100000]
    return start_server(talker, *options, env={"LIT_SERVER_API_KEY": KEY})


@pytest.fixture
def client(server):
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def ask(client, talker):
    def ask(messages=FOX, **options):
        return client.chat.completions.create(model=str(talker), messages=messages, **options)

    return ask


@pytest.fixture(scope="module")
def expected(talker):
    """Function that returns the expected prompt tokens and completions, generated in this process."""
    model = load_model(str(talker), context_length=100000)
    template = ChatTemplate.from_tokenizer(model.tokenizer)

    def expected(messages=FOX, *, count=1, **settings):
        ids = encode_messages(template, {"messages": messages})
        answers = complete(
            model,
            [ids] * count,
            GenerationSettings(**settings),
            indices=range(count),
            stop_token_ids=template.end_of_turn,
        )
        return len(ids), answers

    return expected


def test_the_printed_command_works(server, talker):
    assert server.lines[0] == f"Serving {talker} at http://127.0.0.1:{server.port}/v1 (Ctrl-C to stop). Try:\n"
    command = server.lines[1].strip().replace('{"messages"', '{"max_tokens": 3, "messages"') + " -sS"
    environment = {**os.environ, "LIT_SERVER_API_KEY": KEY}
    actual = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(actual.stdout)["choices"][0]["finish_reason"] == "length"


def test_models(client, talker):
    (model,) = client.models.list()
    assert model.id == str(talker) == client.models.retrieve(str(talker)).id


@pytest.mark.parametrize("messages", [FOX, TURNS], ids=["one message", "several turns and parts"])
@pytest.mark.parametrize("stream", [False, True])
def test_greedy_responses_match_generate(ask, expected, messages, stream):
    num_tokens, (answer,) = expected(messages, max_new_tokens=30)
    options = {"temperature": 0, "max_completion_tokens": 30, "max_tokens": 1}
    if stream:
        chunks = list(ask(messages, stream=True, stream_options={"include_usage": True}, **options))
        assert len({(chunk.id, chunk.model) for chunk in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
        assert reasons[:-1] == [None] * (len(chunks) - 2)
        assert len(chunks) > 10
        assert {chunk.usage for chunk in chunks[:-1]} == {None}
        reason, usage = reasons[-1], chunks[-1].usage
        assert chunks[-1].choices == []
    else:
        actual = ask(messages, **options)
        (choice,) = actual.choices
        assert choice.message.role == "assistant"
        text, reason, usage = choice.message.content, choice.finish_reason, actual.usage
    assert (text, reason) == (answer.text, answer.finish_reason)
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    assert counts == (num_tokens, answer.num_tokens, num_tokens + answer.num_tokens)


def test_stop_texts(ask, expected):
    _, (unstopped,) = expected(max_new_tokens=30)
    for stop in (unstopped.text[4:6], [unstopped.text[4:6], "nowhere"]):
        (choice,) = ask(temperature=0, max_tokens=30, stop=stop).choices
        assert (choice.message.content, choice.finish_reason) == (
            unstopped.text[: unstopped.text.index(unstopped.text[4:6])],
            "stop",
        )


def test_sampled_responses(ask, expected):
    """With the defaults of chat; choices match a batch of equal prompts, and are reproducible only with a seed."""
    _, answers = expected(count=3, max_new_tokens=9, seed=7, sampling=Sampling(temperature=0.8, top_p=0.95))
    texts = [answer.text for answer in answers]
    assert [choice.message.content for choice in ask(max_tokens=9, seed=7, n=3).choices] == texts
    streamed = ["", "", ""]
    for chunk in ask(max_tokens=9, seed=7, n=3, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert len(set(texts)) == 3
    assert ask(max_tokens=20).choices != ask(max_tokens=20).choices
    settings = {"temperature": 1.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    _, (answer,) = expected(max_new_tokens=9, seed=1, sampling=Sampling(top_p=0.5, **settings))
    (choice,) = ask(
        max_tokens=9, seed=1, temperature=settings.pop("temperature"), top_p=0.5, extra_body=settings
    ).choices
    assert choice.message.content == answer.text


def test_a_response_ends_at_the_end_of_its_turn(ask, expected):
    _, (answer,) = expected(max_new_tokens=3000, seed=1, sampling=Sampling(temperature=9.0))
    assert answer.finish_reason == "stop"
    actual = ask(max_tokens=3000, seed=1, temperature=9.0, top_p=1)
    assert (actual.choices[0].message.content, actual.choices[0].finish_reason) == (answer.text, "stop")
    assert actual.usage.completion_tokens == answer.num_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_text_completions(client, talker, stream):
    """Same texts as with `generate --prompt`, with and without a chat template."""
    model = load_model(str(talker))
    prompt = model.tokenizer.encode_prompt("The quick")
    answers = complete(
        model,
        [prompt] * 2,
        GenerationSettings(max_new_tokens=9, seed=5, sampling=Sampling(temperature=1.0)),
        indices=range(2),
    )
    options = {"max_tokens": 9, "seed": 5, "n": 2, "temperature": 1.0, "top_p": 1.0}
    actual = client.completions.create(model=str(talker), prompt="The quick", stream=stream, **options)
    texts, reasons = ["", ""], ["", ""]
    for part in actual if stream else [actual]:
        for choice in part.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [answer.text for answer in answers]
    assert reasons == [answer.finish_reason for answer in answers]
    if not stream:
        assert (actual.object, actual.usage.prompt_tokens) == ("text_completion", len(prompt))
    for text, message in ((["a"], "prompt: Input should be a valid string"), ("fox " * 40000, "prompt: 1")):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model=str(talker), prompt=text, stream=stream)
        assert error.value.body["message"].startswith(message)


def test_neutral_values_are_accepted(ask, expected):
    options = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "user": "me",
        "seed": None, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "metadata": {"a": "b"},
        "stop": None,
    }  # fmt: skip
    (choice,) = ask(temperature=0, max_tokens=5, **options).choices
    assert choice.message.content == expected(max_new_tokens=5)[1][0].text


BAD = {
    "a role": ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "messages: unknown role 'robot', which"),
    "no role": ({"messages": [{"content": "a"}]}, "messages", "messages: a message without a role"),
    "no messages": ({"messages": []}, "messages", "messages: List should have at least 1 item"),
    "no list": ({"messages": "a"}, "messages", "messages: Input should be a valid list"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        "messages", "messages: a part of a message is not text",
    ),
    "an answer": ({"messages": [*FOX, {"role": "assistant", "content": "a"}]}, "messages", "messages: the last"),
    "a long prompt": ({"messages": [{"role": "user", "content": "fox " * 40000}]}, "messages", "messages: 1"),
    "temperature": ({"temperature": -1}, "temperature", "temperature: -1.0 must be 0"),
    "text for a number": ({"temperature": "1"}, "temperature", "temperature: Input should be a valid number"),
    "top_p": ({"top_p": 0}, "top_p", "top_p: 0.0 must be above 0"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens", "max_tokens: Input should be greater than or equal to 1"),
    "stop": ({"stop": [""]}, "stop", "stop: an empty stop text"),
    "n": ({"n": 200}, "n", "n: Input should be less than or equal to 128"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools", "tools: not supported"),
    "log-probabilities": ({"logprobs": True}, "logprobs", "logprobs: not supported by this server; omit it"),
    "JSON": ({"response_format": {"type": "json_object"}}, "response_format", "response_format: not supported"),
    "no such key": ({"max_token": 3}, "max_token", "max_token: not supported"),
    "a variable": ({"chat_template_kwargs": 3}, "chat_template_kwargs", "chat_template_kwargs: Input should be a"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_invalid_requests(client, stream):
    """The status is 400 with the key, also for streams, and the server continues."""
    for kind, (change, param, message) in BAD.items():
        body = {"messages": FOX, "max_tokens": 3, "stream": stream, **change}
        with pytest.raises(openai.BadRequestError) as error:
            client.post("/chat/completions", body=body, cast_to=object)
        assert error.value.body["type"] == "invalid_request_error"
        assert error.value.param == param, kind
        assert error.value.body["message"].startswith(message), kind
    assert error.value.response.headers["content-type"] == "application/json"


def test_unknown_paths_and_models(server, client, ask):
    for call, kind, code in (
        (lambda: client.chat.completions.create(model="gpt", messages=FOX), openai.NotFoundError, "model_not_found"),
        (lambda: client.models.retrieve("gpt"), openai.NotFoundError, "model_not_found"),
        (lambda: client.with_options(api_key="no").models.list(), openai.AuthenticationError, "invalid_api_key"),
        (lambda: client.embeddings.create(model="a", input="b"), openai.NotFoundError, None),
    ):
        with pytest.raises(kind) as error:
            call()
        assert error.value.code == code
    for body, message in (
        ("{", "the body is not JSON"),
        ("[]", "the body is not a JSON object"),
        (r'{"messages": [{"role": "user", "content": "\ud83d"}]}', "messages: a text with an unpaired surrogate"),
        (r'{"messages": [{"role": "user", "content": "a"}], "\ud83d": 1}', "the body: "),
        ('{"messages": ' + "[" * 5000 + "]" * 5000 + "}", "the body is not JSON"),
        ('{"messages": [{"role": "robot", "content": "a", "b": ' + "[" * 400 + "]" * 400 + "}]}", "messages: unknown"),
        (r'{"messages": [{"role": "\ud83d", "content": "a"}]}', r"messages: unknown role '\ud83d'"),
    ):
        url, headers = f"http://127.0.0.1:{server.port}/v1/chat/completions", {"x-api-key": KEY}
        with pytest.raises(urllib.error.HTTPError, match="400") as error:
            urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers))
        assert json.load(error.value)["error"]["message"].startswith(message)


def test_concurrent_responses_equal_single_ones_and_alternate(ask, expected):
    """With more requests than the limit; short responses do not wait for long ones."""
    questions = [[{"role": "user", "content": f"Fox {number}?"}] for number in range(5)]
    long = iter(ask(**LONG, stream=True))
    next(long)
    actual = {}
    threads = [
        threading.Thread(target=lambda q=q: actual.update({q[0]["content"]: ask(q, temperature=0, max_tokens=20)}))
        for q in questions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        actual[q[0]["content"]].choices[0].message.content == expected(q, max_new_tokens=20)[1][0].text
        for q in questions
    )
    assert next(long).choices[0].finish_reason is None
    long.close()


def test_a_disconnected_client_cancels_its_request(ask):
    """Two long requests block the server until their clients disconnect."""
    stream = ask(**LONG, stream=True)
    next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        ask(**LONG, timeout=1)
    stream.close()
    assert ask(temperature=0, max_tokens=3, timeout=60).usage.completion_tokens == 3


def test_ctrl_c_ends_the_server_and_open_responses(server, ask):
    """The last test of the server. As in a terminal, every process gets the signal, multiple times."""
    stream = iter(ask(**LONG, stream=True))
    next(stream)
    for _ in range(2):
        for process in server.family:
            process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    assert server.process.stdout.read() == ""
    assert (server.folder / "errors").read_text() == ""
    assert [path.name for path in server.folder.iterdir()] == ["errors"]
    assert psutil.wait_procs(server.family, timeout=20)[1] == []
    with pytest.raises(openai.APIError):
        list(stream)


def test_a_model_that_cannot_be_loaded(start_server):
    """The error of the worker is reported in one line."""
    server = start_server("none.ckpt")
    assert server.process.wait(120) == 2
    assert server.lines == ["", ""]
    (line,) = (server.folder / "errors").read_text().splitlines()
    assert line.startswith("ropepp-lit: error: none.ckpt: ")


@pytest.mark.slow
def test_no_process_survives_the_main_process(start_server, talker):
    """Also if the main process is killed, so that it cannot terminate them."""
    server = start_server(talker)
    assert len(server.family) > 3
    server.process.kill()
    assert psutil.wait_procs(server.family, timeout=20)[1] == []


def test_invalid_options(mistake, talker, monkeypatch):
    def error_of(*options):
        return mistake(talker, *options, subcommand="serve", base=[])

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expected = f"port: {port} of 127.0.0.1: Address already in use; choose another by --port"
        assert error_of("--port", port).endswith(expected)
    assert "port: 80 must be from 1024" in error_of("--port", "80")
    assert "host: 'localhost': choose one of 127.0.0.1" in error_of("--host", "localhost")
    assert "max_requests: 0 must be 1" in error_of("--max_requests", "0")
    monkeypatch.delitem(sys.modules, "ropepp_lit.inference.server")
    monkeypatch.delattr("ropepp_lit.inference.server")
    monkeypatch.setitem(sys.modules, "litserve", None)
    assert error_of().endswith("serve needs LitServe: pip install 'ropepp-lit[serve]'")
