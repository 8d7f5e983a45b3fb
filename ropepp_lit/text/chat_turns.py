"""Where the assistant's turns lie in a rendered conversation, by any chat template.

No prefix of a conversation is rendered: templates render it differently from the whole (they drop earlier reasoning,
write an end mark only once, merge messages). Instead the whole is rendered once more with marks in its messages:
characters for private use that occur nowhere else. Without them the text must be that of the first rendering; then
their places in it are exact, also where an answer is "assistant" or repeats the question.
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
"""The text of messages, with `add_generation_prompt` by keyword."""

FIRST_MARK = 0xF0000
"""The characters from here on are for private use."""


class Turn(NamedTuple):
    """What the assistant writes for one message."""

    message: int
    """Its place in the conversation."""
    span: Span
    """From behind what opens the turn to behind its end mark."""
    is_ended: bool
    """Whether the end mark stands behind it."""


@dataclass(frozen=True)
class Frame:
    """What a template writes around an assistant's turn."""

    openings: tuple[str, ...]
    """What stands before the assistant's words: the generation prompt first, then what opens earlier turns."""
    ends: tuple[str, ...]
    """What ends a turn, without white space around it; empty where nothing does."""

    @classmethod
    def of(cls, render: Render, added: Sequence[str]) -> Frame:
        """Find the frame by a conversation of which only the words are known.

        Args:
            render: By the template.
            added: Tokens that were added to the vocabulary, longest first.

        Raises:
            UsageError: the template cannot render questions and answers, or leaves one out.
        """
        words = ("71071", "82082", "73073", "84084")  # whatever a template does to letters, they stay
        messages = [{"role": "assistant" if n % 2 else "user", "content": word} for n, word in enumerate(words)]
        text, question = render(messages), render(messages[:1])
        prompt = render(messages[:1], add_generation_prompt=True)
        gaps = re.split("|".join(words), text)
        if len(gaps) != 5 or words[0] not in question or words[0] not in prompt:
            raise UsageError("chat_template: it leaves a message out, or writes one twice; name another template")
        before, lead, between, _, last = gaps[0], gaps[1], gaps[2], gaps[3], gaps[4]
        closed, opened = (text.partition(words[0])[2] for text in (question, prompt))
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(closed, opened, strict=False)))
        opening = opened[shared:]
        if not opening and lead.startswith(opened) and not lead[len(opened) :].strip():
            opening = opened  # as in "[INST] question [/INST] answer": what ends the question opens the answer
        return cls(openings=(opening, lead) if opening else (lead,), ends=_ends(between, last, before, opening, added))


def _ends(between: str, last: str, before: str, opening: str, added: Sequence[str]) -> tuple[str, ...]:
    """What ends a turn within a conversation and at its end.

    Args:
        between: Text between an answer and the next question.
        last: Text behind the last answer.
        before: Text before the first question.
        opening: The generation prompt.
        added: Tokens that were added to the vocabulary.
    """
    end = last.strip()
    if end and between.lstrip().startswith(end):
        return (end,)
    pattern = "|".join(map(re.escape, added)) or "(?!)"
    pieces = [re.split(f"({pattern})", text.strip()) for text in (between, last)]
    common = takewhile(lambda pair: pair[0] == pair[1], zip(*pieces, strict=False))
    if both := "".join(piece for piece, _ in common).strip():
        return (both,)  # behind the last turn something follows that ends the text
    marks = re.findall(pattern, between)
    ends = [end] if end else []
    if (
        marks
        and between.lstrip().startswith(marks[0])
        and marks[0] not in opening
        and (len(marks) > 1 or not before.endswith(between.lstrip()))
    ):
        ends.append(marks[0])  # another one than behind the last turn
    return tuple(ends)


@dataclass
class _Marks:
    """Characters that occur nowhere in a text, and in which message and role they stand."""

    text: str
    messages: list[int] = field(default_factory=list)
    """Of each mark: the place of its message."""
    rests: list[str | None] = field(default_factory=list)
    """Of each mark: the content behind it, where it stands in the middle of one; None for those of answers."""

    def __post_init__(self) -> None:
        used = set(self.text)
        self._unused = (mark for code in range(FIRST_MARK, 0x10FFFE) if (mark := chr(code)) not in used)
        self.characters: list[str] = []

    def new(self, message: int, rest: str | None = None) -> str:
        """A mark for a message."""
        if (character := next(self._unused, None)) is None:
            raise RowError("a conversation of too many messages")
        self.characters.append(character)
        self.messages.append(message)
        self.rests.append(rest)
        return self.characters[-1]

    def around(self, text: str, message: int, start: int, end: int) -> str:
        """A text with marks at two places."""
        return f"{text[:start]}{self.new(message)}{text[start:end]}{self.new(message)}{text[end:]}"

    def find(self, marked: str) -> tuple[str, list[tuple[int, int]]]:
        """A rendering without marks, and for each mark in it its number and its place in what is returned."""
        numbers = {mark: number for number, mark in enumerate(self.characters)}
        pieces = re.split(f"([{''.join(self.characters)}])", marked) if numbers else [marked]
        found, place = [], 0
        for piece in pieces:
            if piece in numbers:
                found.append((numbers[piece], place))
            else:
                place += len(piece)
        return "".join(piece for piece in pieces if piece not in numbers), found


