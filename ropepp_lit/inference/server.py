"""OpenAI-compatible server on LitServe, with an API process and a worker process for the model.

The API process does not import PyTorch, so modules that do are imported inside the functions of the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import litserve
from fastapi import FastAPI, Header, Request, Response
from litserve.connector import check_cuda_with_nvidia_smi
from litserve.utils import WorkerSetupStatus
from starlette.exceptions import HTTPException

from ropepp_lit.errors import UsageError
from ropepp_lit.inference.endpoints import CompletionSpec
from ropepp_lit.inference.openai_format import (
    ChatRequest,
    CompletionRequest,
    TextRequest,
    error_body,
    parse,
    request_error,
)

if TYPE_CHECKING:
    from ropepp_lit.inference.model import GenerationSettings
    from ropepp_lit.nn.generation import Row
    from ropepp_lit.text.chat import ChatTemplate

KEY = "LIT_SERVER_API_KEY"
"""Environment variable of LitServe with the API key that requests must send."""

HOSTS = ("127.0.0.1", "0.0.0.0", "::")  # noqa: S104 (a choice, not the default)
"""Addresses that LitServe can listen on."""

CLOSE_SECONDS = 2
"""Grace period for open responses at shutdown."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server; sampling settings and `max_new_tokens` are defaults for requests."""

    checkpoint: str
    chat_template: str | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    context_length: int | None
    trust: str | None
    max_requests: int
    """Maximum number of requests that are processed concurrently."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with its generation settings."""

    uid: str
    index: int
    """Index of the choice."""
    ids: list[int]
    generation: GenerationSettings
    stop_token_ids: list[int]


