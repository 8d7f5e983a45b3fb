"""`ropepp-lit chat`: a conversation with a checkpoint in the terminal."""

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
    r"""Talk with a checkpoint: each line of the input is a message. /help lists what else a line can be.

    Args:
        checkpoint: A .ckpt file, a Hugging Face folder, or the name of one on the Hugging Face Hub.
        system: The system's message; empty means none.
        chat_template: A file with a Jinja template instead of the tokenizer's own.
        max_new_tokens: Tokens of a reply at most; it ends with the assistant's turn, and with the context.
        stop: Text that ends a reply, such as '\n\n' (escapes as in prepare's split), or a JSON list of texts. It is
            left out. Empty means none.
        temperature: Divides the logits; 0 takes the most likely token each time (greedy).
        top_k: Sample from this many most likely tokens; 0 means all.
        top_p: Sample from the smallest set of tokens whose probability reaches this.
        min_p: Leave out tokens less likely than this share of the most likely one's probability.
        repetition_penalty: Divides the logits of tokens that are there already, the history's too; 1 changes nothing.
        seed: Of the sampling.
        context_length: Tokens of the history and a reply together; empty means those that the checkpoint was trained
            with. Where the history is longer, its oldest turns are left out.
        trust: `module.Class` of a position scheme of your own that the checkpoint was made with and may be imported.
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
