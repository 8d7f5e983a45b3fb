"""Tests of tools/fuzz.py: its verdicts, and a few cases of each target."""

import random
import sys
import time
from pathlib import Path

import pytest

from ropepp_lit.errors import UsageError

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.mark.parametrize("cases", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_few_cases_of_each_target(run_file, tmp_path, cases):
    finished = run_file(
        TOOLS / "fuzz.py", "--cases", cases, "--workers", 2, "--out", tmp_path / "fuzzed",
        cwd=tmp_path, timeout=60 * cases,
    )  # fmt: skip
    *lines, last = finished.stdout.splitlines()
    assert last == "No findings."
    assert len(lines) == 1 + 21
    assert all(int(line[20:28].replace(",", "")) == cases for line in lines[1:])


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Returns the verdict on a function that reads a modified file."""
    monkeypatch.syspath_prepend(TOOLS)
    from fuzzing import cases

    monkeypatch.setattr(cases, "SECONDS", 0.2)

    def read(action, number=0):
        target = cases.Target(
            make=lambda folder: None, files={"*.bin": "bytes"}, read=action,
            judge=lambda whole, found, change, path: None if found == whole else "another",
        )  # fmt: skip
        case = cases.Case("name", target, number, seed=0, whole={"a.bin": b"abc" * 50}, root=tmp_path / "w")
        case.expected = "whole"
        return case.run()["verdict"]

    return read


def fail(error):
    raise error


def leave(text, code=2):
    print(text, file=sys.stderr)
    sys.exit(code)


def panic(*_):
    print("thread panicked at src", file=sys.stderr)
    return "whole"


ACTIONS = {
    "refused": [
        lambda *_: fail(UsageError("no")),
        lambda *_: fail(FileNotFoundError(2, "No such file", "name")),
        lambda *_: leave("ropepp-lit: error: no"),
    ],
    "right": [lambda *_: "whole", lambda folder, _: (folder / "new").write_text("x") and "whole"],
    "wrong": [lambda *_: "other"],
    "traceback": [
        lambda *_: fail(KeyError("a")),
        lambda *_: fail(OSError("no name")),
        lambda *_: fail(UsageError(" ")),
        lambda *_: leave("ropepp-lit: error: no", 1),
        lambda *_: leave("ropepp-lit: error: one\nropepp-lit: error: two"),
        panic,
    ],
    "hang": [lambda *_: time.sleep(10)],
    "memory": [lambda *_: bytearray(3 * 2**30)],
    "escape": [
        lambda folder, _: (folder.parent / "x").write_text("x"),
        lambda folder, _: (folder.parent.parent / "outside").write_text("x"),
        lambda folder, _: (folder.parent.parent / "outside").unlink(),
    ],
}


@pytest.mark.parametrize("verdict", ACTIONS)
def test_verdicts(read, verdict):
    assert [read(action) for action in ACTIONS[verdict]] == [verdict] * len(ACTIONS[verdict])


def test_cases_are_determined_by_their_number(read):
    contents = []

    def keep(folder, path):
        contents.append(path.read_bytes() if path.is_file() else None)

    for number in (*range(8), *range(8)):
        read(keep, number)
    assert contents[:8] == contents[8:]
    assert len(set(contents)) > 4


def test_modified_json_has_no_placeholders(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    from fuzzing.mutations import mutate_json
    from fuzzing.values import Places, dump_json

    values = {"a": [1, 2.5, None], "b": {"c": "text", "d": True}}
    path = tmp_path / "values.json"
    same = 0
    for number in range(60):
        path.write_bytes(dump_json(values))
        assert mutate_json(random.Random(number), path, Places(tmp_path, tmp_path / "outside"))
        assert b"\\u0001" not in path.read_bytes()
        same += path.read_bytes() == dump_json(values)
    assert same < 10