class ModelAPI(litserve.LitAPI):
    """The model, which runs in the worker process.

    Concurrent requests alternate after each token, and each uses its own KV cache. A request reuses the cache with the
    longest common prefix, so earlier turns of a conversation are not processed again.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._cancellations, cancel = multiprocessing.Pipe(duplex=False)
        self.outcome, self._outcome = multiprocessing.Pipe(duplex=False)
        """Connection that receives whether the loaded model can chat, or the message of a UsageError."""
        self._key = os.environ.get(KEY)
        super().__init__(spec=CompletionSpec(settings.checkpoint, cancel), enable_async=True)

    def authorize(self, authorization: str = Header(""), x_api_key: str = Header("")) -> None:
        """Check the API key, if there is one, in the header of OpenAI's or of LitServe's clients."""
        sent = x_api_key or authorization.removeprefix("Bearer ")
        if self._key and not hmac.compare_digest(sent.encode(), self._key.encode()):
            raise request_error(f"the API key is not the server's {KEY}", code="invalid_api_key", status=401)

    def setup(self, device: str) -> None:
        """Load the model."""
        litserve.configure_logging("error", stream=sys.stderr)
        try:
            self._load()
        except UsageError as error:
            self._outcome.send(str(error))
            litserve.configure_logging("critical")  # avoids a traceback
            raise
        self._outcome.send(not isinstance(self._template, UsageError))

    def _load(self) -> None:
        from ropepp_lit.inference.model import load_model
        from ropepp_lit.nn.generation import Row
        from ropepp_lit.text.chat import ChatTemplate, read_template

        settings = self._settings
        self._generation(CompletionRequest.model_validate({}), seed=0)  # checks the settings
        self._model = load_model(settings.checkpoint, trust=settings.trust, context_length=settings.context_length)
        override = None if settings.chat_template is None else read_template(settings.chat_template)
        self._template: ChatTemplate | UsageError
        try:
            self._template = ChatTemplate.from_tokenizer(self._model.tokenizer, override)
            self._end_of_turn = self._template.end_of_turn
        except UsageError as error:
            if override is not None:
                raise
            self._template, self._end_of_turn = error, []
            print(f"Notice: only /v1/completions is available: {error}", file=sys.stderr)
        self._idle = [Row(self._model.decoder) for _ in range(settings.max_requests)]
        self._turns = asyncio.Semaphore(settings.max_requests)
        self._cancelled: set[str] = set()

    async def decode_request(self, request: dict[str, Any]) -> Prompt:
        """Parse and tokenize a request.

        Raises:
            HTTPException: 400 if the request is invalid.
        """
        from ropepp_lit.text.conversations import RowError

        parsed = parse(request["body"], request["kind"])
        try:
            generation = self._generation(parsed, seed=request["seed"])
        except UsageError as error:
            raise request_error(str(error), param=str(error).partition(":")[0]) from error
        is_chat = isinstance(parsed, ChatRequest)
        param = "messages" if is_chat else "prompt"
        try:
            ids = self._encode(parsed)
        except (RowError, UsageError) as error:
            raise request_error(f"{param}: {str(error).removeprefix('prompt: ')}", param=param) from error
        if self._model.remaining_tokens(ids) == 0:
            raise request_error(
                f"{param}: {len(ids):,} tokens leave no space in the context of {self._model.context_length:,}; "
                "shorten it",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        return Prompt(request["uid"], request["index"], ids, generation, self._end_of_turn if is_chat else [])

    def _encode(self, request: ChatRequest | TextRequest) -> list[int]:
        from ropepp_lit.inference.prompts import encode_messages, encode_text

        if isinstance(request, TextRequest):
            return encode_text(self._model.tokenizer, request.prompt)
        if isinstance(self._template, UsageError):
            raise self._template
        row = {"messages": request.messages, "chat_template_kwargs": request.chat_template_kwargs}
        return encode_messages(self._template, row)

    def _generation(self, request: CompletionRequest, *, seed: int) -> GenerationSettings:
        from ropepp_lit.inference.model import GenerationSettings
        from ropepp_lit.nn.sampling import Sampling

        values = {name: getattr(request, name) for name in ("max_new_tokens", *asdict(Sampling()))}
        values = {name: getattr(self._settings, name) if value is None else value for name, value in values.items()}
        return GenerationSettings(
            max_new_tokens=values.pop("max_new_tokens"),
            sampling=Sampling(**values), seed=seed, stop_texts=request.stop_texts,
        ).check()  # fmt: skip

    async def predict(self, x: Prompt) -> AsyncIterator[dict[str, Any]]:
        """Yield the output in the format that :class:`~.openai_format.ResponseFormatter` expects."""
        from ropepp_lit.inference.completion import Stream

        yield {"index": x.index, "prompt_tokens": len(x.ids)}
        async with self._turns:
            row = self._take_row(x.ids)
            try:
                stream = Stream(self._model, row, x.ids, x.generation, stop_token_ids=x.stop_token_ids, index=x.index)
                for text in stream.steps():
                    if text:
                        yield {"index": x.index, "text": text}
                    await asyncio.sleep(0)  # let other requests run
                    if self._is_cancelled(x.uid):
                        return
            finally:
                self._idle.append(row)
        yield {"index": x.index, "finish_reason": stream.finish_reason, "completion_tokens": stream.num_tokens}

    def _take_row(self, ids: list[int]) -> Row:
        """Take the row with the longest reusable prefix; the oldest one if most of each cache would be lost."""

        def num_reused(row: Row) -> int:
            shared = row.num_shared(ids)
            return shared if 2 * shared >= row.num_cached else 0

        row = max(self._idle, key=num_reused)
        self._idle.remove(row)
        return row

    async def encode_response(self, output: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        """Yield the output unchanged; LitServe converts it to JSON."""
        async for part in output:
            yield part

    def _is_cancelled(self, uid: str) -> bool:
        while self._cancellations.poll():
            self._cancelled.add(self._cancellations.recv())
        return uid in self._cancelled


class Server(litserve.LitServer):
    """LitServe server with an API process and a worker process.

    Raises:
        UsageError: From :meth:`run`, if the model cannot be loaded.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._api = ModelAPI(settings)
        has_gpu = check_cuda_with_nvidia_smi() > 0
        super().__init__(
            self._api, accelerator="cuda" if has_gpu else "cpu", devices=1, timeout=False, disable_openapi_url=True
        )
        self.uvicorn_graceful_timeout = CLOSE_SECONDS
        self.app.add_exception_handler(HTTPException, _error_response)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Ignore SIGINT in the API process, because the main process terminates it."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._end_with_parent, daemon=True).start()
        async with super().lifespan(app):
            yield

    def _end_with_parent(self) -> None:
        """Kill all processes if the main process was killed."""
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        for number in self._others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        os._exit(1)

    def launch_inference_worker(self, lit_api: litserve.LitAPI) -> list[Any]:
        """Start the worker process, which also ignores SIGINT."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return super().launch_inference_worker(lit_api)
        finally:
            signal.signal(signal.SIGINT, before)

    def verify_worker_status(self) -> None:
        """Wait until the model is loaded; raise UsageError if it cannot be loaded."""
        (worker,) = self.inference_workers
        while WorkerSetupStatus.READY not in self.workers_setup_status.values():
            if not worker.is_alive():
                raise UsageError(self._api.outcome.recv() if self._api.outcome.poll() else _ended(worker.exitcode))
            worker.join(0.05)
        self.can_chat = self._api.outcome.recv()
        self._others = [child.pid for child in multiprocessing.active_children() if child.pid]
        litserve.configure_logging("error", stream=sys.stderr)

    def end(self) -> None:
        """Terminate the worker process, if :meth:`run` has not done so."""
        for worker in getattr(self, "inference_workers", []):
            worker.terminate()


async def _error_response(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = json.dumps(error_body(error))  # ASCII, because the message may quote an unpaired surrogate
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _ended(code: int | None) -> str:
    return f"the model's process ended with the exit code {code}, probably because it ran out of memory"


def serve(settings: ServerSettings, *, host: str, port: int, announce: Callable[[bool], object]) -> None:
    """Run the server until SIGINT (Ctrl-C) or SIGTERM.

    Args:
        settings: Settings of the server.
        host: Address, one of :data:`HOSTS`.
        port: Port, at least 1024.
        announce: Called when the server accepts requests, with whether it supports chat completions.

    Raises:
        UsageError: The address is in use, the model cannot be loaded, or its process ended.
    """
    _check_address(host, port)
    server, process = Server(settings), os.getpid()

    def interrupt(number: int, frame: object) -> None:
        if os.getpid() == process:  # not in forked processes
            for ignored in (signal.SIGINT, signal.SIGTERM):
                signal.signal(ignored, signal.SIG_IGN)
            raise KeyboardInterrupt

    for handled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, interrupt)
    threading.Thread(target=_announce, args=(server, host, port, announce), daemon=True).start()
    try:
        server.run(host=host, port=port, log_level="error", num_api_servers=1, generate_client_file=False)
    except KeyboardInterrupt:
        pass
    except (EOFError, ConnectionError) as error:  # LitServe has shut down
        raise UsageError(_ended(server.inference_workers[0].exitcode)) from error
    finally:
        server.end()


def _check_address(host: str, port: int) -> None:
    """Raise UsageError unless a server can listen on the address."""
    if host not in HOSTS:
        raise UsageError(f"host: {host!r}: choose one of {', '.join(HOSTS)}")
    if not 1024 <= port <= 65535:
        raise UsageError(f"port: {port} must be from 1024 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"port: {port} of {host}: {error.strerror}; choose another by --port") from error


def _announce(server: Server, host: str, port: int, announce: Callable[[bool], object]) -> None:
    """Call `announce` when the server accepts connections."""
    address = ("::1" if ":" in host else "127.0.0.1", port)
    while True:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
            break
        time.sleep(0.05)
    announce(server.can_chat)
