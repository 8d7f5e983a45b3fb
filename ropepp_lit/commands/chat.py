"""`ropepp-lit chat`: interactive conversation with a model in the terminal."""

from __future__ import annotations

from ropepp_lit.arguments import call


def chat(
    checkpoint: str,
    *,
    system: str = "",
    chat_template: str | None = None,
    max_new_tokens: int = 512,
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
    r"""Chat with a model in the terminal. Each line of input is a message; /help lists the commands.

    Args:
        checkpoint: A .ckpt file, a Hugging Face folder, or the name of a model on the Hugging Face Hub.
        system: System message; empty means none.
        chat_template: File with a Jinja template that replaces the tokenizer's.
        max_new_tokens: Maximum number of tokens in a reply. A reply also ends at the end of the assistant's turn and
            at the end of the context.
        stop: Text that ends a reply, such as '\n\n' (escapes as in `split` of prepare), or a JSON list of texts. It is
            removed from the reply. Empty means none.
        temperature: Divides the logits; 0 takes the most likely token each time (greedy).
        top_k: Sample from the k most likely tokens; 0 means all.
        top_p: Sample from the smallest set of tokens whose total probability reaches p.
        min_p: Exclude tokens less likely than this fraction of the most likely token's probability.
        repetition_penalty: Divides the logits of tokens that occur in the history or the reply; 1 disables it.
        seed: Seed of the sampling.
        context_length: Maximum number of tokens of history and reply together; empty means the trained context length.
            If the history is longer, its oldest turns are dropped.
        trust: `module.Class` of a custom position scheme that the checkpoint uses; it is imported only if named here.
    """
    from ropepp_lit.inference.conversation import Conversation  # heavy imports wait until the arguments are parsed
    from ropepp_lit.inference.model import GenerationSettings, load_model, parse_stop
    from ropepp_lit.inference.terminal_chat import notify, talk
    from ropepp_lit.nn.sampling import Sampling
    from ropepp_lit.text.chat import ChatTemplate, read_template

    writing = GenerationSettings(
        max_new_tokens=max_new_tokens,
        sampling=Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        ),
        seed=seed,
        stop_texts=parse_stop(stop),
    ).check()
    override = None if chat_template is None else read_template(chat_template)
    model = load_model(checkpoint, trust=trust, context_length=context_length)
    template = ChatTemplate.from_tokenizer(model.tokenizer, override)
    talk(Conversation(model, template, writing, system=system, notify=notify))


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    call(chat, arguments)
