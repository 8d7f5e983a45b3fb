"""Generates text for the prompts of a JSON Lines file, in batches; an interrupted run can be resumed."""

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
from ropepp_lit.inference.model import GenerationSettings, Model
from ropepp_lit.json_files import fits, json_line, parse_json, sealed, unsealed
from ropepp_lit.terminal import progress_bar
from ropepp_lit.text.chat import ChatTemplate, ChatTemplateError
from ropepp_lit.text.conversations import RowError, parse_conversation
from ropepp_lit.text.tokenizer import TextTokenizer

WRITTEN = ("text", "finish_reason", "tokens")
"""Keys that are added to each row."""


@dataclass(frozen=True)
class Summary:
    """Summary of a run."""

    rows: int
    resumed: int
    """Number of rows from an earlier, interrupted run."""
    at_context: int
    """Number of texts that ended at the end of the context."""


class PromptFile:
    """A JSON Lines file with prompts.

    Args:
        path: Path of the file; each line is an object with `prompt`, or with a chat template `messages` or `prompt`.
        model: The model.
        template: Chat template; None for plain prompts.

    Raises:
        UsageError: A line is not such an object, or its prompt fills the context.
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
            if not ids:
                raise UsageError(f"{path}:{number}: an empty prompt")
            if model.remaining_tokens(ids) == 0:
                raise UsageError(
                    f"{path}:{number}: the prompt has {len(ids):,} tokens and leaves no space in the context of "
                    f"{model.context_length:,}; shorten it"
                )
            self._prompts.append(ids)
        if not self._prompts:
            raise UsageError(f"{path}: no prompts; each line is an object with the key prompt")

    def answer(
        self, out: Path, generation: GenerationSettings, *, batch_size: int, show_progress: bool = True
    ) -> Summary:
        """Generate the texts of all prompts.

        Finished batches are stored in `OUT.partial`, which is renamed at the end. Batches are sorted by length, longest
        first, and are the same in each run, so the result of an interrupted and resumed run is identical.

        Args:
            out: New JSON Lines file with the rows in their original order and the keys :data:`WRITTEN`.
            generation: Generation settings.
            batch_size: Number of prompts per batch.
            show_progress: Whether to show a progress bar.

        Raises:
            UsageError: `out` exists or cannot be written, or `OUT.partial` was created with other settings.
        """
        if out.exists():
            raise UsageError(f"out: {out}: already exists; name another file, or delete it")
        order = sorted(range(len(self._prompts)), key=lambda row: (-len(self._prompts[row]), row))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        partial = out.with_name(f"{out.name}.partial")
        if partial.is_symlink() or (partial.exists() and not partial.is_file()):
            raise UsageError(f"{partial}: not a regular file; delete it to start again")
        with write_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            completions = _resume(partial, self._identity(generation, batch_size), batches)
            resumed = len(completions)
            with partial.open("ab") as file, progress_bar(
                "Prompts", unit="rows", total=len(order), initial=resumed, show=show_progress
            ) as bar:  # fmt: skip
                for batch in batches:
                    if batch[0] not in completions:
                        completions |= self._complete_batch(batch, generation, file, bar)
            self._write(out, completions)
            partial.unlink()
        at_context = sum(
            completion.finish_reason == "length" and completion.num_tokens < generation.max_new_tokens
            for completion in completions.values()
        )
        return Summary(len(order), resumed, at_context)

    def _complete_batch(
        self, rows: list[int], generation: GenerationSettings, file: BinaryIO, bar: tqdm
    ) -> dict[int, Completion]:
        results = complete(
            self._model, [self._prompts[row] for row in rows], generation,
            indices=rows, stop_token_ids=self._stop_token_ids, progress=bar.update,
        )  # fmt: skip
        completions = dict(zip(rows, results, strict=True))
        file.write(b"".join(json_line(sealed({"row": row, **_values(item)})) for row, item in completions.items()))
        file.flush()
        sync(file.fileno())
        return completions

    def _identity(self, generation: GenerationSettings, batch_size: int) -> dict[str, Any]:
        """Return everything that the result depends on, by name (for messages)."""
        settings = asdict(generation)
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

    def _write(self, out: Path, completions: dict[int, Completion]) -> None:
        with whole_file(out) as partial, partial.open("wb") as file:
            for index, (_, row) in enumerate(self._rows()):
                file.write(json_line({**row, **_values(completions[index])}))

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the objects of the file with their line numbers, starting at 1; empty lines are skipped."""
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
            problem = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
            raise UsageError(f"{where}: {problem}; each line is an object with the key prompt") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where}: not an object; each line is an object with the key prompt")
        for key in WRITTEN:
            if key in row:
                raise UsageError(f"{where}: has a key {key!r}, which is used for the result; rename it")
        return row

    def _encode(self, row: dict[str, Any]) -> list[int]:
        if self._template is not None:
            return encode_messages(self._template, row)
        prompt = row.get("prompt")
        if prompt is None and any(key in row for key in ("messages", "conversations")):
            raise RowError("has messages but no prompt; add --chat true")
        if not isinstance(prompt, str):
            raise RowError("no key 'prompt'" if prompt is None else "prompt is not a text")
        return encode_text(self._model.tokenizer, prompt)


