"""Create pairs for fine-tuning: functions of Python's standard library, and the first sentence of their docstrings.

    python tools/docstrings.py --out runs/docstrings

Writes OUT/train.jsonl and OUT/held-out.jsonl, an object with `prompt` and `completion` on each line. All functions of a
module are in the same file, so that near copies within a module are not in both. OUT/preferences.jsonl has `prompt`,
`chosen` and `rejected`: the pairs of OUT/train.jsonl, each with the sentence of another function.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jsonargparse

from ropepp_lit.files import write_whole

QUESTION = "\n# What does this function do?\n#"
"""Text between the source of a function and the sentence."""

HELD_OUT = 0.1
"""Fraction of the modules, selected by a hash of their names."""


def docstrings(*, out: Path, max_characters: int = 800, seed: int = 0) -> None:
    """Write the pairs.

    Args:
        out: Output folder.
        max_characters: Maximum length of a function's source without its docstring; longer functions are skipped.
        seed: Seed of the rejected sentences.
    """
    found: dict[str, list[dict[str, str]]] = {"train": [], "held-out": []}
    library = Path(sysconfig.get_path("stdlib"))
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if name.startswith(("site-packages/", "test/", "idlelib/idle_test/")) or "/tests/" in name:
            continue
        split = "held-out" if _share(name) < HELD_OUT else "train"
        for source, sentence in pairs(path.read_text(encoding="utf-8", errors="replace")):
            if not 3 <= len(sentence.split()) <= 30:
                left_out["a sentence of fewer than 3 words or more than 30"] += 1
                continue
            if len(source) > max_characters:
                left_out[f"a function of more than {max_characters:,} characters"] += 1
                continue
            if source in seen:
                left_out["a function that occurred before"] += 1
                continue
            seen.add(source)
            found[split].append({"prompt": source + QUESTION, "completion": f" {sentence}", "module": name})
    found["preferences"] = list(preferences(found["train"], seed=seed))
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        write_whole(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{out / name}.jsonl: {len(rows):,} rows")
    for reason, count in left_out.items():
        print(f"left out: {count:,} ({reason})")


def pairs(code: str) -> Iterator[tuple[str, str]]:
    """Yield the source of each function without its docstring, and the docstring's first sentence in one line."""
    try:
        module = ast.parse(code)
    except SyntaxError:
        return
    lines = code.splitlines()
    for node in ast.walk(module):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        text, doc = ast.get_docstring(node), node.body[0]
        if not text or doc.end_lineno is None or node.end_lineno is None or doc.lineno <= node.lineno:
            continue
        kept = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
        sentence = re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip(), maxsplit=1)[0]
        yield textwrap.dedent("\n".join(kept)), " ".join(sentence.split())


def preferences(rows: Sequence[dict[str, str]], *, seed: int) -> Iterator[dict[str, str]]:
    """Yield each pair with its sentence as the chosen and a random other sentence as the rejected answer.

    Args:
        rows: Pairs. If all have the same sentence, nothing is yielded.
        seed: Seed of the random choice. A sentence equal to the chosen one is sampled again.
    """
    sentences = [row["completion"] for row in rows]
    draw = random.Random(seed)
    for row in rows if len(set(sentences)) > 1 else ():
        rejected = row["completion"]
        while rejected == row["completion"]:
            rejected = draw.choice(sentences)
        yield {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected, "module": row["module"]}


def _share(name: str) -> float:
    """Return a number between 0 and 1 that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


if __name__ == "__main__":
    jsonargparse.auto_cli(docstrings, as_positional=False)