def find_turns(messages: Sequence[dict[str, Any]], text: str, render: Render, frame: Frame) -> list[Turn]:
    """The assistant's turns in the text of a conversation.

    Args:
        messages: The conversation.
        text: As the template renders it.
        render: The template.
        frame: What it writes around turns.

    Returns:
        A turn for each message of the assistant, in order.

    Raises:
        RowError: an answer is not in the text, or the template hides where it is.
    """
    for mark_others in (True, False):  # some templates look at how a message begins or ends
        marks = _Marks(text)
        marked = [_marked(message, number, marks, mark_others) for number, message in enumerate(messages)]
        plain, found = marks.find(render(marked))
        if plain == text:
            return _turns(messages, text, marks, found, frame, knows_others=mark_others)
    raise RowError("the chat template hides where the answers are in its text")


def _marked(message: dict[str, Any], number: int, marks: _Marks, mark_others: bool) -> dict[str, Any]:
    """A message with marks around an answer and the names of called functions, or in the middle of another content."""
    if message["role"] != "assistant":
        return _with_text(message, -1, lambda text: _in_middle(text, number, marks)) if mark_others else message
    calls = message.get("tool_calls")
    if calls:
        message = {**message, "tool_calls": [_marked_call(call, number, marks) for call in calls]}

    def around(text: str) -> str:
        behind = text.rfind(SPLIT_THINKING) + len(SPLIT_THINKING) if SPLIT_THINKING in text else 0
        if not text[behind:].strip():
            if calls:  # the reasoning before them may be left out
                return text
            behind = 0
        start = behind + len(text[behind:]) - len(text[behind:].lstrip())
        return marks.around(text, number, start, len(text.rstrip()))

    if isinstance(message.get("content"), str):
        return _with_text(message, 0, around)
    return _with_text(_with_text(message, 0, around), -1, around)


def _with_text(message: dict[str, Any], which: int, change: Callable[[str], str]) -> dict[str, Any]:
    """A message with its first (0) or last (-1) text that is not white space changed."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": change(content)} if content.strip() else message
    places = [place for place, part in enumerate(content or []) if part["text"].strip()]
    if not places:
        return message
    assert content is not None
    chosen = places[which]
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
    found: list[tuple[int, int]],
    frame: Frame,
    *,
    knows_others: bool,
) -> list[Turn]:
    turns: list[Turn] = []
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    places: dict[int, list[int]] = {number: [] for number in answers}
    others: list[tuple[int, int]] = []
    for mark, place in found:
        if marks.rests[mark] is None:
            places[marks.messages[mark]].append(place)
        else:
            rest = str(marks.rests[mark]).rstrip()
            others.append((place, place + len(rest) if text.startswith(rest, place) else place))
    before, is_open = 0, False  # the end of the turn before, and whether no end mark stands there
    for order, number in enumerate(answers):
        if not places[number]:
            raise RowError("the chat template leaves an answer out")
        start, end = min(places[number]), max(places[number])
        if start < before:
            raise RowError("the chat template changes the order of answers")
        following = [place for place, _ in others if place >= end] + places.get((answers[order + 1 :] or [-1])[0], [])
        first = max([before, *(behind for place, behind in others if before <= place and behind <= start)])
        # Behind the question the first opening is the turn's own; where only the answer's place is known, the last.
        opened = _opened(text, first, start, frame, is_last=not knows_others)
        if opened is None and is_open and first == before:  # the template has joined two answers
            opened, turns[-1] = before, turns[-1]._replace(is_ended=True)
        elif opened is None:
            opened = start
        has_calls = bool(messages[number].get("tool_calls"))
        ended = _ended(text, end, min([*following, len(text)]), frame, has_calls=has_calls)
        turns.append(Turn(number, Span(opened, ended or end), ended is not None))
        before, is_open = ended or end, ended is None
    return turns


def _opened(text: str, first: int, start: int, frame: Frame, *, is_last: bool) -> int | None:
    """Where the assistant's words begin, between what stands before the turn and its answer; None where not seen."""
    for opening in frame.openings:
        if (place := (text.rfind if is_last else text.find)(opening, first, start)) >= 0:
            return place + len(opening)
    return None


def _ended(text: str, end: int, limit: int, frame: Frame, *, has_calls: bool) -> int | None:
    """The place behind a turn's end mark; None where there is none. Only calls have text before it."""
    if not frame.ends:
        return None
    ends = "|".join(map(re.escape, sorted(frame.ends, key=len, reverse=True)))
    if not has_calls:
        match = re.compile(rf"\s*(?:{ends})").match(text, end, limit)
    else:
        match = re.compile(ends).search(text, end, limit)
    return None if match is None else match.end()