def encode_text(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Tokenize a plain prompt.

    Raises:
        RowError: The prompt is not valid Unicode.
        UsageError: The prompt is empty, and the tokenizer does not add BOS.
    """
    _check_text(prompt)
    return tokenizer.encode_prompt(prompt)


def encode_messages(template: ChatTemplate, row: dict[str, Any]) -> list[int]:
    """Tokenize a row's conversation with a generation prompt.

    Args:
        template: Chat template.
        row: Row with `messages`, `conversations` or `prompt` (a text of the user, or messages), and optionally `tools`,
            `system` and `chat_template_kwargs`.

    Raises:
        RowError: The row is not a conversation, or the last message is from the assistant.
        ChatTemplateError: The template raises an error.
    """
    if row.get("messages") is None and row.get("conversations") is None and row.get("prompt") is not None:
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        row = {**row, "messages": messages}
    conversation = parse_conversation(row)
    if conversation.messages[-1]["role"] == "assistant":
        raise RowError("the last message is from the assistant, so there is nothing to answer; remove it")
    text = template.render(
        conversation.messages, tools=conversation.tools, add_generation_prompt=True, **conversation.options
    )
    _check_text(text)
    return template.tokens.encode([text], [[]])[0][0].tolist()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"a text with an unpaired surrogate at character {error.start + 1}") from error


def _values(completion: Completion) -> dict[str, Any]:
    return dict(zip(WRITTEN, (completion.text, completion.finish_reason, completion.num_tokens), strict=True))


def _resume(partial: Path, identity: dict[str, Any], batches: Sequence[Sequence[int]]) -> dict[int, Completion]:
    """Return the completions of the finished batches of a partial file, and truncate the file after them.

    A new file is created with the identity as its first line.

    Raises:
        UsageError: The file is damaged, or was created with other settings.
    """
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    if not lines or not lines[0].endswith(b"\n"):
        partial.write_bytes(json_line(sealed(identity)))
        return {}
    try:
        before = unsealed(parse_json(lines[0]), required=True)
        rows = [unsealed(parse_json(line), required=True) for line in lines[1:] if line.endswith(b"\n")]
        completions = {row["row"]: Completion(*(row[key] for key in WRITTEN)) for row in rows}
        if not all(fits([row, item.num_tokens], list[int]) and fits([item.text, item.finish_reason], list[str])
                   for row, item in completions.items()):  # fmt: skip
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{partial}: damaged; delete it to start again") from error
    different = [key for key, value in identity.items() if before.get(key) != value]
    if different:
        raise UsageError(
            f"{partial} was created with another value of {', '.join(different)}; use the same value, name another "
            "--out, or delete it to start again"
        )
    finished = [row for batch in batches if all(row in completions for row in batch) for row in batch]
    finished_lines = lines[0] + b"".join(lines[1 : 1 + len(finished)])
    if [row["row"] for row in rows[: len(finished)]] != finished:
        raise UsageError(f"{partial}: damaged; delete it to start again")
    os.truncate(partial, len(finished_lines))
    flush(partial)
    return {row: completions[row] for row in finished}
