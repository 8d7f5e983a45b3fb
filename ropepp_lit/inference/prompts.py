"""Prompts from a file of JSON lines, answered into another: in batches, resumable at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ropepp_lit.errors import UsageError
from ropepp_lit.files import checksum, flush, refuse_pointer, sync, whole_file, write_errors
from ropepp_lit.inference.completion import Completion, complete
from ropepp_lit.inference.model import Model, Writing
from ropepp_lit.json_files import fits, json_line, parse_json, sealed, unsealed
from ropepp_lit.terminal import progress_bar
from ropepp_lit.text.chat import ChatTemplate, ChatTemplateError
from ropepp_lit.text.conversations import RowError, conversation_of
from ropepp_lit.text.tokenizer import TextTokenizer

WRITTEN = ("text", "finish_reason", "tokens")
"""Keys that each row gets."""


@dataclass(frozen=True)
class Summary:
    """What was done."""

    rows: int
    resumed: int
    """Rows that were finished before."""
    at_context: int
    """Texts that ended because the model's context did."""


class PromptFile:
    """A file of JSON lines whose prompts are answered.

    Args:
        path: Of the file; each line is an object with `prompt`, or for a chat template `messages` or `prompt`.
        model: What writes.
        template: The chat template; None continues plain prompts.

    Raises:
        UsageError: a line is not such an object, or its prompt leaves no room in the context. The message names it.
    """

    def __init__(self, path: Path, model: Model, template: ChatTemplate | None) -> None:
        self._path, self._model, self._template = path, model, template
        self._stop_token_ids = template.end_of_turn if template is not None else []
        self._prompts: list[list[int]] = []
        for number, row in self._rows():
            try:
                ids = self._encode(row)
            except (RowError, ChatTemplateError) as error:
                raise UsageError(f"{path}:{number}: {error}") from error
            room = model.room_behind(ids)
            if not ids or room == 0:
                problem = "an empty prompt" if not ids else f"the prompt has {len(ids):,} tokens and leaves no room in"
                rest = "" if not ids else f" the context of {model.context_length:,}; shorten it"
                raise UsageError(f"{path}:{number}: {problem}{rest}")
            self._prompts.append(ids)
        if not self._prompts:
            raise UsageError(f"{path}: no prompts; each line is an object with the key prompt")

    def answer(self, out: Path, writing: Writing, *, batch_size: int, show_progress: bool = True) -> Summary:
        """Answer all prompts.

        Finished batches are kept in `OUT.partial`; the file appears under its name when all are finished. Batches are
        of prompts of near lengths, the longest first, and the same in each run, so an interrupted run ends with the
        same bytes.

        Args:
            out: New file of JSON lines: the rows in their order, with :data:`WRITTEN`.
            writing: Settings.
            batch_size: Prompts that are continued together.
            show_progress: Show a progress bar.

        Raises:
            UsageError: `out` exists, cannot be written, or was begun with other settings.
        """
        if out.exists():
            raise UsageError(f"out: {out}: already exists; name another file, or delete it")
        order = sorted(range(len(self._prompts)), key=lambda row: (-len(self._prompts[row]), row))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        partial = out.with_name(f"{out.name}.partial")
        if partial.is_symlink() or (partial.exists() and not partial.is_file()):
            raise UsageError(f"{partial}: not a regular file; delete it to begin anew")
        with write_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            found = _resume(partial, self._identity(writing, batch_size), batches)
            resumed = len(found)
            with partial.open("ab") as file, progress_bar(
                "Prompts", unit="rows", total=len(order), initial=resumed, show=show_progress
            ) as bar:  # fmt: skip
                for batch in batches:
                    if batch[0] not in found:
                        found |= self._answer_batch(batch, writing, file, bar)
            self._write(out, found)
            partial.unlink()
        at_context = sum(
            answer.finish_reason == "length" and answer.num_tokens < writing.max_new_tokens for answer in found.values()
        )
        return Summary(len(order), resumed, at_context)

    def _answer_batch(self, rows: list[int], writing: Writing, file: BinaryIO, bar: tqdm) -> dict[int, Completion]:
        answers = complete(
            self._model, [self._prompts[row] for row in rows], writing,
            indices=rows, stop_token_ids=self._stop_token_ids, progress=bar.update,
        )  # fmt: skip
        found = dict(zip(rows, answers, strict=True))
        file.write(b"".join(json_line(sealed({"row": row, **_values(answer)})) for row, answer in found.items()))
        file.flush()
        sync(file.fileno())
        return found

    def _identity(self, writing: Writing, batch_size: int) -> dict[str, Any]:
        """What decides the result; by name, for a message."""
        settings = asdict(writing)
        return {
            "prompts": checksum(self._path),
            "checkpoint": self._model.fingerprint,
            "device": self._model.device.type,
            "chat template": None if self._template is None else self._template.identity,
            "context_length": self._model.context_length,
            "batch_size": batch_size,
            **settings.pop("sampling"),
            **{key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
        }

    def _write(self, out: Path, found: dict[int, Completion]) -> None:
        with whole_file(out) as partial, partial.open("wb") as file:
            for index, (_, row) in enumerate(self._rows()):
                file.write(json_line({**row, **_values(found[index])}))

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Objects of the file with their line numbers, counted from 1; empty lines are skipped."""
        if self._path.exists() and not self._path.is_file():  # a pipe could be read only once
            raise UsageError(f"prompts: {self._path}: not a regular file")
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, self._parse(number, line)
        except OSError as error:
            raise UsageError(f"prompts: {self._path}: {error.strerror}") from error

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        where = f"{self._path}:{number}"
        try:
            row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            refuse_pointer(self._path, line)
            what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
            raise UsageError(f"{where}: {what}; each line is an object with the key prompt") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where}: not an object; each line is an object with the key prompt")
        for key in WRITTEN:
            if key in row:
                raise UsageError(f"{where}: has a key {key!r}, under which the result is written; rename it")
        return row

    def _encode(self, row: dict[str, Any]) -> list[int]:
        if self._template is not None:
            return encode_messages(self._template, row)
        prompt = row.get("prompt")
        if prompt is None and any(key in row for key in ("messages", "conversations")):
            raise RowError("has messages and no prompt; add --chat true")
        if not isinstance(prompt, str):
            raise RowError("no key 'prompt'" if prompt is None else "prompt is not a text")
        return encode_text(self._model.tokenizer, prompt)


def encode_text(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Token ids of a text that is continued.

    Raises:
        RowError: it is no Unicode.
        UsageError: it is empty, and nothing stands before the texts of this tokenizer.
    """
    _check_text(prompt)
    return tokenizer.encode_prompt(prompt)


def encode_messages(template: ChatTemplate, row: dict[str, Any]) -> list[int]:
    """Token ids of a row's conversation, with what opens the assistant's answer.

    Args:
        template: The chat template.
        row: With `messages` or `conversations`, or `prompt`: a text of the user, or messages; and where they are there
            `tools`, `system` and `chat_template_kwargs`.

    Raises:
        RowError: it is no conversation, or the assistant has spoken last.
        ChatTemplateError: the template raises an error.
    """
    if row.get("messages") is None and row.get("conversations") is None and row.get("prompt") is not None:
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        row = {**row, "messages": messages}
    conversation = conversation_of(row)
    if conversation.messages[-1]["role"] == "assistant":
        raise RowError("the last message is the assistant's, so there is nothing to answer; leave it out")
    text = template.render(
        conversation.messages, tools=conversation.tools, add_generation_prompt=True, **conversation.options
    )
    _check_text(text)
    return template.tokens.encode([text], [[]])[0][0].tolist()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"a text with half of a surrogate pair at character {error.start + 1}") from error


