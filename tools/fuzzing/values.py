"""Values that are probably invalid, and modifications of a tree of JSON values."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Places:
    """Paths that modified files can refer to."""

    folder: Path
    """Folder of the case."""
    outside: Path
    """File outside of it, which must not change."""


class Raw:
    """Text that is inserted into JSON without quotes, valid or not."""

    def __init__(self, text: str) -> None:
        self.text = text


NUMBERS = (
    0, -1, 1, 2, 3, 7, 255, 256, 10**6, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    0.5, -0.5, 1e-300, 1e300, Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("-0"),
    Raw("-0.0"), Raw("1" + "0" * 400), Raw("1" + "0" * 5000), Raw("01"), Raw("1e"), True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "null", "true", "1", "1e3", "nan", "\0", "a\0b", "\ud800", "\udcff", "\u202eabc", "e\u0301\u0301",
    "😀", "\ufeff", "\n", "a\nb", "\x1b[31m", "x" * 100_000, "%s%n{}", "{{ 7 * 7 }}", "{% for",
    "{{ ''.__class__.__mro__ }}", "{% for i in range(999999999) %}x{% endfor %}", "{{ 'x' * 9999999999 }}", "..",
    "../../x", "../outside", "/etc/x", "/dev/zero", "C:\\x", "a\\..\\b", "~", "~root/x", "file:///etc/passwd",
    "http://localhost:1/x", "s3://bucket/x", "hf:x/y", "org/model", "os.system", "builtins.eval", "torch.nn.Linear",
    "ropepp_lit.nn.RoPE", "<|end_of_text|>", "float32", "object", "<U1000000000", "V8", "uint8", "int64",
)  # fmt: skip
VALUES = (None, [], {}, [None], [[]], {"": None}, {"a": {"a": 1}}, [1, 2, 3], ["a"], [1, "a", None], [[1, 2], [3]])


def _nested(rng: random.Random) -> Raw:
    depth = rng.choice((100, 900, 5_000))
    begin, end = rng.choice((("[", "]"), ('{"a":', "}")))
    return Raw(begin * depth + ("1" if begin != "[" else "") + end * depth)


def make_value(rng: random.Random, places: Places) -> Any:
    """Return a value that is probably invalid."""
    return rng.choice(
        (
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice((str(places.outside), os.path.relpath(places.outside, places.folder))),
            lambda: rng.choice(VALUES),
            lambda: rng.choice(VALUES),
            lambda: [rng.choice(NUMBERS) for _ in range(rng.randrange(1, 50))],
            lambda: _nested(rng),
        )
    )()


def near(rng: random.Random, value: Any, places: Places) -> Any:
    """Return a value of the same type close to the given one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value // 2, value + 2 ** rng.randrange(64), float(value))
        )
    if isinstance(value, float):
        return rng.choice((value * 2, -value, value + 1e-9, int(value) if abs(value) < 1e300 else 0, 1 / (value or 1)))
    if isinstance(value, str) and value:
        place = rng.randrange(len(value))
        other = rng.choice((*TEXTS[:20], chr(rng.randrange(32, 127))))
        return rng.choice(
            (value[:place], value[place:], value[:place] + other + value[place + 1 :], value.upper(), value * 2)
        )
    return make_value(rng, places)


def _nodes(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all nested values; only some of long lists."""
    found = [at]
    if isinstance(value, dict):
        items: Any = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in items if len(items) <= 40 else [*items[:20], *items[-20:]]:
        found += _nodes(inner, (*at, key))
    return found


def mutate_tree(rng: random.Random, root: Any, places: Places) -> tuple[Any, str]:
    """Change one value of a tree of JSON values; returns the tree and a description of the change."""
    nodes = _nodes(root)
    # By depth first, so that a vocabulary does not take all cases.
    depth = rng.choice(sorted({len(node) for node in nodes}))
    path = rng.choice([node for node in nodes if len(node) == depth])
    where = "/".join(map(str, path))[:80] or "the whole"
    if not path:
        value = make_value(rng, places) if rng.random() < 0.7 or not isinstance(root, dict) else [root]
        return value, f"{where} is {shown(value)}"
    parent = root
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    kind = rng.choice(("value", "value", "value", "near", "near", "delete", "rename", "repeat", "shape", "swap"))
    if kind == "delete":
        del parent[key]
        return root, f"{where} is deleted"
    if kind == "rename" and isinstance(parent, dict):
        name = rng.choice((str(key) + "_", str(key).upper(), rng.choice(TEXTS), *map(str, parent)))
        parent[name] = parent.pop(key)
        return root, f"{where} is called {shown(name)}"
    if kind == "repeat":
        if isinstance(parent, dict):
            value = make_value(rng, places)
            parent[Repeated(key)] = value
            return root, f"{where} is there twice, then {shown(value)}"
        parent.extend([old] * rng.choice((1, 2, 1000)))
        return root, f"{where} is repeated"
    if kind == "shape":
        parent[key] = rng.choice(([old], {"a": old}, [old, old], str(old), [] if isinstance(old, list) else None))
        return root, f"{where} is {shown(parent[key])}"
    if kind == "swap":
        others = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        other = rng.choice(others)
        parent[key], parent[other] = parent[other], parent[key]
        return root, f"{where} and {other} are swapped"
    parent[key] = near(rng, old, places) if kind == "near" else make_value(rng, places)
    return root, f"{where} is {shown(parent[key])}"


class Repeated(str):
    """Key with the same text as another one, but a different hash, so that a dict has both."""

    __slots__ = ()

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def shown(value: Any) -> str:
    text = value.text if isinstance(value, Raw) else ascii(value)
    return text if len(text) <= 60 else f"{text[:50]}… ({len(text)})"


def dump_json(value: Any) -> bytes:
    """Return JSON with raw parts and repeated keys."""
    raws: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value.text)
            return f"\x01{len(raws) - 1}\x01"
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    text = json.dumps(plain(value), indent=1)
    for number, raw in enumerate(raws):
        text = text.replace(f'"\\u0001{number}\\u0001"', raw)
    return text.encode("utf-8", "surrogatepass")
