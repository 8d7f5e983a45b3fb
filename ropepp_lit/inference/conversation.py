"""A conversation with a model: its history, as much of it as the context holds, and the replies."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

from ropepp_lit.errors import UsageError
from ropepp_lit.files import local_path, write_errors, write_whole
from ropepp_lit.inference.completion import Stream
from ropepp_lit.inference.model import Model, Writing
from ropepp_lit.inference.prompts import encode_messages
from ropepp_lit.json_files import json_line
from ropepp_lit.nn.generation import Row
from ropepp_lit.text.chat import ChatTemplate

Messages = list[dict[str, str]]


class Conversation:
    """Messages of a user and a model by turns.

    Keys and values of the history stay in the cache: each turn reads only what stands behind the tokens that the
    template leaves as they were. Where the history outgrows the context, its oldest turns are left out of what the
    model reads; :attr:`messages` keeps them.

    Args:
        model: What replies.
        template: By which messages become text.
        writing: Settings of replies.
        system: The system's message; empty means none.
        notify: Gets lines on what was left out or cut.

    Raises:
        UsageError: the template cannot render such a conversation.
    """

    def __init__(
        self,
        model: Model,
        template: ChatTemplate,
        writing: Writing,
        *,
        system: str = "",
        notify: Callable[[str], object],
    ) -> None:
        self._model, self._template, self._writing, self._notify = model, template, writing, notify
        self._system: Messages = [{"role": "system", "content": system}] if system else []
        self._row = Row(model.decoder)
        self._stop_token_ids = template.end_of_turn
        self._encode([{"role": "user", "content": "Hello"}])  # raises where the template knows no system message
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages: Messages = []
        """Of user and assistant by turns, without the system's."""
        self._left_out = 0
        self.num_tokens = 0
        """Tokens of the context that the conversation has taken."""

    @property
    def status(self) -> str:
        """Tokens taken and those of the context, such as `123/2,048`."""
        end = "" if self._model.context_length is None else f"/{self._model.context_length:,}"
        return f"{self.num_tokens:,}{end}"

    def ask(self, text: str) -> Generator[str]:
        """The reply to a message, in parts as they are certain.

        When it ends, or is closed or interrupted, the message and what there is of the reply become part of the
        conversation; a message without any reply does not.

        Raises:
            UsageError: the message alone is longer than the context, or the template cannot render it.
        """
        messages: Messages = [*self.messages, {"role": "user", "content": text}]
        ids, left_out = self._fit(messages)
        if left_out > self._left_out:
            self._notify(
                f"the {left_out - self._left_out} oldest messages are left out from here on: the context holds "
                f"{self._model.context_length:,} tokens"
            )
        stream = Stream(
            self._model, self._row, ids, self._writing,
            stop_token_ids=self._stop_token_ids, index=len(self.messages) // 2,
        )  # fmt: skip
        parts, is_whole = [], False
        try:
            for part in stream:
                parts.append(part)
                yield part
            is_whole = True
        finally:
            reply = "".join(parts)
            if reply.strip():
                self.messages = [*messages, {"role": "assistant", "content": reply}]
                self._left_out, self.num_tokens = left_out, len(ids) + stream.num_tokens
        if not reply.strip():
            self._notify("an empty reply; the message is taken back")
        elif is_whole and stream.finish_reason == "length":
            end = "the context ends" if stream.ends_at_context else f"max_new_tokens is {self._writing.max_new_tokens}"
            self._notify(f"the reply is cut: {end}")

    def save(self, name: str) -> None:
        """Write the messages into a new file of JSON lines that `prepare --format chat` reads.

        Raises:
            UsageError: there are none, or the file exists or cannot be written.
        """
        if not self.messages:
            raise UsageError("there are no messages to save yet")
        path = Path(local_path("save", name)).expanduser()
        if path.exists():
            raise UsageError(f"{path}: already exists; name another file")
        with write_errors(path):
            write_whole(path, json_line({"messages": [*self._system, *self.messages]}))

    def _fit(self, messages: Messages) -> tuple[list[int], int]:
        """Token ids of the prompt, and how many messages it leaves out so that there is room for a reply."""
        left_out = self._left_out
        context = self._model.context_length
        ids = self._encode(messages[left_out:])
        if context is None:
            return ids, left_out
        room = min(self._writing.max_new_tokens, max(1, context // 4))
        while len(ids) + room > context and left_out < len(messages) - 1:
            left_out += 2  # a question and its answer: many templates want the two by turns
            ids = self._encode(messages[left_out:])
        if len(ids) >= context:
            raise UsageError(
                f"the message takes {len(ids):,} tokens with what stands around it, and the context holds {context:,}; "
                "shorten it"
            )
        return ids, left_out

    def _encode(self, messages: Messages) -> list[int]:
        return encode_messages(self._template, {"messages": [*self._system, *messages]})
