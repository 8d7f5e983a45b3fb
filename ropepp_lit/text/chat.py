"""Conversations as text: a tokenizer's chat template, rendered as transformers renders it."""

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
from ropepp_lit.text.conversations import KNOWN_ROLES, Conversation, RowError, texts_of
from ropepp_lit.text.tokenizer import TextTokenizer
from ropepp_lit.text.tokenizer_files import content_of
from ropepp_lit.text.trained_spans import Span, SpanTokenizer

Message = Mapping[str, Any]
"""`role` and `content` (text, or a list of parts with a `type`), and whatever else a template reads."""

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a template can name, as in transformers."""

TRAIN_ON = ("assistant", "last", "all")
"""What is trained of a conversation: every turn of the assistant, the last one, or every token."""

PROBE = "71071"
"""A content by which a template is tried: whatever a template does to letters, it stays."""

SPELLS_SPECIAL, NO_END = "contents spell special tokens, which are read as such", "no end mark behind a trained turn"
"""What is worth a notice in a conversation that is kept."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_NO_TEMPLATE = (
    "the tokenizer has no chat template; name a file with a Jinja template by --chat_template, or a tokenizer that "
    "has one"
)


class ChatTemplateError(UsageError):
    """A chat template cannot render a conversation; the message has the template's own."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and what of it is trained."""

    text: str
    spans: list[Span]
    notices: tuple[str, ...] = ()


class ChatTemplate:
    """The template by which conversations become text.

    Args:
        tokenizer: Of the text.
        templates: Jinja templates by name: `default`, and where there is one `tool_use`, for conversations with tools.
        special_tokens: Values of :data:`SPECIAL_NAMES` that templates may use.
    """

    def __init__(
        self, tokenizer: TextTokenizer, templates: Mapping[str, str], special_tokens: Mapping[str, str]
    ) -> None:
        self._tokenizer, self._templates, self._special_tokens = tokenizer, dict(templates), dict(special_tokens)
        self._frames: dict[tuple[str, str], Frame] = {}
        self._kinds: dict[str, tuple[bool, bool]] = {}

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
        return cls(tokenizer, _by_name(found), {name: text for name, text in names.items() if text is not None})

    @property
    def source(self) -> str:
        """The Jinja template; of several the one that is called `default`."""
        return self._templates["default"]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the text of conversations: templates and special tokens."""
        return {"templates": self._templates, "special_tokens": self._special_tokens}

    @property
    def uses_date(self) -> bool:
        """Whether the text depends on the day on which it is rendered."""
        return any("strftime_now" in template for template in self._templates.values())

    @cached_property
    def tokens(self) -> SpanTokenizer:
        """The tokenizer of rendered conversations: special tokens in them are tokens, and nothing is added."""
        return SpanTokenizer(self._tokenizer.json, special_tokens=True)

    @property
    def frame(self) -> Frame:
        """What the template writes around the assistant's turns.

        Raises:
            UsageError: it cannot render questions and answers.
        """
        return self._frame(self.source, {})

    @property
    def end_of_turn(self) -> list[int]:
        """Tokens that end an assistant's turn; empty where nothing does, or text that is not a token of its own."""
        found = (self.tokens.first_added(end) for end in self.frame.ends)
        return list(dict.fromkeys(token for token in found if token is not None))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str:
        """The text of a conversation: transformers' `apply_chat_template(…, tokenize=False)`.

        Args:
            messages: At least one; contents in parts are joined where the template reads text alone.
            tools: JSON schemas of the tools that the assistant may call.
            add_generation_prompt: Whether what opens the assistant's next turn stands behind the conversation.
            options: Further variables of the template, such as `enable_thinking`.

        Raises:
            ChatTemplateError: the template raises an error.
            RowError: a role that the template does not know.
        """
        template, options = self._template_for(tools), {**options, "add_generation_prompt": add_generation_prompt}
        return self._render(self._readable(messages, template), template, tools, options)[0]

    def render_trained(self, conversation: Conversation, train_on: str = "assistant") -> Rendered:
        """The text of a conversation, and what of it is trained.

        Trained is what the assistant writes, with the end mark of its turn: where the template has
        `{% generation %}` marks what stands between them, else what :func:`~.chat_turns.find_turns` finds.

        Args:
            conversation: Contents in parts are joined where the template reads text alone.
            train_on: One of :data:`TRAIN_ON`; answers within a prompt are trained with `all` alone.

        Raises:
            ChatTemplateError: the template raises an error.
            RowError: a role that the template does not know, or an answer that is not found in the text.
            UsageError: the template cannot render questions and answers at all.
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
        """Token ids of a conversation, those of transformers' `apply_chat_template`, and which of them are trained.

        Args:
            conversation: See :meth:`render_trained`, which also says what it raises.
            train_on: One of :data:`TRAIN_ON`.

        Returns:
            [tokens] int32 and [tokens] bool.
        """
        rendered = self.render_trained(conversation, train_on)
        return self.tokens.encode([rendered.text], [rendered.spans])[0]

    def _render(
        self, messages: Sequence[Message], template: str, tools: Sequence[Any] | None, options: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text of a conversation, and where `{% generation %}` marks stand if `return_assistant_tokens_mask` asks."""
        from transformers.utils.chat_template_utils import render_jinja_template  # takes a second to import

        render: Any = render_jinja_template  # its type is wrong
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
            line = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", line)  # it can repeat contents
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
                    f"chat_template: it cannot render two questions with answers ({problem}); name another template"
                ) from error
        return self._frames[key]

    def _readable(self, messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
        """Messages as the template can read them: contents as text where it reads no parts, and the other way round.

        Raises:
            RowError: a role that is not known and that the template does not name.
        """
        for role in {message["role"] for message in messages} - KNOWN_ROLES:
            if role not in template:
                raise RowError(f"a role {role[:50]!r}, which the chat template does not name")
        reads_text, reads_parts = self._kinds_of_content(template)
        return [_readable(message, reads_text=reads_text, reads_parts=reads_parts) for message in messages]

    def _kinds_of_content(self, template: str) -> tuple[bool, bool]:
        """Whether a template reads contents that are text, and contents in parts."""
        if template not in self._kinds:
            found = []
            for content in (PROBE, [{"type": "text", "text": PROBE}]):
                try:
                    text = self._render([{"role": "user", "content": content}], template, None, {})[0]
                except ChatTemplateError:
                    text = ""
                found.append(PROBE in text and not re.search(rf"""['"]text['"]\s*:\s*['"]{PROBE}""", text))
            self._kinds[template] = found[0], found[1]
        return self._kinds[template]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.tokens.added(special=True))) or "(?!)")

    def _spells_special(self, messages: Sequence[Message]) -> bool:
        return any(self._special.search(text) for message in messages for text in texts_of(message))


def _readable(message: Message, *, reads_text: bool, reads_parts: bool) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and not reads_parts:
        return {**message, "content": "".join(texts_of(message))}
    if isinstance(content, str) and reads_parts and not reads_text:
        return {**message, "content": [{"type": "text", "text": content}]}
    return dict(message)


def read_template(name: str) -> str:
    """The Jinja template in a file.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
    try:
        text = Path(name).expanduser().read_bytes().decode()  # with its line ends, which a checkpoint keeps
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
