"""Parsing, type checks and checksums of JSON, which may be damaged or untrusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ropepp_lit.files import read_text

T = TypeVar("T")

CHECKSUM = "checksum"
"""Key of the checksum of an object's other keys."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON or not UTF-8, has a number of thousands of digits, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: see :func:`~ropepp_lit.files.read_text`.
        ValueError: see :func:`parse_json`.
    """
    return parse_json(read_text(path))


def json_line(value: Any) -> bytes:
    """Return a value as a line of JSON in UTF-8."""
    try:
        return (json.dumps(value, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot encode
        return (json.dumps(value) + "\n").encode()


def typed(kind: type[T], values: Any) -> T:
    """Return an instance of a dataclass with plain fields.

    Raises:
        ValueError: the values are not an object, or a field is missing, unknown or of the wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"a {kind.__name__} is not an object")
    for name, hint in get_type_hints(kind).items():
        if name in values and not fits(values[name], hint):
            raise ValueError(f"{name} is {str(values[name])[:100]!r}")
    try:
        return kind(**values)
    except TypeError as error:  # a field is missing or unknown
        raise ValueError(str(error)) from error


def fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value is of a type: a class, a union, a literal, or a list or dictionary of types."""
    kind, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if kind is Literal:
        return isinstance(value, str) and value in arguments
    if kind is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(
            fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items()
        )
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, NoneType if hint is None else hint)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a checksum of itself, which :func:`unsealed` verifies."""
    return {**values, CHECKSUM: _checksum(json.loads(json.dumps(values)))}  # keys are strings when they are read


def unsealed(values: Any, *, required: bool = False) -> dict[str, Any]:
    """Verify and remove the checksum of an object of :func:`sealed`.

    Args:
        values: The object with its checksum.
        required: Whether it must have a checksum; objects of older versions may have none.

    Raises:
        ValueError: it is not an object, or its checksum is wrong.
    """
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    contents = {key: value for key, value in values.items() if key != CHECKSUM}
    if (required or CHECKSUM in values) and values.get(CHECKSUM) != _checksum(contents):
        raise ValueError("its checksum is wrong")
    return contents


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
