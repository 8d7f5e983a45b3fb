"""Conversations as text: a tokenizer's chat template, rendered as transformers renders it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ropepp_lit.errors import UsageError
from ropepp_lit.text.tokenizer import TextTokenizer
from ropepp_lit.text.tokenizer_files import content_of

Message = Mapping[str, Any]
"""`role` and `content` (text, or a list of parts with a `type`), and whatever else a template reads."""

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a template can name, as in transformers."""

_NO_TEMPLATE = (
    "the tokenizer has no chat template; name a file with a Jinja template by --chat_template, or a tokenizer that "
    "has one"
)


class ChatTemplateError(UsageError):
    """A chat template cannot render a conversation; the message is the template's own."""


class ChatTemplate:
    """The template by which conversations become text.

    Args:
        templates: Jinja templates by name: `default`, and where there is one `tool_use`, for conversations with tools.
        special_tokens: Values of :data:`SPECIAL_NAMES` that templates may use.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates, self._special_tokens = dict(templates), dict(special_tokens)

    @classmethod
    def from_tokenizer(cls, tokenizer: TextTokenizer, override: str | None = None) -> ChatTemplate:
        """The template of a tokenizer's settings.

        Args:
            tokenizer: With `settings`, unless there is an override.
            override: A Jinja template instead of the tokenizer's own (see :func:`read_template`).

        Raises:
            UsageError: there is none, or none that is called `default`.
        """
        settings = tokenizer.settings or {}
        names = {name: content_of(settings.get(name)) for name in SPECIAL_NAMES}
        names["bos_token"], names["eos_token"] = (
            tokenizer.token(token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        found = settings.get("chat_template") if override is None else override
        return cls(_by_name(found), {name: text for name, text in names.items() if text is not None})

    @property
    def source(self) -> str:
        """The Jinja template; of several the one that is called `default`."""
        return self._templates["default"]

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation: transformers' `apply_chat_template(…, tokenize=False)`.

        Args:
            messages: At least one.
            tools: JSON schemas of the tools that the assistant may call.
            add_generation_prompt: Whether what opens the assistant's next turn stands behind the conversation.

        Raises:
            ChatTemplateError: the template raises an error.
        """
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text of a conversation, and where `{% generation %}` marks stand if `return_assistant_tokens_mask` asks."""
        from transformers.utils.chat_template_utils import render_jinja_template  # takes a second to import

        render: Any = render_jinja_template  # its type is wrong
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            texts, marked = render(
                conversations=[plain],
                tools=None if tools is None else list(tools),
                chat_template=self._template_for(tools),
                **options,
                **self._special_tokens,
            )
        except Exception as error:  # a template can raise anything, such as TypeError of None + text
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ChatTemplateError(f"the chat template cannot render it: {line}") from error
        return texts[0], marked[0] if marked else []

    def _template_for(self, tools: Sequence[Any] | None) -> str:
        return self._templates.get("tool_use", self.source) if tools is not None else self.source


def read_template(name: str) -> str:
    """The Jinja template in a file.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        line = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"chat_template: {name}: {line}; name a file with a Jinja template") from error
    if not text.strip():
        raise UsageError(f"chat_template: {name}: empty; name a file with a Jinja template")
    return text


def _by_name(found: Any) -> dict[str, str]:
    """Templates by name, of the value of `chat_template` in tokenizer_config.json: a text, a list or an object."""
    if isinstance(found, str) and found.strip():
        return {"default": found}
    if isinstance(found, list):
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
    if not isinstance(found, dict) or not found:
        raise UsageError(f"chat_template: {_NO_TEMPLATE}")
    templates = {str(name): text for name, text in found.items() if isinstance(text, str)}
    if "default" not in templates:
        names = ", ".join(map(repr, templates)) or "none"
        raise UsageError(
            f"chat_template: the tokenizer has templates by name, and none is called 'default' ({names}); write the "
            "one to use into a file and name it by --chat_template"
        )
    return templates
