"""JSON that may be damaged or come from elsewhere: parsed, checked by types, and with a checksum where it is ours."""

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
"""The key of the checksum of an object's other keys."""


def parse_json(text: str | bytes) -> Any:
    """A value of JSON.

    Raises:
        ValueError: it is not JSON or not UTF-8, has a number of thousands of digits, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> Any:
    """The value in a file of JSON.

    Raises:
        OSError: see :func:`~ropepp_lit.files.read_text`.
        ValueError: see :func:`parse_json`.
    """
    return parse_json(read_text(path))


def json_line(value: Any) -> bytes:
    """A value as a line of JSON in UTF-8."""
    try:
        return (json.dumps(value, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot encode
        return (json.dumps(value) + "\n").encode()


def typed(kind: type[T], values: Any) -> T:
    """An instance of a dataclass whose fields are plain values.

    Raises:
        ValueError: the values are no object, one is missing or not known, or has another type than the field.
    """
    if not isinstance(values, dict):
        raise ValueError(f"a {kind.__name__} is not an object")
    for name, hint in get_type_hints(kind).items():
        if name in values and not fits(values[name], hint):
            raise ValueError(f"{name} is {str(values[name])[:100]!r}")
    try:
        return kind(**values)
    except TypeError as error:  # one is missing or not known
        raise ValueError(str(error)) from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type: a class, a union of types, a literal, or a list or dictionary of a type."""
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
    """An object of JSON with a checksum of itself, by which :func:`unsealed` finds damage."""
    return {**values, CHECKSUM: _checksum(json.loads(json.dumps(values)))}  # keys as they will be read, texts


def unsealed(values: Any, *, required: bool = False) -> dict[str, Any]:
    """The object of :func:`sealed`, without its checksum.

    Args:
        values: The object with it.
        required: Whether it must have one; otherwise it may have been written before there were any.

    Raises:
        ValueError: it is no object, or is not what was written.
    """
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    found = {key: value for key, value in values.items() if key != CHECKSUM}
    if (required or CHECKSUM in values) and values.get(CHECKSUM) != _checksum(found):
        raise ValueError("its checksum is wrong")
    return found


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
