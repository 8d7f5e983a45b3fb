"""`ropepp-lit generate`: text generation from a prompt, or from a file of prompts."""

from __future__ import annotations

import sys

from ropepp_lit.arguments import call


def generate(
    checkpoint: str,
    *,
    prompt: str = "",
    prompts: str | None = None,
    out: str | None = None,
    chat: bool = False,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    stop: str = "",
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    context_length: int | None = None,
    trust: str | None = None,
) -> None:
    r"""Generate text from a prompt, streamed to the terminal, or from every prompt of a file.

    Args:
        checkpoint: A .ckpt file, a Hugging Face folder, or the name of a model on the Hugging Face Hub.
        prompt: Text to continue; empty starts a new document.
        prompts: File of JSON lines with the key `prompt`, instead of a prompt; other keys are copied to the output.
        out: Output file of JSON lines for `prompts`; it must not exist. Each row gets text, finish_reason (stop or
            length) and tokens. Finished rows are stored in OUT.partial, so the same command resumes after a kill.
        chat: Apply the tokenizer's chat template to prompts as user messages; rows can have `messages` instead.
        batch_size: Number of prompts of a file in a batch.
        max_new_tokens: Maximum number of tokens to generate. Generation also ends at the end of the document and at the
            end of the context.
        stop: Text that ends the generation, such as '\n\n' (escapes as in `split` of prepare), or a JSON list of texts.
            It is removed from the output. Empty means none.
        temperature: Divides the logits; 0 takes the most likely token each time (greedy).
        top_k: Sample from the k most likely tokens; 0 means all.
        top_p: Sample from the smallest set of tokens whose total probability reaches p.
        min_p: Exclude tokens less likely than this fraction of the most likely token's probability.
        repetition_penalty: Divides the logits of tokens that occur in the prompt or the output; 1 disables it.
        seed: Seed of the sampling. The output for a row depends on the seed and the row's index, not on other rows.
        context_length: Maximum number of tokens of prompt and output together; empty means the trained context length.
        trust: `module.Class` of a custom position scheme that the checkpoint uses; it is imported only if named here.
    """
    from ropepp_lit.errors import UsageError  # heavy imports follow the checks of the arguments

    if (prompts is None) != (out is None):
        raise UsageError("prompts: give --prompts FILE.jsonl and --out FILE.jsonl together")
    if prompts is not None and prompt:
        raise UsageError("prompt: give either --prompt or --prompts")
    if batch_size < 1:
        raise UsageError(f"batch_size: {batch_size} must be 1 or more")

    from pathlib import Path

    from ropepp_lit.inference.model import GenerationSettings, load_model, parse_stop
    from ropepp_lit.nn.sampling import Sampling

    writing = GenerationSettings(
        max_new_tokens=max_new_tokens,
        sampling=Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        ),
        seed=seed,
        stop_texts=parse_stop(stop),
    ).check()
    if out is not None and Path(out).exists():
        raise UsageError(f"out: {out}: already exists; name another file, or delete it")
    model = load_model(checkpoint, trust=trust, context_length=context_length)
    template = None
    if chat:
        from ropepp_lit.text.chat import ChatTemplate

        template = ChatTemplate.from_tokenizer(model.tokenizer)
    if prompts is not None and out is not None:
        from ropepp_lit.inference.prompts import PromptFile

        summary = PromptFile(Path(prompts), model, template).answer(Path(out), writing, batch_size=batch_size)
        resumed = f", {summary.resumed} of them before" if summary.resumed else ""
        print(f"{out}: {summary.rows} rows{resumed}")
        if summary.at_context:
            print(
                f"Notice: {summary.at_context} texts end where the model's context of {model.context_length:,} tokens "
                "does.",
                file=sys.stderr,
            )
        return
    from ropepp_lit.inference.completion import Stream
    from ropepp_lit.inference.prompts import encode_messages
    from ropepp_lit.nn.generation import Row

    ids = model.tokenizer.encode_prompt(prompt) if template is None else encode_messages(template, {"prompt": prompt})
    if model.remaining_tokens(ids) == 0:
        raise UsageError(
            f"prompt: it has {len(ids):,} tokens and leaves no room in the model's context of "
            f"{model.context_length:,}; shorten it, or give --context_length"
        )
    if template is None:
        print(prompt, end="", flush=True)
    stop_token_ids = template.end_of_turn if template is not None else []
    stream = Stream(model, Row(model.decoder), ids, writing, stop_token_ids=stop_token_ids)
    for text in stream:
        print(text, end="", flush=True)
    print()
    if stream.ends_at_context and stream.finish_reason == "length":
        print(
            f"Notice: the text ends where the model's context of {model.context_length:,} tokens does; "
            "--context_length allows more.",
            file=sys.stderr,
        )


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    call(generate, arguments)
