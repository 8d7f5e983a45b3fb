"""`ropepp-lit serve`: a checkpoint behind an HTTP server that is compatible with OpenAI's API."""

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
    """Serve a checkpoint over HTTP at /v1/chat/completions and /v1/completions, compatible with OpenAI's API.

    Args:
        checkpoint: A .ckpt file, a Hugging Face folder, or the name of one on the Hugging Face Hub. It is also the name
            of the model in requests.
        host: Address to listen on: 127.0.0.1 (this machine alone), 0.0.0.0 or :: (every network). Where the environment
            variable LIT_SERVER_API_KEY is set, clients must send its value as their API key.
        port: Port to listen on, 1024 or more.
        chat_template: A file with a Jinja template instead of the tokenizer's own.
        max_requests: Requests that are processed concurrently: they take turns, a token each, and are not batched; more
            of them wait. Each has a KV cache of up to the whole context.
        max_new_tokens: Tokens to write at most, for requests without max_tokens.
        temperature: For requests without it: divides the logits; 0 takes the most likely token each time (greedy).
        top_k: For requests without it: sample from this many most likely tokens; 0 means all.
        top_p: For requests without it: sample from the smallest set of tokens whose probability reaches this.
        min_p: For requests without it: leave out tokens less likely than this share of the most likely one's
            probability.
        repetition_penalty: For requests without it: divides the logits of tokens that are there already, the prompt's
            too; 1 changes nothing.
        context_length: Tokens of prompt and answer together; empty means those that the checkpoint was
            trained with.
        trust: `module.Class` of a position scheme of your own that the checkpoint was made with and may be imported.
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
