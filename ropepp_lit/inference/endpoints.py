"""HTTP endpoints of the server; they run in the API process, the model runs in a worker process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from litserve import LitAPI
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem

from ropepp_lit.inference.openai_format import (
    ChatRequest,
    CompletionRequest,
    ResponseFormatter,
    TextRequest,
    parse,
    request_error,
)

POLL_SECONDS = 0.5
"""Polling interval for disconnected clients."""


class CompletionSpec(LitSpec):
    """LitServe specification of the endpoints.

    Args:
        model: Name of the model.
        cancel: Connection to the worker, for the ids of requests to cancel.
    """

    def __init__(self, model: str, cancel: Connection) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"
        self._model, self._cancel, self._created = model, cancel, int(time.time())

    @property
    def stream(self) -> bool:
        """Whether the worker streams its output; always True, also for requests without streaming."""
        return True

    def pre_setup(self, lit_api: LitAPI) -> None:
        """Register the endpoints."""
        self.add_endpoint(self.api_path, self.chat, ["POST"])
        self.add_endpoint("/v1/completions", self.text, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.model, ["GET"])

    async def models(self) -> dict[str, Any]:
        """Return the list of models, which has one entry."""
        return {"object": "list", "data": [await self.model(self._model)]}

    async def model(self, name: str) -> dict[str, Any]:
        """Return the description of a model."""
        self._check_name(name)
        return {"id": name, "object": "model", "created": self._created, "owned_by": "ropepp-lit"}

    async def chat(self, http: Request) -> Response:
        """Handle a request for a chat completion."""
        return await self._complete(http, ChatRequest)

    async def text(self, http: Request) -> Response:
        """Handle a request for a text completion."""
        return await self._complete(http, TextRequest)

    async def _complete(self, http: Request, kind: type[CompletionRequest]) -> Response:
        body = await http.body()
        request = parse(body, kind)
        if request.model:
            self._check_name(request.model)
        items, formatter = self._items(request, body, http), ResponseFormatter(request, self._model)
        first = await anext(items)  # raises errors of the prompt before the status is sent

        async def all_items() -> AsyncIterator[dict[str, Any]]:
            yield first
            async for item in items:
                yield item

        if request.stream:
            return StreamingResponse(formatter.events(all_items()), media_type="text/event-stream")
        return JSONResponse(await formatter.complete(all_items()))

    async def _items(self, request: CompletionRequest, body: bytes, http: Request) -> AsyncIterator[dict[str, Any]]:
        """Yield the worker's output for a request; cancel the request if the client disconnects."""
        queue: deque[tuple[Any, str]] = deque()
        event, seed = asyncio.Event(), secrets.randbits(63) if request.seed is None else request.seed
        uids, num_finished = [uuid.uuid4().hex for _ in range(request.n)], 0
        try:
            for index, uid in enumerate(uids):
                self.response_buffer[uid] = ResponseBufferItem(response_queue=queue, event=event)
                job = {"uid": uid, "index": index, "seed": seed, "kind": type(request), "body": body}
                self.request_queue.put((self.response_queue_id, uid, time.monotonic(), job))
            while num_finished < request.n:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), POLL_SECONDS)
                if await http.is_disconnected():
                    raise HTTPException(499, "the client disconnected")  # not received by anyone
                event.clear()
                while queue:
                    data, status = queue.popleft()
                    if status == LitAPIStatus.FINISH_STREAMING:
                        num_finished += 1
                    elif status != LitAPIStatus.ERROR:
                        yield json.loads(data)
                    elif isinstance(data, HTTPException):
                        raise data
                    else:
                        raise HTTPException(500, "the request failed; see the server's output for the reason")
        finally:
            for uid in uids:
                self.response_buffer.pop(uid, None)
                if num_finished < request.n:
                    self._cancel.send(uid)

    def _check_name(self, name: str) -> None:
        if name != self._model:
            message = f"model: {name!r} not found; this server has {self._model!r}"
            raise request_error(message, param="model", code="model_not_found", status=404)
