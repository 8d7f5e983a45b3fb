"""The worker of `serve`, in this process and without HTTP."""

import asyncio
import json

import pytest

pytest.importorskip("litserve")

from fastapi import HTTPException

from ropepp_lit.errors import UsageError
from ropepp_lit.inference.openai_format import ChatRequest, TextRequest
from ropepp_lit.inference.server import ModelAPI, ServerSettings
from ropepp_lit.text.tokenizer import load_tokenizer

FOX = [{"role": "user", "content": "A fox?"}]


def settings(checkpoint, **changes):
    values = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    values |= {"context_length": None, "trust": None, "chat_template": None, "max_new_tokens": 12, "max_requests": 2}
    return ServerSettings(checkpoint=str(checkpoint), **{**values, **changes})


async def decode(model, kind=ChatRequest, uid="a", **body):
    return await model.decode_request(
        {"uid": uid, "index": 0, "seed": 0, "kind": kind, "body": json.dumps(body).encode()}
    )


async def answer(model, uid="a", **body):
    """Yield the output of a request."""
    return [part async for part in model.predict(await decode(model, uid=uid, **body))]


def test_a_model_without_a_chat_template(base, capsys):
    """Only text completions are available."""
    model = ModelAPI(settings(base))
    model.setup("cpu")
    assert model.outcome.recv() is False
    message = "chat_template: the tokenizer has no chat template"
    assert capsys.readouterr().err.startswith(f"Notice: only /v1/completions is available: {message}")
    text = asyncio.run(decode(model, TextRequest, prompt="A"))
    assert (text.ids, text.stop_token_ids) == (load_tokenizer(str(base)).encode_prompt("A"), [])
    with pytest.raises(HTTPException) as error:
        asyncio.run(decode(model, messages=FOX))
    assert error.value.status_code == 400
    assert error.value.detail["message"].startswith(f"messages: {message}; pass a file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "none.jinja"}, "chat_template: none.jinja: No such file"),
        ({"temperature": -1.0}, "temperature: -1.0 must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be 1"),
        ({"context_length": 1}, "context_length: 1 must be 2"),
    ],
)
def test_load_errors_are_sent_to_the_main_process(base, changes, message):
    model = ModelAPI(settings(base, **changes))
    with pytest.raises(UsageError):
        model.setup("cpu")
    assert model.outcome.recv().startswith(message)


@pytest.fixture
def model(talker):
    model = ModelAPI(settings(talker))
    model.setup("cpu")
    return model


def test_turns_of_a_conversation_reuse_the_cache(model):
    """Two alternating conversations each reuse their own cache."""
    read = []
    model._model.decoder.model.embed_tokens.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    histories = [[{"role": "user", "content": text * 9}] for text in ("A fox? ", "The dog! ")]
    for turn in range(3):
        for messages in histories:
            del read[:]
            first, *parts, last = asyncio.run(answer(model, messages=messages))
            assert last["completion_tokens"] > 0
            assert read[0] < first["prompt_tokens"] / 2 or not turn
            text = "".join(part["text"] for part in parts)
            messages += [{"role": "assistant", "content": text or "-"}, {"role": "user", "content": "And then?"}]


def test_requests_cancelled_while_waiting_are_not_processed(model):
    """Three requests with a limit of two: the third is cancelled while waiting, the first while running."""
    cancel = model.spec._cancel
    parts = [[], [], []]

    async def collect(number):
        async for part in model.predict(await decode(model, uid=str(number), messages=FOX, max_tokens=300)):
            parts[number].append(part)

    async def together():
        answers = [asyncio.create_task(collect(number)) for number in range(3)]
        while len(parts[0]) < 4:
            await asyncio.sleep(0)
        cancel.send("0")
        cancel.send("2")
        await asyncio.gather(*answers)

    asyncio.run(together())
    first, second, third = parts
    assert "finish_reason" in second[-1]
    assert [set(part) for part in third] in (
        [{"index", "prompt_tokens"}],
        [{"index", "prompt_tokens"}, {"index", "text"}],
    )
    assert "finish_reason" not in first[-1]
    assert len(first) < len(second)
