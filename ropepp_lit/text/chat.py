"""Render conversations by a tokenizer's chat template, as transformers does, and find their trained spans."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ropepp_lit.errors import UsageError
from ropepp_lit.text.chat_turns import Frame, find_turns
from ropepp_lit.text.conversations import KNOWN_ROLES, Conversation, RowError, content_texts
from ropepp_lit.text.tokenizer import TextTokenizer
from ropepp_lit.text.tokenizer_files import content_of
from ropepp_lit.text.trained_spans import Span, SpanTokenizer

Message = Mapping[str, Any]
"""Mapping with `role`, `content` (text, or a list of parts with a `type`) and other keys that templates read."""

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a template can reference, as in transformers."""

TRAIN_ON = ("assistant", "last", "all")
"""Choices of the trained tokens: every turn of the assistant, the last one, or every token."""

PROBE = "71071"
"""Message content for probing a template. It has digits only, so changes of letter case do not affect it."""

SPELLS_SPECIAL = "special tokens in message contents are parsed as special tokens"
NO_END = "no end-of-turn token after a trained turn"
"""Notices about conversations that are kept."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_NO_TEMPLATE = (
    "the tokenizer has no chat template; pass a file with a Jinja template by --chat_template, or a tokenizer that "
    "has one"
)


class ChatTemplateError(UsageError):
    """Error of a chat template that cannot render a conversation; the message includes the template's own message."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and its trained spans."""

    text: str
    spans: list[Span]
    notices: tuple[str, ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: Tokenizer of the rendered text.
        templates: Jinja templates by name: `default` and optionally `tool_use`, for conversations with tools.
        special_tokens: Values of :data:`SPECIAL_NAMES` that templates can use.
    """

    def __init__(
        self, tokenizer: TextTokenizer, templates: Mapping[str, str], special_tokens: Mapping[str, str]
    ) -> None:
        self._tokenizer, self._templates, self._special_tokens = tokenizer, dict(templates), dict(special_tokens)
        self._frames: dict[tuple[str, str], Frame] = {}
        self._content_type_cache: dict[str, tuple[bool, bool]] = {}

    @classmethod
    def from_tokenizer(cls, tokenizer: TextTokenizer, override: str | None = None) -> ChatTemplate:
        """Create the chat template that a tokenizer's settings define.

        Args:
            tokenizer: Tokenizer with `settings`, unless `override` is given.
            override: Jinja template that replaces the tokenizer's own (see :func:`read_template`).

        Raises:
            UsageError: There is no template, or none named `default`.
        """
        settings = tokenizer.settings or {}
        names = {name: content_of(settings.get(name)) for name in SPECIAL_NAMES}
        names["bos_token"], names["eos_token"] = (
            tokenizer.token(token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        template = settings.get("chat_template") if override is None else override
        return cls(
            tokenizer, _templates_by_name(template), {name: text for name, text in names.items() if text is not None}
        )

    @property
    def source(self) -> str:
        """Jinja source of the `default` template."""
        return self._templates["default"]

    @property
    def identity(self) -> dict[str, Any]:
        """Values that determine the rendered text: templates and special tokens."""
        return {"templates": self._templates, "special_tokens": self._special_tokens}

    @property
    def uses_date(self) -> bool:
        """Whether the text depends on the day on which it is rendered."""
        return any("strftime_now" in template for template in self._templates.values())

    @cached_property
    def tokens(self) -> SpanTokenizer:
        """Tokenizer for rendered conversations: it parses special tokens in the text and adds no others."""
        return SpanTokenizer(self._tokenizer.json, special_tokens=True)

    @property
    def frame(self) -> Frame:
        """Text that the template writes around the assistant's turns.

        Raises:
            UsageError: The template cannot render questions and answers.
        """
        return self._frame(self.source, {})

    @property
    def end_of_turn(self) -> list[int]:
        """Tokens that end an assistant's turn; empty if there is no end mark, or it is not a single added token."""
        tokens = (self.tokens.leading_added_token(end) for end in self.frame.ends)
        return list(dict.fromkeys(token for token in tokens if token is not None))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str:
        """Return the text of a conversation: transformers' `apply_chat_template(…, tokenize=False)`.

        Args:
            messages: One or more messages; content parts are joined if the template reads text only.
            tools: JSON schemas of the tools that the assistant can call.
            add_generation_prompt: Whether to append the text that opens the assistant's next turn.
            options: Further variables of the template, such as `enable_thinking`.

        Raises:
            ChatTemplateError: The template raises an error.
            RowError: A role is not known to the template.
        """
        template, options = self._template_for(tools), {**options, "add_generation_prompt": add_generation_prompt}
        return self._render(self._readable(messages, template), template, tools, options)[0]

    def render_trained(self, conversation: Conversation, train_on: str = "assistant") -> Rendered:
        """Return the text of a conversation and its trained spans.

        The trained spans are the assistant's turns with their end marks: the text between `{% generation %}` marks if
        the template has them, otherwise the turns that :func:`~.chat_turns.find_turns` finds.

        Args:
            conversation: Its content parts are joined if the template reads text only.
            train_on: One of :data:`TRAIN_ON`; answers within a prompt are trained with `all` only.

        Raises:
            ChatTemplateError: The template raises an error.
            RowError: A role is not known to the template, or an answer is not found in the text.
            UsageError: The template cannot render questions and answers at all.
        """
        tools, options = conversation.tools, conversation.options
        template = self._template_for(tools)
        messages = self._readable(conversation.messages, template)
        has_marks = _GENERATION.search(template) is not None
        text, marked = self._render(messages, template, tools, {**options, "return_assistant_tokens_mask": has_marks})
        notices = [SPELLS_SPECIAL] if self._spells_special(messages) else []
        if train_on == "all":
            return Rendered(text, [Span(0, len(text))], tuple(notices))
        frame = self._frame(template, options)
        spans = [Span(*pair) for pair in sorted(marked) if pair[0] < pair[1]]
        endings = tuple(frame.ends)
        is_ended = all(text[span.start : span.end].rstrip().endswith(endings) for span in spans) if endings else False
        if not has_marks or train_on == "last" or conversation.prompt_messages:
            turns = find_turns(messages, text, lambda marked: self._render(marked, template, tools, options)[0], frame)
            turns = [turn for turn in turns if turn.message >= conversation.prompt_messages]
            turns = turns[-1:] if train_on == "last" else turns
            if has_marks:
                spans = [s for s in spans if any(s.start < t.span.end and t.span.start < s.end for t in turns)]
            else:
                spans, is_ended = [turn.span for turn in turns], all(turn.is_ended for turn in turns)
        if spans and not is_ended:
            notices.append(NO_END)
        return Rendered(text, spans, tuple(notices))

    def encode(self, conversation: Conversation, train_on: str = "assistant") -> tuple[np.ndarray, np.ndarray]:
        """Tokenize a conversation, as transformers' `apply_chat_template` does, with a mask of the trained tokens.

        Args:
            conversation: Conversation; see :meth:`render_trained`, also for the errors raised.
            train_on: One of :data:`TRAIN_ON`.

        Returns:
            Token ids, [tokens] int32, and the mask, [tokens] bool.
        """
        rendered = self.render_trained(conversation, train_on)
        return self.tokens.encode([rendered.text], [rendered.spans])[0]

    def _render(
        self, messages: Sequence[Message], template: str, tools: Sequence[Any] | None, options: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and, if `return_assistant_tokens_mask` is set, the ranges of `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template  # takes a second to import

        render: Any = render_jinja_template  # its annotation is wrong
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            texts, marked = render(
                conversations=[plain],
                tools=None if tools is None else list(tools),
                chat_template=template,
                **{**self._special_tokens, **options},
            )
        except Exception as error:  # a template can raise anything, such as TypeError of None + text
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            line = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", line)  # it can quote message contents
            raise ChatTemplateError(f"the chat template cannot render it: {line}") from error
        return texts[0], marked[0] if marked else []

    def _template_for(self, tools: Sequence[Any] | None) -> str:
        return self._templates.get("tool_use", self.source) if tools is not None else self.source

    def _frame(self, template: str, options: dict[str, Any]) -> Frame:
        key = template, json.dumps(options, sort_keys=True, default=str)
        if key not in self._frames:

            def render(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
                prompt = {"add_generation_prompt": add_generation_prompt}
                return self._render(self._readable(messages, template), template, None, {**options, **prompt})[0]

            try:
                self._frames[key] = Frame.of(render, self.tokens.added())
            except ChatTemplateError as error:
                problem = str(error).removeprefix("the chat template cannot render it: ")
                raise UsageError(
                    f"chat_template: it cannot render two questions with answers ({problem}); use another template"
                ) from error
        return self._frames[key]

    def _readable(self, messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
        """Convert message contents to the form that the template reads: text or parts.

        Raises:
            RowError: A role is neither a known one nor mentioned in the template.
        """
        for role in {message["role"] for message in messages} - KNOWN_ROLES:
            if role not in template:
                raise RowError(f"unknown role {role[:50]!r}, which the chat template does not mention")
        reads_text, reads_parts = self._content_types(template)
        return [_readable(message, reads_text=reads_text, reads_parts=reads_parts) for message in messages]

    def _content_types(self, template: str) -> tuple[bool, bool]:
        """Return whether a template reads text contents, and whether it reads lists of parts."""
        if template not in self._content_type_cache:
            accepted = []
            for content in (PROBE, [{"type": "text", "text": PROBE}]):
                try:
                    text = self._render([{"role": "user", "content": content}], template, None, {})[0]
                except ChatTemplateError:
                    text = ""
                accepted.append(PROBE in text and not re.search(rf"""['"]text['"]\s*:\s*['"]{PROBE}""", text))
            self._content_type_cache[template] = accepted[0], accepted[1]
        return self._content_type_cache[template]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.tokens.added(special=True))) or "(?!)")

    def _spells_special(self, messages: Sequence[Message]) -> bool:
        return any(self._special.search(text) for message in messages for text in content_texts(message))


def _readable(message: Message, *, reads_text: bool, reads_parts: bool) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and not reads_parts:
        return {**message, "content": "".join(content_texts(message))}
    if isinstance(content, str) and reads_parts and not reads_text:
        return {**message, "content": [{"type": "text", "text": content}]}
    return dict(message)


def read_template(name: str) -> str:
    """Read a Jinja template from a file.

    Raises:
        UsageError: The file cannot be read, or is empty.
    """
    try:
        text = Path(name).expanduser().read_bytes().decode()  # keeps line ends, which checkpoints preserve
    except (OSError, UnicodeDecodeError) as error:
        line = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"chat_template: {name}: {line}; pass a file with a Jinja template") from error
    if not text.strip():
        raise UsageError(f"chat_template: {name}: empty; pass a file with a Jinja template")
    return text


def _templates_by_name(value: Any) -> dict[str, str]:
    """Return templates by name from `chat_template` of tokenizer_config.json: a string, a list or an object."""
    if isinstance(value, str) and value.strip():
        return {"default": value}
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if not isinstance(value, dict) or not value:
        raise UsageError(f"chat_template: {_NO_TEMPLATE}")
    templates = {str(name): text for name, text in value.items() if isinstance(text, str)}
    if "default" not in templates:
        names = ", ".join(map(repr, templates)) or "none"
        raise UsageError(
            f"chat_template: none of the tokenizer's named templates is 'default' ({names}); write the one to use into "
            "a file and pass it by --chat_template"
        )
    return templates
