"""Conversations with a model: history, truncation to the context, and replies."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

from ropepp_lit.errors import UsageError
from ropepp_lit.files import local_path, write_errors, write_whole
from ropepp_lit.inference.completion import Stream
from ropepp_lit.inference.model import GenerationSettings, Model
from ropepp_lit.inference.prompts import encode_messages
from ropepp_lit.json_files import json_line
from ropepp_lit.nn.generation import Row
from ropepp_lit.text.chat import ChatTemplate

Messages = list[dict[str, str]]


class Conversation:
    """Conversation between a user and a model.

    The KV cache of the history is reused: each turn processes only the tokens after the prefix in common with the
    previous turn. If the history exceeds the context, its oldest turns are dropped from the prompt, but not from
    :attr:`messages`.

    Args:
        model: The model.
        template: Chat template.
        generation: Generation settings of replies.
        system: System message; empty for none.
        notify: Called with notices about dropped messages and truncated replies.

    Raises:
        UsageError: The template cannot render such a conversation.
    """

    def __init__(
        self,
        model: Model,
        template: ChatTemplate,
        generation: GenerationSettings,
        *,
        system: str = "",
        notify: Callable[[str], object],
    ) -> None:
        self._model, self._template, self._generation, self._notify = model, template, generation, notify
        self._system: Messages = [{"role": "system", "content": system}] if system else []
        self._row = Row(model.decoder)
        self._stop_token_ids = template.end_of_turn
        self._encode([{"role": "user", "content": "Hello"}])  # raises if the template does not support a system message
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages: Messages = []
        """Alternating messages of user and assistant, without the system message."""
        self._num_dropped = 0
        self.num_tokens = 0
        """Number of tokens of the conversation in the context."""

    @property
    def status(self) -> str:
        """Used tokens and context length, such as `123/2,048`."""
        end = "" if self._model.context_length is None else f"/{self._model.context_length:,}"
        return f"{self.num_tokens:,}{end}"

    def ask(self, text: str) -> Generator[str]:
        """Yield the reply to a message in parts, as soon as they are final.

        When the generator ends, is closed or is interrupted, the message and the reply generated so far are added to
        the conversation, unless the reply is empty.

        Raises:
            UsageError: The message alone exceeds the context, or the template cannot render it.
        """
        messages: Messages = [*self.messages, {"role": "user", "content": text}]
        ids, num_dropped = self._fit(messages)
        if num_dropped > self._num_dropped:
            self._notify(
                f"the {num_dropped - self._num_dropped} oldest messages are dropped from the prompt: the context "
                f"length is {self._model.context_length:,} tokens"
            )
        stream = Stream(
            self._model, self._row, ids, self._generation,
            stop_token_ids=self._stop_token_ids, index=len(self.messages) // 2,
        )  # fmt: skip
        parts, is_complete = [], False
        try:
            for part in stream:
                parts.append(part)
                yield part
            is_complete = True
        finally:
            reply = "".join(parts)
            if reply.strip():
                self.messages = [*messages, {"role": "assistant", "content": reply}]
                self._num_dropped, self.num_tokens = num_dropped, len(ids) + stream.num_tokens
        if not reply.strip():
            self._notify("the reply is empty; the message was removed")
        elif is_complete and stream.finish_reason == "length":
            reason = (
                "end of the context"
                if stream.ends_at_context
                else f"max_new_tokens is {self._generation.max_new_tokens}"
            )
            self._notify(f"the reply is truncated: {reason}")

    def save(self, name: str) -> None:
        """Write the messages to a new JSON Lines file for `prepare --format chat`.

        Raises:
            UsageError: There are no messages, or the file exists or cannot be written.
        """
        if not self.messages:
            raise UsageError("there are no messages to save yet")
        path = Path(local_path("save", name)).expanduser()
        if path.exists():
            raise UsageError(f"{path}: already exists; name another file")
        with write_errors(path):
            write_whole(path, json_line({"messages": [*self._system, *self.messages]}))

    def _fit(self, messages: Messages) -> tuple[list[int], int]:
        """Return the token ids of the prompt, and the number of messages dropped to reserve space for a reply."""
        num_dropped = self._num_dropped
        context = self._model.context_length
        ids = self._encode(messages[num_dropped:])
        if context is None:
            return ids, num_dropped
        reserved = min(self._generation.max_new_tokens, max(1, context // 4))
        while len(ids) + reserved > context and num_dropped < len(messages) - 1:
            num_dropped += 2  # a question and its answer, because many templates require alternating roles
            ids = self._encode(messages[num_dropped:])
        if len(ids) >= context:
            raise UsageError(
                f"the message has {len(ids):,} tokens with its template, but the context length is {context:,}; "
                "shorten it"
            )
        return ids, num_dropped

    def _encode(self, messages: Messages) -> list[int]:
        return encode_messages(self._template, {"messages": [*self._system, *messages]})
