"""OpenAI's format of chat and text completions: what requests may say, and how answers and errors are written.

https://platform.openai.com/docs/api-reference/chat and https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, TypeVar

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.exceptions import HTTPException as StarletteHTTPException

from ropepp_lit.json_files import parse_json

WITHOUT_EFFECT = {
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip
"""Keys about accounts and their bookkeeping: any value is accepted."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Values that ask for nothing, of keys that are not supported."""


AnyRequest = TypeVar("AnyRequest", bound="CompletionRequest")


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    include_usage: bool = False
    """End with a chunk that counts tokens."""


class CompletionRequest(BaseModel):
    """What is asked for; None leaves a setting to the server."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    """None draws one."""
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    """This and the next two are not OpenAI's."""
    min_p: float | None = None
    repetition_penalty: float | None = None

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _null(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextRequest(CompletionRequest):
    """A text that is to be continued."""

    prompt: str


class ChatRequest(CompletionRequest):
    """A conversation that is to be answered."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """`max_tokens` by its new name."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template; not OpenAI's."""

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def refusal(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> HTTPException:
    """A request that cannot be answered as it is."""
    return HTTPException(status, {"message": message, "param": param, "code": code})


def error_body(error: StarletteHTTPException) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    detail: Any = error.detail
    detail = detail if isinstance(detail, dict) else {"message": str(detail)}
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return {"error": {"message": detail["message"], "type": kind, "param": None, "code": None, **detail}}


def parse(body: bytes, kind: type[AnyRequest]) -> AnyRequest:
    """Read a request of a kind.

    Raises:
        HTTPException: 400, which says what is wrong with which key.
    """
    try:
        values = parse_json(body)
    except ValueError as error:
        raise refusal(f"the body is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise refusal("the body is not a JSON object")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        place = [str(part) for part in found["loc"]]  # none where a key is no Unicode
        raise refusal(f"{'.'.join(place) or 'the body'}: {found['msg']}", param=place[0] if place else None) from error
    for key, value in (request.model_extra or {}).items():
        if value is not None and key not in WITHOUT_EFFECT and value not in NEUTRAL.get(key, ()):
            raise refusal(f"{key}: not supported by this server; leave it out", param=key, code="unsupported_parameter")
    return request


class Answer:
    """Writes what the model's process says of a request.

    Its items are objects with `index`, the number of the choice, and: first `prompt_tokens`, then `text` any number of
    times, last `finish_reason` and `completion_tokens`.

    Args:
        request: What is answered.
        model: The model's name.
    """

    def __init__(self, request: CompletionRequest, model: str) -> None:
        self._request, self._is_chat = request, isinstance(request, ChatRequest)
        kind = "chatcmpl" if self._is_chat else "cmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._prompt_tokens = self._completion_tokens = 0

    async def whole(self, items: AsyncIterable[dict[str, Any]]) -> dict[str, Any]:
        """The answer as one object."""
        texts, reasons = [""] * self._request.n, [""] * self._request.n
        async for item in items:
            self._count(item)
            texts[item["index"]] += item.get("text", "")
            reasons[item["index"]] = item.get("finish_reason", "")
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choices.append({"index": index, **said, "finish_reason": reason})
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage}

    async def events(self, items: AsyncIterable[dict[str, Any]]) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            async for item in items:
                self._count(item)
                choice = {"index": item["index"], **self._part(item), "finish_reason": item.get("finish_reason")}
                yield self._event([choice], {"usage": None} if self._request.includes_usage else {})
        except HTTPException as error:  # the status has been sent long ago
            yield f"data: {json.dumps(error_body(error))}\n\n"
            return
        if self._request.includes_usage:
            yield self._event([], {"usage": self._usage})
        yield "data: [DONE]\n\n"

    def _part(self, item: dict[str, Any]) -> dict[str, Any]:
        if not self._is_chat:
            return {"text": item.get("text", "")}
        if "prompt_tokens" in item:
            return {"delta": {"role": "assistant", "content": ""}}
        return {"delta": {"content": item["text"]} if "text" in item else {}}

    @property
    def _usage(self) -> dict[str, int]:
        counts = {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._completion_tokens}
        return {**counts, "total_tokens": sum(counts.values())}

    def _count(self, item: dict[str, Any]) -> None:
        self._prompt_tokens = item.get("prompt_tokens", self._prompt_tokens)  # of one prompt, however many choices
        self._completion_tokens += item.get("completion_tokens", 0)

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        event = {**self._head, "object": kind, "choices": choices, **more}
        return f"data: {json.dumps(event)}\n\n"
