"""OpenAI's format of chat and text completions: requests, responses and errors.

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
"""Keys that are ignored, such as account metadata."""

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
"""Accepted values of unsupported keys, which have no effect."""


AnyRequest = TypeVar("AnyRequest", bound="CompletionRequest")


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    include_usage: bool = False
    """Whether to end with a chunk with token counts."""


class CompletionRequest(BaseModel):
    """Parameters of a request; None means the server's default."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    """Random seed; None means a random one."""
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    """Extension, like `min_p` and `repetition_penalty`."""
    min_p: float | None = None
    repetition_penalty: float | None = None

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _null(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum number of tokens to generate."""
        return self.max_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end the generation."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed response ends with a chunk with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextRequest(CompletionRequest):
    """Request for a text completion."""

    prompt: str


class ChatRequest(CompletionRequest):
    """Request for a chat completion."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """New name of `max_tokens`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Additional variables of the chat template; an extension."""

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum number of tokens to generate."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def request_error(
    message: str, *, param: str | None = None, code: str | None = None, status: int = 400
) -> HTTPException:
    """Create the exception for a request that cannot be processed."""
    return HTTPException(status, {"message": message, "param": param, "code": code})


def error_body(error: StarletteHTTPException) -> dict[str, Any]:
    """Return the body of an error response in OpenAI's format."""
    detail: Any = error.detail
    detail = detail if isinstance(detail, dict) else {"message": str(detail)}
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return {"error": {"message": detail["message"], "type": kind, "param": None, "code": None, **detail}}


def parse(body: bytes, kind: type[AnyRequest]) -> AnyRequest:
    """Parse and validate the body of a request.

    Raises:
        HTTPException: 400, with the key that is wrong and the reason.
    """
    try:
        values = parse_json(body)
    except ValueError as error:
        raise request_error(f"the body is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise request_error("the body is not a JSON object")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(part) for part in first["loc"]]  # empty if a key is not valid Unicode
        message = f"{'.'.join(keys) or 'the body'}: {first['msg']}"
        raise request_error(message, param=keys[0] if keys else None) from error
    for key, value in (request.model_extra or {}).items():
        if value is not None and key not in WITHOUT_EFFECT and value not in NEUTRAL.get(key, ()):
            message = f"{key}: not supported by this server; omit it"
            raise request_error(message, param=key, code="unsupported_parameter")
    return request


class ResponseFormatter:
    """Converts the worker's output for a request to OpenAI's format.

    The output is a sequence of dicts with `index`, the index of the choice, and: first `prompt_tokens`, then any number
    of `text`, finally `finish_reason` and `completion_tokens`.

    Args:
        request: The request.
        model: Name of the model.
    """

    def __init__(self, request: CompletionRequest, model: str) -> None:
        self._request, self._is_chat = request, isinstance(request, ChatRequest)
        kind = "chatcmpl" if self._is_chat else "cmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._prompt_tokens = self._completion_tokens = 0

    async def complete(self, items: AsyncIterable[dict[str, Any]]) -> dict[str, Any]:
        """Return the response as a single object."""
        texts, reasons = [""] * self._request.n, [""] * self._request.n
        async for item in items:
            self._count(item)
            texts[item["index"]] += item.get("text", "")
            reasons[item["index"]] = item.get("finish_reason", "")
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choices.append({"index": index, **content, "finish_reason": reason})
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage}

    async def events(self, items: AsyncIterable[dict[str, Any]]) -> AsyncIterator[str]:
        """Yield the response as server-sent events."""
        try:
            async for item in items:
                self._count(item)
                choice = {"index": item["index"], **self._part(item), "finish_reason": item.get("finish_reason")}
                yield self._event([choice], {"usage": None} if self._request.includes_usage else {})
        except HTTPException as error:  # the status has already been sent
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
        self._prompt_tokens = item.get("prompt_tokens", self._prompt_tokens)  # counted once for all choices
        self._completion_tokens += item.get("completion_tokens", 0)

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        event = {**self._head, "object": kind, "choices": choices, **more}
        return f"data: {json.dumps(event)}\n\n"
