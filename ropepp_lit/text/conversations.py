"""Parse rows of fine-tuning data: messages with roles, or a prompt and its completion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ropepp_lit.json_files import parse_json

CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion", "tools", "system", "chat_template_kwargs")
"""Keys or columns of rows with conversations."""

COMPLETION_COLUMNS = ("prompt", "completion")
"""Keys or columns of rows with a prompt and its completion."""

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
"""Keys or columns of rows with a chosen and a rejected answer."""

ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatbot": "assistant", "bot": "assistant",
    "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Roles of messages with `from` and `value`, mapped to the roles of chat templates."""

KNOWN_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
"""Accepted roles of messages with `role` and `content`, in addition to those that the template mentions."""

SPLIT_THINKING = "</think>"
"""Tag that ends the reasoning within an assistant's content."""


class RowError(ValueError):
    """Error of a row that is not a valid conversation; the message states the reason."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The input of a chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""
    prompt_messages: int = 0
    """Number of messages at the beginning that are the prompt: answers among them are not trained."""


def parse_conversation(row: Mapping[str, Any], column: str | None = None) -> Conversation:
    """Parse the conversation of a row.

    Args:
        row: Row with `messages`, `conversations`, or `prompt` and `completion` (lists of messages), and optionally
            `tools`, `system` and `chat_template_kwargs`. Each value can be a JSON string.
        column: Key of the messages, instead of the default ones.

    Raises:
        RowError: The row has no messages, or one is not valid.
    """
    key = column or next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    prompt_messages = 0
    if key is not None:
        if row.get(key) is None:
            raise RowError(f"no key {key!r}")
        messages = _messages(_parsed(row[key], key), key)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        if isinstance(_parsed(row["prompt"]), str) or isinstance(_parsed(row["completion"]), str):
            raise RowError("prompt and completion are strings, not lists of messages: use --format completion")
        prompt = _messages(_parsed(row["prompt"], "prompt"), "prompt")
        messages = prompt + _messages(_parsed(row["completion"], "completion"), "completion")
        prompt_messages = len(prompt)
    else:
        raise RowError("no key messages or conversations, and no keys prompt and completion")
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        if messages[0]["role"] in ("system", "developer"):
            raise RowError("both a system message and a key 'system'")
        messages, prompt_messages = [{"role": "system", "content": system}, *messages], prompt_messages + 1
    tools, options = (_parsed(row.get(name)) or None for name in ("tools", "chat_template_kwargs"))
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("tools is not a list of objects")
    if options is not None and not isinstance(options, dict):
        raise RowError("chat_template_kwargs is not an object")
    return Conversation(messages=messages, tools=tools, options=options or {}, prompt_messages=prompt_messages)


def parse_completion(row: Mapping[str, Any], columns: tuple[str, str]) -> tuple[str, str]:
    """Return the prompt and the completion of a row.

    Raises:
        RowError: One of them is missing or not a string, or the completion is empty.
    """
    texts = [row.get(name) for name in columns]
    for name, text in zip(columns, texts, strict=True):
        if text is None:
            raise RowError(f"no key {name!r}")
        if not isinstance(text, str):
            raise RowError(f"{name} is not a string (lists of messages are for --format chat or chat_pairs)")
    if not texts[1]:
        raise RowError(f"an empty {columns[1]}")
    return str(texts[0]), str(texts[1])


def parse_conversation_pair(row: Mapping[str, Any], columns: tuple[str, str, str]) -> tuple[Conversation, Conversation]:
    """Return the conversations that end with the chosen and with the rejected answer of a row.

    Args:
        row: Row with the answers, lists of messages or strings, and optionally `tools`, `system` and
            `chat_template_kwargs`. The prompt is a list of messages or a string; if it is missing, or the answers
            begin with it, the prompt is the common prefix of both lists of messages.
        columns: Keys of prompt, chosen and rejected answer.

    Raises:
        RowError: One of them is missing or has another type, or the answers are equal.
    """
    prompt_key, *keys = columns
    prompt = _parsed(row.get(prompt_key), prompt_key)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = [] if prompt is None else _messages(prompt, prompt_key)
    answers = []
    for key in keys:
        value = _parsed(row.get(key), key)
        if value is None:
            raise RowError(f"no key {key!r}")
        answers.append(_messages([{"role": "assistant", "content": value}] if isinstance(value, str) else value, key))
    chosen, rejected = answers
    if all(answer[: len(prompt)] == prompt for answer in answers):  # also without a prompt
        shared = 0
        while shared < min(map(len, answers)) and chosen[shared] == rejected[shared]:
            shared += 1
    else:
        chosen, rejected, shared = prompt + chosen, prompt + rejected, len(prompt)
    if chosen == rejected:
        raise RowError(f"{keys[0]} and {keys[1]} are the same")
    if not shared:
        raise RowError("no prompt")
    for key, messages in zip(keys, (chosen, rejected), strict=True):
        if len(messages) == shared:
            raise RowError(f"no answer in {key}")
    others = {name: row.get(name) for name in ("tools", "system", "chat_template_kwargs")}
    pair = (
        parse_conversation({"prompt": messages[:shared], "completion": messages[shared:], **others})
        for messages in (chosen, rejected)
    )
    return next(pair), next(pair)


def parse_completion_pair(row: Mapping[str, Any], columns: tuple[str, str, str]) -> tuple[str, str, str]:
    """Return the prompt, the chosen and the rejected completion of a row.

    Raises:
        RowError: One of them is missing or not a string, a completion is empty, or they are equal.
    """
    prompt, *keys = columns
    (text, chosen), (_, rejected) = (parse_completion(row, (prompt, key)) for key in keys)
    if chosen == rejected:
        raise RowError(f"{keys[0]} and {keys[1]} are the same")
    return text, chosen, rejected


def _parsed(value: Any, name: str = "") -> Any:
    """Parse a value that is a JSON string of an array or object; return other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError as error:
            if name:
                raise RowError(f"{name} is broken JSON") from error
    return value


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} has no messages" if value == [] else f"{name} is not a list of messages")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError("a message is not an object")
    if "role" not in message and "from" in message:
        role, content = message["from"], message.get("value")
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(f"a message from an unknown role {str(role)[:50]!r}")
        others = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": ROLES[role], "content": content, **others}
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if not isinstance(role, str):
        raise RowError("a message without a role")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RowError("a part of a message is not text")
    elif not isinstance(content, str | None):
        raise RowError("a message's content is not a string")
    if calls is not None and not isinstance(calls, list):
        raise RowError("tool_calls is not a list")
    if role == "assistant" and not calls and not "".join(content_texts(message)).strip():
        raise RowError("an empty answer")
    return dict(message)


def content_texts(message: Mapping[str, Any]) -> Iterable[str]:
    """Return the texts of a message's content."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or []]
