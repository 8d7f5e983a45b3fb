"""Writing of recipes as YAML, verified by parsing them again."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from ropepp_lit.errors import UsageError
from ropepp_lit.files import write_whole


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes strings which some parser could read as another type: `1e3`, `on`, `1:30`."""

    def ignore_aliases(self, data: Any) -> bool:
        """Disable aliases: equal values are written repeatedly."""
        return True


_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*", re.ASCII)
_SPECIAL = {"", ".", "..", "y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", ".nan", ".inf"}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _SPECIAL and not text.startswith(".")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _represent_text)
# The parser's dumper does not support enums, such as the default interval of Lightning's Timer.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def to_yaml(recipe: dict[str, Any]) -> str:
    """Return a recipe as YAML, ASCII."""
    return yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, width=10**6)


def recipe_from(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a model initialized from a checkpoint, to be combined with settings of trainer and data.

    Args:
        path: Path of the checkpoint.
        entry: Entry of the checkpoint, see :mod:`ropepp_lit.checkpoint`.
    """
    architecture = entry["architecture"]
    model: dict[str, Any] = {"init_from": str(path), "decoder": architecture["decoder"]}
    for key, value in architecture.items():
        if key != "decoder":
            name = value["class_path"].rpartition(".")[2]
            model[key] = {"class_path": name, "init_args": value["init_args"]}
    recipe: dict[str, Any] = {"model": model, "data": {"context_length": entry["context_length"]}}
    if entry["tokenizer"] is not None:
        recipe["data"] |= {"tokenizer": str(path), "train_tokenizer": None}
    return recipe


def write_recipe(path: Path, recipe: dict[str, Any], read: Callable[[Path], dict[str, Any]]) -> None:
    """Write a recipe, and verify it by parsing the file.

    Args:
        path: Path of the file.
        recipe: Plain values.
        read: Function that parses a recipe file and returns plain values.

    Raises:
        UsageError: the file cannot be written, or parsing it gives another recipe; then the file is deleted.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, to_yaml(recipe))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    try:
        difference = first_difference(recipe, read(path))
    except UsageError as error:
        difference = str(error)
    if difference:
        path.unlink()
        raise UsageError(f"{path}: parsing the written recipe gives another one: {difference}")


def first_difference(one: Any, other: Any, key: str = "") -> str | None:
    """Return the first key at which two recipes differ, with both values; None if they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in {**one, **other}:
            difference = first_difference(one.get(name), other.get(name), f"{key}.{name}" if key else str(name))
            if difference:
                return difference
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        differences = (first_difference(a, b, f"{key}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
        return next(filter(None, differences), None)
    return None if type(one) is type(other) and one == other else f"{key} {one!r} → {other!r}"
