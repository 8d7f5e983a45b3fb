"""A few examples of each task for the page: what the first model wrote, right and wrong, and the others beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_OF_KIND = 2
"""Examples of a task and part that the first model solved, and that it did not."""

MOST_MODELS = 6
MOST_CHARACTERS = 300
"""Of a text that is shown."""

Place = tuple[str, str, Any]
"""Task, part and length."""

Examples = dict[tuple[str, str], dict[str, Any]]
"""By task and part: a caption, and lines to show."""


def choose_examples(path: Path) -> Examples:
    """A few examples of each task and part.

    They are the first ones of each kind at the longest length at which the first model solved some and not others, or
    at the longest one. A model of several runs shows its first.

    Args:
        path: answers.jsonl, which is read twice, line by line; it may be missing.
    """
    if not path.is_file():
        return {}
    chosen: dict[Place, dict[bool, list[int]]] = {}
    runs: dict[str, str] = {}
    for line in _lines(path):
        runs.setdefault(line["model"], line["path"])
        if line["model"] == next(iter(runs)) and line["path"] == runs[line["model"]]:
            numbers = chosen.setdefault(_place(line), {True: [], False: []})[_is_right(line)]
            if len(numbers) < MOST_OF_KIND:
                numbers.append(line["number"])
    places: dict[tuple[str, str], Place] = {}
    for place in sorted(chosen, key=lambda place: (all(chosen[place].values()), place[2] or 0)):
        places[place[:2]] = place
    places = {place[:2]: places[place[:2]] for place in chosen}  # in the order of the tasks
    models = dict(list(runs.items())[:MOST_MODELS])
    wanted = {place: [*chosen[place][True], *chosen[place][False]] for place in places.values()}
    found: dict[Place, dict[int, dict[str, Any]]] = {place: {} for place in wanted}
    for line in _lines(path):
        place = _place(line)
        if line["path"] == models.get(line["model"]) and line["number"] in wanted.get(place, ()):
            example = found[place].setdefault(line["number"], {**line, "written": []})
            text = {"model": line["model"], "text": _beginning(line["written"]), "score": f"{100 * line['score']:.0f}"}
            example["written"].append({**text, "is_right": _is_right(line)})
    return {
        key: {
            "caption": f"{place[1] or place[0]}{f' at {place[2]:,} tokens' if place[2] else ''}",
            "lines": [
                {
                    "prompt": _end(example["prompt"]),
                    "expected": _beginning(example["expected"]),
                    "written": example["written"],
                }
                for example in (found[place][number] for number in wanted[place])
            ],
        }
        for key, place in places.items()
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of whole models: those without noise."""
    with path.open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            if line["noise_std"] is None:
                yield line


def _place(line: dict[str, Any]) -> Place:
    return line["task"], line["part"], line["length"]


def _is_right(line: dict[str, Any]) -> bool:
    return line["score"] > 1 - 1e-9


def _beginning(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def _end(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"…{text[-MOST_CHARACTERS:]}"
