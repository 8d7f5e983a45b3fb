"""Modifications of a file that a disk, a broken tool or an attacker could make, by file format.

Each function takes a `random.Random`, the file and :class:`Places`, modifies the file and returns a description of the
change. All choices come from the random number generator, so a case can be repeated.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from fuzzing.values import Places, Raw, dump_json, make_value, mutate_tree, near, shown
from ropepp_lit.sharded import _Reader


def mutate_json(rng: random.Random, path: Path, places: Places) -> str:
    """Change one or two values of a file of JSON."""
    root, description = json.loads(path.read_text(encoding="utf-8")), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        root, what = mutate_tree(rng, root, places)
        description.append(what)
        if not isinstance(root, dict | list):
            break
    path.write_bytes(dump_json(root))
    return "; ".join(description)


def mutate_json_lines(rng: random.Random, path: Path, places: Places) -> str:
    """Change a row of a file of JSON lines."""
    lines = path.read_bytes().splitlines()
    number = rng.randrange(len(lines))
    value, what = mutate_tree(rng, json.loads(lines[number]), places)
    lines[number] = dump_json(value).replace(b"\n", b"")
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"line {number}: {what}"


YAML = (
    "!!python/object/apply:os.system ['touch {outside}']", "!!python/name:os.system", "*a", "&a [*a]", "~", "1_000",
    "0x10", "1:30", "2020-01-01", ".nan", ".inf", "-.inf", "!!binary x", "!!set {{a}}", "? a", "- a\n- b", "|\n  a",
    "'", '"', "{{", "[", "@a", "%a", "\t", "yes", "<<: {{a: 1}}", "!x y", "${{oc.env:HOME}}", "1e3", "1.0e+3", "0o17",
    "=", "{outside}",
)  # fmt: skip


def mutate_yaml(rng: random.Random, path: Path, places: Places) -> str:
    """Change one or two values of a recipe, or a line of its text."""
    if rng.random() < 0.3:
        lines = path.read_text(encoding="utf-8").splitlines()
        number = rng.randrange(len(lines))
        new = rng.choice(YAML).format(outside=places.outside)
        key, colon, _ = lines[number].partition(":")
        lines[number] = f"{key}: {new}" if colon and rng.random() < 0.8 else new
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"line {number} is {lines[number][:60]!r}"
    root, description = yaml.safe_load(path.read_text(encoding="utf-8")), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        root, what = mutate_tree(rng, root, places)
        description.append(what)
        if not isinstance(root, dict | list):
            break
    text = dump_json(root).decode("utf-8", "surrogatepass")  # JSON is YAML, as far as it is JSON
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return "; ".join(description)


def mutate_bytes(rng: random.Random, path: Path, places: Places) -> str:
    """Flip, overwrite, truncate, insert, move or repeat bytes."""
    content = bytearray(path.read_bytes())
    description = [_mutate_content(rng, content) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
    path.write_bytes(content)
    return "; ".join(description)


def _mutate_content(rng: random.Random, content: bytearray) -> str:
    size = len(content)
    if not size:
        content += rng.randbytes(rng.randrange(1, 100))
        return "random bytes for none"
    # Ends and beginnings of files hold what matters.
    place = rng.choice((rng.randrange(size), rng.randrange(min(size, 64)), size - 1 - rng.randrange(min(size, 200))))
    length = min(size - place, rng.choice((1, 2, 4, 8, 64, 512)))
    kind = rng.randrange(9)
    if kind <= 1:
        content[place] ^= 1 << rng.randrange(8)
        return f"a bit of byte {place}"
    if kind == 2:
        content[place : place + length] = rng.randbytes(length)
        return f"{length} random bytes at {place}"
    if kind == 3:
        fill = rng.choice((0, 255, 10, 32, 34, 57, 128))
        content[place : place + length] = bytes([fill]) * length
        return f"{length} bytes {fill} at {place}"
    if kind == 4:
        del content[place:]
        return f"cut to {place} bytes"
    if kind == 5:
        del content[place : place + length]
        return f"{length} bytes less at {place}"
    if kind == 6:
        other = rng.randrange(size)
        content[place:place] = content[other : other + length]
        return f"{length} bytes from {other} inserted at {place}"
    if kind == 7:
        other = rng.randrange(size - length + 1)
        content[place : place + length], content[other : other + length] = (
            content[other : other + length],
            content[place : place + length],
        )
        return f"{length} bytes of {other} and {place} swapped"
    number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, size, -1))
    packed = struct.pack("<q" if number < 0 else "<Q", number)[: rng.choice((1, 2, 4, 8))]
    content[place : place + len(packed)] = packed
    return f"the number {number} in {len(packed)} bytes at {place}"


def mutate_safetensors(rng: random.Random, path: Path, places: Places) -> str:
    """Change the header of a safetensors file, or its length."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[name := rng.choice(names)]
    kind = rng.choice(("dtype", "shape", "offsets", "overlap", "any", "any", "length", "data"))
    description = f"{name}: {kind}"
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "", "f32", 1))
        description += f" {entry['dtype']}"
    elif kind == "shape":
        entry["shape"] = rng.choice(
            (
                entry["shape"][::-1],
                [],
                [0],
                [-1],
                [2**63],
                [2**32, 2**32],
                [*entry["shape"], 1],
                [1.5],
                ["a"],
                None,
                [1] * 5000,
            )
        )
        description += f" {shown(entry['shape'])}"
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice(
            (
                [0, 0],
                [4, 0],
                [-4, 4],
                [0, 2**63],
                [2**64 - 1, 2**64 - 1],
                [0],
                None,
                [0, len(data)],
                [len(data), 2 * len(data)],
            )
        )
        description += f" {entry['data_offsets']}"
    elif kind == "overlap":
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    elif kind == "any":
        header, what = mutate_tree(rng, header, places)
        description = what
    packed = dump_json(header)
    length = len(packed)
    if kind == "length":
        length = rng.choice((0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1, 100_000_001))
        description = f"the header has {length} bytes"
    if kind == "data":
        data = rng.choice((b"", data[:-1], data + b"\0", data * 2))
        description = f"{len(data)} bytes after the header"
    path.write_bytes(struct.pack("<Q", length) + packed + data)
    return description


