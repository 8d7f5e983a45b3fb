"""Locate the assistant's turns in a conversation rendered by any chat template.

Prefixes of a conversation are not rendered: templates render them differently from the full conversation (they drop
earlier reasoning, write an end mark only once, merge messages). Instead, the conversation is rendered a second time
with marks in its messages: private-use characters that occur nowhere else. The result without the marks must equal the
first rendering; then their positions are exact, even if an answer is "assistant" or repeats the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from ropepp_lit.errors import UsageError
from ropepp_lit.text.conversations import SPLIT_THINKING, RowError
from ropepp_lit.text.trained_spans import Span

Render = Callable[..., str]
"""Function that renders messages to text; it takes `add_generation_prompt` by keyword."""

FIRST_MARK = 0xF0000
"""First code point of a Unicode private-use plane."""


class Turn(NamedTuple):
    """The assistant's turn for one message."""

    message: int
    """Index of the message in the conversation."""
    span: Span
    """Characters after the turn's opening, up to and including its end mark."""
    is_ended: bool
    """Whether the turn has an end mark."""


@dataclass(frozen=True)
class Frame:
    """Text that a template writes around an assistant's turn."""

    openings: tuple[str, ...]
    """Strings before the assistant's answer: the generation prompt, then the string that opens earlier turns."""
    ends: tuple[str, ...]
    """End marks of a turn, without surrounding white space; empty if there are none."""

    @classmethod
    def of(cls, render: Render, added: Sequence[str]) -> Frame:
        """Infer the frame by rendering a probe conversation.

        Args:
            render: Renders by the template.
            added: Tokens added to the vocabulary, longest first.

        Raises:
            UsageError: The template cannot render questions and answers, or omits one.
        """
        words = ("71071", "82082", "73073", "84084")  # digits are not affected by changes of letter case
        messages = [{"role": "assistant" if n % 2 else "user", "content": word} for n, word in enumerate(words)]
        text, question = render(messages), render(messages[:1])
        prompt = render(messages[:1], add_generation_prompt=True)
        gaps = re.split("|".join(words), text)
        if len(gaps) != 5 or words[0] not in question or words[0] not in prompt:
            raise UsageError("chat_template: it omits a message, or writes one twice; use another template")
        before, lead, between, _, last = gaps[0], gaps[1], gaps[2], gaps[3], gaps[4]
        closed, opened = (text.partition(words[0])[2] for text in (question, prompt))
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(closed, opened, strict=False)))
        opening = opened[shared:]
        if not opening and lead.startswith(opened) and not lead[len(opened) :].strip():
            opening = opened  # as in "[INST] question [/INST] answer": the end of the question opens the answer
        return cls(
            openings=(opening, lead) if opening else (lead,), ends=_infer_ends(between, last, before, opening, added)
        )


def _infer_ends(between: str, last: str, before: str, opening: str, added: Sequence[str]) -> tuple[str, ...]:
    """Return the end marks of a turn, within a conversation and at its end.

    Args:
        between: Text between an answer and the next question.
        last: Text after the last answer.
        before: Text before the first question.
        opening: The generation prompt.
        added: Tokens added to the vocabulary.
    """
    end = last.strip()
    if end and between.lstrip().startswith(end):
        return (end,)
    pattern = "|".join(map(re.escape, added)) or "(?!)"
    pieces = [re.split(f"({pattern})", text.strip()) for text in (between, last)]
    common = takewhile(lambda pair: pair[0] == pair[1], zip(*pieces, strict=False))
    if both := "".join(piece for piece, _ in common).strip():
        return (both,)  # the last turn is followed by text that ends the conversation
    marks = re.findall(pattern, between)
    ends = [end] if end else []
    if (
        marks
        and between.lstrip().startswith(marks[0])
        and marks[0] not in opening
        and (len(marks) > 1 or not before.endswith(between.lstrip()))
    ):
        ends.append(marks[0])  # differs from the end of the last turn
    return tuple(ends)


@dataclass
class _Marks:
    """Mark characters that do not occur in a text, with the message that each belongs to."""

    text: str
    messages: list[int] = field(default_factory=list)
    """Index of the message of each mark."""
    rests: list[str | None] = field(default_factory=list)
    """Content after each mark in the middle of a message; None for marks of answers."""

    def __post_init__(self) -> None:
        used = set(self.text)
        self._unused = (mark for code in range(FIRST_MARK, 0x10FFFE) if (mark := chr(code)) not in used)
        self.characters: list[str] = []

    def new(self, message: int, rest: str | None = None) -> str:
        """Create a mark for a message."""
        if (character := next(self._unused, None)) is None:
            raise RowError("the conversation has too many messages")
        self.characters.append(character)
        self.messages.append(message)
        self.rests.append(rest)
        return self.characters[-1]

    def around(self, text: str, message: int, start: int, end: int) -> str:
        """Return a text with marks at two positions."""
        return f"{text[:start]}{self.new(message)}{text[start:end]}{self.new(message)}{text[end:]}"

    def find(self, marked: str) -> tuple[str, list[tuple[int, int]]]:
        """Remove the marks from a rendering; return the text, and the number and position in it of each mark."""
        numbers = {mark: number for number, mark in enumerate(self.characters)}
        pieces = re.split(f"([{''.join(self.characters)}])", marked) if numbers else [marked]
        positions, position = [], 0
        for piece in pieces:
            if piece in numbers:
                positions.append((numbers[piece], position))
            else:
                position += len(piece)
        return "".join(piece for piece in pieces if piece not in numbers), positions