def _values(answer: Completion) -> dict[str, Any]:
    return dict(zip(WRITTEN, (answer.text, answer.finish_reason, answer.num_tokens), strict=True))


def _resume(partial: Path, identity: dict[str, Any], batches: Sequence[Sequence[int]]) -> dict[int, Completion]:
    """Answers of the finished batches of a partial file, from which the rest is cut; a new one gets its first line.

    Raises:
        UsageError: it was begun with other settings.
    """
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    if not lines or not lines[0].endswith(b"\n"):
        partial.write_bytes(json_line(sealed(identity)))
        return {}
    try:
        before = unsealed(parse_json(lines[0]), required=True)
        rows = [unsealed(parse_json(line), required=True) for line in lines[1:] if line.endswith(b"\n")]
        answers = {row["row"]: Completion(*(row[key] for key in WRITTEN)) for row in rows}
        if not all(fits([row, answer.num_tokens], list[int]) and fits([answer.text, answer.finish_reason], list[str])
                   for row, answer in answers.items()):  # fmt: skip
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{partial}: damaged; delete it to begin anew") from error
    different = [key for key, value in identity.items() if before.get(key) != value]
    if different:
        raise UsageError(
            f"{partial} was begun with another value of {', '.join(different)}; give the same again, name another "
            "--out, or delete it to begin anew"
        )
    finished = [row for batch in batches if all(row in answers for row in batch) for row in batch]
    kept = lines[0] + b"".join(lines[1 : 1 + len(finished)])
    if [row["row"] for row in rows[: len(finished)]] != finished:
        raise UsageError(f"{partial}: damaged; delete it to begin anew")
    os.truncate(partial, len(kept))
    flush(partial)
    return {row: answers[row] for row in finished}