def _mutate_object(rng: random.Random, root: Any, places: Places) -> str:
    """Change a value within dictionaries, lists, tuples and objects of any kind."""
    holders: list[tuple[Any, Any, Any]] = []  # where, key, value
    todo, seen = [root], set()
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, torch.Tensor):
            continue
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        attributes = getattr(value, "__dict__", {}) if not isinstance(value, dict | type) else {}
        for key, inner in [*items, *attributes.items()]:
            holders.append((value, key, inner))
            todo.append(inner)
    holder, key, old = rng.choice(holders)
    kind = rng.choice(("value", "value", "near", "delete", "swap"))
    others = [other for other in holders if type(other[2]) is type(old)]
    if kind == "swap":
        new = rng.choice(others)[2]
    else:
        new = near(rng, old, places) if kind == "near" else make_value(rng, places)
    new = rng.choice((0, -1, "nan")) if isinstance(new, Raw) else new
    description = f"{type(holder).__name__}[{str(key)[:60]}] is {shown(new)}"
    if kind == "delete" and isinstance(holder, dict):
        del holder[key]
        return f"{key} is deleted"
    if isinstance(holder, dict | list):
        holder[key] = new
    else:
        object.__setattr__(holder, key, new)
    return description


def mutate_table(rng: random.Random, path: Path, places: Places) -> str:
    """Change the metadata of a folder of shards."""
    table = _Reader(path.parent).read_metadata()
    description = _mutate_object(rng, table, places)
    path.write_bytes(pickle.dumps(table))
    return description


def mutate_entries(rng: random.Random, path: Path, places: Places) -> str:
    """Change a value or tensor in a torch file; the file itself stays valid."""
    content = torch.load(path, weights_only=True, map_location="cpu")
    if rng.random() < 0.2 and content.get("state_dict"):
        weights = content["state_dict"]
        name, value = rng.choice(list(weights.items()))
        changes: dict[str, Callable[[], Any]] = {
            "empty": lambda: torch.empty(0), "a scalar": lambda: torch.tensor(1.0), "int64": lambda: value.long(),
            "complex": lambda: value.to(torch.complex64), "float64": value.double, "bool": value.bool,
            "transposed": lambda: value.T if value.dim() == 2 else value[None], "sparse": value.to_sparse,
            "nested": lambda: {"a": value}, "None": lambda: None, "meta": lambda: value.to("meta"),
            "quantized": lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
            "expanded": lambda: value.flatten()[:1].expand(10**12), "float8": lambda: value.to(torch.float8_e4m3fn),
        }  # fmt: skip
        kind = rng.choice(list(changes))
        weights[name], description = changes[kind](), f"{name} is {kind}"
    else:
        description = _mutate_object(rng, content, places)
    torch.save(content, path)
    return description


def mutate_file(rng: random.Random, path: Path, places: Places) -> str:
    """Replace the file by something else."""
    others = sorted(file for file in path.parent.iterdir() if file.is_file() and file != path)
    kinds = ["empty", "missing", "folder", "link", "broken link", "loop", "pipe", "pointer", "unreadable", "zeros"]
    if path.suffix == ".yaml":
        kinds.remove("pipe")  # from which a recipe may be read
    kind = rng.choice([*kinds, *["other"] * (4 * bool(others))])
    content = path.read_bytes()
    if kind == "other":
        other = rng.choice(others)
        path.write_bytes(other.read_bytes())
        return f"the content of {other.name}"
    path.unlink()
    if kind == "folder":
        path.mkdir()
        if rng.random() < 0.5:
            (path / "file").write_bytes(b"x")
    elif kind == "link":
        path.symlink_to(places.outside)
    elif kind == "broken link":
        path.symlink_to(places.folder / "nothing")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n")
    elif kind == "unreadable":
        path.write_bytes(content)
        path.chmod(0)
    elif kind in ("empty", "zeros"):
        path.write_bytes(bytes(len(content) if kind == "zeros" else 0))
    return kind


MUTATIONS: dict[str, tuple[Callable[[random.Random, Path, Places], str], ...]] = {
    "bytes": (mutate_bytes, mutate_bytes, mutate_bytes, mutate_file),
    "json": (mutate_json, mutate_json, mutate_json, mutate_bytes, mutate_file),
    "jsonl": (mutate_json_lines, mutate_json_lines, mutate_json_lines, mutate_bytes, mutate_file),
    "yaml": (mutate_yaml, mutate_yaml, mutate_yaml, mutate_bytes, mutate_file),
    "safetensors": (mutate_safetensors, mutate_safetensors, mutate_bytes, mutate_file),
    "table": (mutate_table, mutate_bytes, mutate_bytes, mutate_file),
    "entries": (mutate_entries,),
}
"""Modifications by format, some with more weight."""
