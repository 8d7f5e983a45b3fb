"""`ropepp-lit serve`: HTTP server with an OpenAI-compatible API."""

from __future__ import annotations

import json
import os

from ropepp_lit.arguments import call


def serve(
    checkpoint: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    chat_template: str | None = None,
    max_requests: int = 4,
    max_new_tokens: int = 512,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    context_length: int | None = None,
    trust: str | None = None,
) -> None:
    """Serve a model over HTTP at /v1/chat/completions and /v1/completions, compatible with OpenAI's API.

    Args:
        checkpoint: A .ckpt file, a Hugging Face folder, or the name of a model on the Hugging Face Hub. It is also the
            name of the model in requests.
        host: Address to listen on: 127.0.0.1 (this machine only), 0.0.0.0 or :: (all networks). If the environment
            variable LIT_SERVER_API_KEY is set, clients must send its value as their API key.
        port: Port to listen on, 1024 or more.
        chat_template: File with a Jinja template that replaces the tokenizer's.
        max_requests: Maximum number of concurrent requests; further requests wait. Requests are not batched but take
            turns, one token each. Each has a KV cache of up to the full context.
        max_new_tokens: Default of max_tokens in requests: maximum number of tokens to generate.
        temperature: Default of requests: divides the logits; 0 takes the most likely token each time (greedy).
        top_k: Default of requests: sample from the k most likely tokens; 0 means all.
        top_p: Default of requests: sample from the smallest set of tokens whose total probability reaches p.
        min_p: Default of requests: exclude tokens less likely than this fraction of the most likely token's
            probability.
        repetition_penalty: Default of requests: divides the logits of tokens that occur in the prompt or the output; 1
            disables it.
        context_length: Maximum number of tokens of prompt and output together; empty means the trained context length.
        trust: `module.Class` of a custom position scheme that the checkpoint uses; it is imported only if named here.
    """
    from ropepp_lit.errors import UsageError

    if max_requests < 1:
        raise UsageError(f"max_requests: {max_requests} must be 1 or more")
    try:
        from ropepp_lit.inference import server
    except ModuleNotFoundError as error:
        if error.name not in ("litserve", "fastapi"):
            raise
        raise UsageError("serve needs LitServe: pip install 'ropepp-lit[serve]'") from error

    def announce(can_chat: bool) -> None:
        url = f"http://{'[::1]' if ':' in host else '127.0.0.1'}:{port}/v1"
        body = {"messages": [{"role": "user", "content": "Hello"}]} if can_chat else {"prompt": "Once"}
        key = f' -H "Authorization: Bearer ${server.KEY}"' if os.environ.get(server.KEY) else ""
        print(f"Serving {checkpoint} at {url} (Ctrl-C to stop). Try:")
        print(f"curl {url}/{'chat/' if can_chat else ''}completions{key} -d '{json.dumps(body)}'", flush=True)

    settings = server.ServerSettings(
        checkpoint=checkpoint, chat_template=chat_template, max_requests=max_requests, max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        context_length=context_length, trust=trust,
    )  # fmt: skip
    server.serve(settings, host=host, port=port, announce=announce)


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    call(serve, arguments)
