"""`ropepp-lit generate`: a checkpoint writes to the terminal."""

from __future__ import annotations

import sys

from ropepp_lit.arguments import call


def generate(
    checkpoint: str,
    *,
    prompt: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    trust: str | None = None,
) -> None:
    """Let a checkpoint continue a prompt, streamed to the terminal.

    Args:
        checkpoint: A .ckpt file, a Hugging Face folder, or the name of one on the Hugging Face Hub.
        prompt: What the model continues; empty starts a new document.
        max_new_tokens: Tokens to write at most; writing ends with the document.
        temperature: Divides the logits; 0 takes the most likely token each time (greedy).
        top_p: Sample from the smallest set of tokens whose probability reaches this.
        seed: Of the sampling.
        trust: `module.Class` of a position scheme of your own that the checkpoint was made with and may be imported.
    """
    import torch  # heavy imports wait until the arguments are known to be right

    from ropepp_lit.checkpoint import KEY, load_decoder
    from ropepp_lit.errors import UsageError
    from ropepp_lit.hf.folder import describe_dtypes, open_checkpoint
    from ropepp_lit.nn import generation
    from ropepp_lit.text.stream import TextStream
    from ropepp_lit.text.tokenizer import TextTokenizer

    generation.check_sampling("", temperature, top_p)
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: {max_new_tokens} must be 1 or more")
    contents = open_checkpoint(checkpoint)
    ours = contents[KEY]
    if ours["tokenizer"] is None:
        raise UsageError(f"{checkpoint}: the checkpoint stores no tokenizer, so it cannot read a prompt or write text")
    if notice := describe_dtypes(contents):
        print(f"Notice: {notice}; computed in the first.", file=sys.stderr)
    tokenizer = TextTokenizer.from_entry(ours)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = load_decoder(contents, trust=trust).to(device)
    ids = tokenizer.encode_prompt(prompt)
    print(prompt, end="", flush=True)
    stream = TextStream(tokenizer, ids)
    for token in generation.generate(
        decoder,
        torch.tensor([ids], device=device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
    ):
        if int(token) in tokenizer.stop_token_ids:
            break
        print(stream.push(int(token)), end="", flush=True)
    print(stream.finish())


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    call(generate, arguments)