def find_turns(messages: Sequence[dict[str, Any]], text: str, render: Render, frame: Frame) -> list[Turn]:
    """Locate the assistant's turns in the text of a conversation.

    Args:
        messages: Messages of the conversation.
        text: Text that the template renders.
        render: Renders messages by the template.
        frame: Text that the template writes around turns.

    Returns:
        A turn for each message of the assistant, in order.

    Raises:
        RowError: An answer is not in the text, or its position cannot be determined.
    """
    for mark_others in (True, False):  # some templates inspect the beginning or end of a message
        marks = _Marks(text)
        marked = [_marked(message, number, marks, mark_others) for number, message in enumerate(messages)]
        plain, positions = marks.find(render(marked))
        if plain == text:
            return _turns(messages, text, marks, positions, frame, knows_others=mark_others)
    raise RowError("the answers cannot be located in the text of the chat template")


def _marked(message: dict[str, Any], number: int, marks: _Marks, mark_others: bool) -> dict[str, Any]:
    """Add marks around an answer and the names of called functions, or in the middle of another role's content."""
    if message["role"] != "assistant":
        return _with_text(message, -1, lambda text: _in_middle(text, number, marks)) if mark_others else message
    calls = message.get("tool_calls")
    if calls:
        message = {**message, "tool_calls": [_marked_call(call, number, marks) for call in calls]}

    def around(text: str) -> str:
        answer = text.rfind(SPLIT_THINKING) + len(SPLIT_THINKING) if SPLIT_THINKING in text else 0
        if not text[answer:].strip():
            if calls:  # the template can omit the reasoning before them
                return text
            answer = 0
        start = answer + len(text[answer:]) - len(text[answer:].lstrip())
        return marks.around(text, number, start, len(text.rstrip()))

    if isinstance(message.get("content"), str):
        return _with_text(message, 0, around)
    return _with_text(_with_text(message, 0, around), -1, around)


def _with_text(message: dict[str, Any], which: int, change: Callable[[str], str]) -> dict[str, Any]:
    """Return a message with `change` applied to its first (0) or last (-1) text that is not only white space."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": change(content)} if content.strip() else message
    indices = [index for index, part in enumerate(content or []) if part["text"].strip()]
    if not indices:
        return message
    assert content is not None
    chosen = indices[which]
    parts = [{**part, "text": change(part["text"])} if n == chosen else part for n, part in enumerate(content)]
    return {**message, "content": parts}


def _in_middle(text: str, number: int, marks: _Marks) -> str:
    core = text.strip()
    middle = text.index(core) + (len(core) + 1) // 2
    return f"{text[:middle]}{marks.new(number, text[middle:])}{text[middle:]}"


def _marked_call(call: Any, number: int, marks: _Marks) -> Any:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _marked_call(call["function"], number, marks)}
    if isinstance(call, dict) and isinstance(name := call.get("name"), str) and name:
        return {**call, "name": marks.around(name, number, 0, len(name))}
    return call


def _turns(
    messages: Sequence[dict[str, Any]],
    text: str,
    marks: _Marks,
    mark_positions: list[tuple[int, int]],
    frame: Frame,
    *,
    knows_others: bool,
) -> list[Turn]:
    turns: list[Turn] = []
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    positions: dict[int, list[int]] = {number: [] for number in answers}
    others: list[tuple[int, int]] = []
    for mark, position in mark_positions:
        if marks.rests[mark] is None:
            positions[marks.messages[mark]].append(position)
        else:
            rest = str(marks.rests[mark]).rstrip()
            others.append((position, position + len(rest) if text.startswith(rest, position) else position))
    before, is_open = 0, False  # the end of the previous turn, and whether it has no end mark
    for order, number in enumerate(answers):
        if not positions[number]:
            raise RowError("the chat template omits an answer")
        start, end = min(positions[number]), max(positions[number])
        if start < before:
            raise RowError("the chat template changes the order of answers")
        following = [position for position, _ in others if position >= end]
        following += positions.get((answers[order + 1 :] or [-1])[0], [])
        first = max([before, *(stop for position, stop in others if before <= position and stop <= start)])
        # After the question, the first opening is the turn's own; if only the answer's position is known, the last.
        opened = _find_opening_end(text, first, start, frame, is_last=not knows_others)
        if opened is None and is_open and first == before:  # the template joins two answers
            opened, turns[-1] = before, turns[-1]._replace(is_ended=True)
        elif opened is None:
            opened = start
        has_calls = bool(messages[number].get("tool_calls"))
        ended = _find_end(text, end, min([*following, len(text)]), frame, has_calls=has_calls)
        turns.append(Turn(number, Span(opened, ended or end), ended is not None))
        before, is_open = ended or end, ended is None
    return turns


def _find_opening_end(text: str, first: int, start: int, frame: Frame, *, is_last: bool) -> int | None:
    """Return the position after the turn's opening, searched in text[first:start]; None if it is not found."""
    for opening in frame.openings:
        if (position := (text.rfind if is_last else text.find)(opening, first, start)) >= 0:
            return position + len(opening)
    return None


def _find_end(text: str, end: int, limit: int, frame: Frame, *, has_calls: bool) -> int | None:
    """Return the position after a turn's end mark; None if there is none. Only tool calls have text before it."""
    if not frame.ends:
        return None
    ends = "|".join(map(re.escape, sorted(frame.ends, key=len, reverse=True)))
    if not has_calls:
        match = re.compile(rf"\s*(?:{ends})").match(text, end, limit)
    else:
        match = re.compile(ends).search(text, end, limit)
    return None if match is None else match.end()
