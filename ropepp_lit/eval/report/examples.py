"""Selects examples of each task for the page: correct and wrong answers of the first model, and those of others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_EXAMPLES = 2
"""Maximum number of examples of a task and part that the first model solved, and of those that it did not solve."""

MAX_MODELS = 6
MAX_CHARACTERS = 300
"""Maximum length of a text."""

Key = tuple[str, str, Any]
"""Task, part and length."""

Examples = dict[tuple[str, str], dict[str, Any]]
"""Caption and lines by task and part."""


def choose_examples(path: Path) -> Examples:
    """Select examples of each task and part.

    They are the first solved and the first unsolved examples of the first model, at the longest length that has both,
    or else at the longest length. For a model with multiple runs, the first run is used.

    Args:
        path: Path of answers.jsonl, which is read twice, line by line; it may be missing.
    """
    if not path.is_file():
        return {}
    selected: dict[Key, dict[bool, list[int]]] = {}
    runs: dict[str, str] = {}
    for line in _lines(path):
        runs.setdefault(line["model"], line["path"])
        if line["model"] == next(iter(runs)) and line["path"] == runs[line["model"]]:
            numbers = selected.setdefault(_key(line), {True: [], False: []})[_is_correct(line)]
            if len(numbers) < MAX_EXAMPLES:
                numbers.append(line["number"])
    keys: dict[tuple[str, str], Key] = {}
    for key in sorted(selected, key=lambda key: (all(selected[key].values()), key[2] or 0)):
        keys[key[:2]] = key
    keys = {key[:2]: keys[key[:2]] for key in selected}  # in the order of the tasks
    models = dict(list(runs.items())[:MAX_MODELS])
    numbers_of = {key: [*selected[key][True], *selected[key][False]] for key in keys.values()}
    examples: dict[Key, dict[int, dict[str, Any]]] = {key: {} for key in numbers_of}
    for line in _lines(path):
        key = _key(line)
        if line["path"] == models.get(line["model"]) and line["number"] in numbers_of.get(key, ()):
            example = examples[key].setdefault(line["number"], {**line, "written": []})
            text = {"model": line["model"], "text": _start(line["written"]), "score": f"{100 * line['score']:.0f}"}
            example["written"].append({**text, "is_correct": _is_correct(line)})
    return {
        task_and_part: {
            "caption": f"{key[1] or key[0]}{f' at {key[2]:,} tokens' if key[2] else ''}",
            "lines": [
                {
                    "prompt": _end(example["prompt"]),
                    "expected": _start(example["expected"]),
                    "written": example["written"],
                }
                for example in (examples[key][number] for number in numbers_of[key])
            ],
        }
        for task_and_part, key in keys.items()
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines without noise."""
    with path.open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            if line["noise_std"] is None:
                yield line


def _key(line: dict[str, Any]) -> Key:
    return line["task"], line["part"], line["length"]


def _is_correct(line: dict[str, Any]) -> bool:
    return line["score"] > 1 - 1e-9


def _start(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"


def _end(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"…{text[-MAX_CHARACTERS:]}"
