"""Damaged or untrusted JSON: one kind of exception for every problem."""

import json
import os
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from ropepp_lit.json_files import fits, parse_json, read_json, sealed, typed, unsealed

BROKEN = {
    "nothing": "",
    "cut": '{"a": [1',
    "nested in lists": "[" * 100_000 + "]" * 100_000,
    "nested in objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "thousands of digits": "1" * 5_000,
    "no UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_invalid_json_raises_value_error(kind):
    with pytest.raises(ValueError, match=r"."):
        parse_json(BROKEN[kind])


def test_pipe_instead_of_a_file(tmp_path):
    os.mkfifo(tmp_path / "values.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "values.json")


@pytest.mark.parametrize("changes", [{"a": 2}, {"b": {"c": [1, 3]}}, {"d": None}, {"checksum": 1}, {"checksum": None}])
def test_checksum_detects_every_change(changes):
    values = {"a": 1, "b": {"c": [1, 2]}, "e": "\ud800"}
    kept = sealed(values)
    assert unsealed(json.loads(json.dumps(sealed({"f": {2: (1,), 10: 0.5}})))) == {"f": {"2": [1], "10": 0.5}}
    assert unsealed(dict(reversed(kept.items()))) == values  # in any order
    assert unsealed(values) == values  # as before there were checksums
    for wrong in ({**kept, **changes}, values):
        with pytest.raises(ValueError, match="its checksum is wrong"):
            unsealed(wrong, required=True)


@pytest.mark.parametrize("values", [None, [], "a", 1])
def test_only_objects_have_a_checksum(values):
    with pytest.raises(ValueError, match="not a JSON object"):
        unsealed(values)


FITS = {
    (1, int), (1, float), (1.5, float), (None, int | None), ("a", str), ("head", Literal["head"] | None), (True, bool),
    (None, Any),
}  # fmt: skip
DOES_NOT_FIT = {
    (True, int),
    (False, float),
    (1.5, int),
    ("1", int),
    (None, int),
    ("x", Literal["head"] | None),
    (1, bool),
}


def test_fits():
    assert [pair for pair in FITS if not fits(*pair)] == []
    assert [pair for pair in DOES_NOT_FIT if fits(*pair)] == []
    assert fits({"a": [1, 2]}, dict[str, list[int]])
    assert not fits({"a": [1, None]}, dict[str, list[int]])
    assert not fits({1: [1]}, dict[str, list[int]])


@dataclass
class Row:
    name: str
    counts: list[int]
    share: float | None = None


def test_typed():
    assert typed(Row, {"name": "a", "counts": [1]}) == Row("a", [1])
    for values in (None, {}, {"name": "a"}, {"name": 1, "counts": []}, {"name": "a", "counts": [], "more": 1}):
        with pytest.raises(ValueError, match=r"."):
            typed(Row, values)
