"""The example on docstrings: its pairs, and the script that runs it, on a model of a few thousand parameters."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ropepp_lit.cli import main

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(scope="module")
def tool():
    """tools/docstrings.py as a module."""
    spec = importlib.util.spec_from_file_location("docstrings_tool", TOOLS / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            'def f(x):\n    """Double it. And more."""\n    return 2 * x\n',
            [("def f(x):\n    return 2 * x", "Double it.")],
        ),
        (
            'def f(x):\n    """Double\n    it\n\n    More.\n    """\n    return x\n',
            [("def f(x):\n    return x", "Double it")],
        ),
        (
            'class A:\n    async def f(self):\n        """Wait!"""\n        await self.g()\n',
            [("async def f(self):\n    await self.g()", "Wait!")],
        ),
        ('def f(x):\n    """Nothing."""\n', []),
        ("def f(x):\n    return x\n", []),
        ('def f(x): "One line."; return x\n', []),
        ("def f(:\n", []),
    ],
)
def test_pairs_of_a_module(tool, code, expected):
    assert list(tool.pairs(code)) == expected


def test_rejected_sentences_are_those_of_other_functions(tool):
    rows = [{"prompt": f"p{n}", "completion": f" s{n % 3}", "module": "m"} for n in range(60)]
    drawn = list(tool.preferences(rows, seed=0))
    assert [(row["prompt"], row["chosen"]) for row in drawn] == [(row["prompt"], row["completion"]) for row in rows]
    assert all(row["rejected"] != row["chosen"] for row in drawn)
    assert {row["rejected"] for row in drawn} == {" s0", " s1", " s2"}
    assert drawn == list(tool.preferences(rows, seed=0))
    assert drawn != list(tool.preferences(rows, seed=1))
    assert list(tool.preferences(rows[::3], seed=0)) == []


def test_train_and_held_out_functions_share_no_module(tool, tmp_path, monkeypatch, capsys):
    library = tmp_path / "library"
    for folder in ("", "test", "site-packages"):
        (library / folder).mkdir(exist_ok=True)
    for number in range(60):
        functions = [
            f'def f{number}_{n}():\n    """Return number {number} and {n}."""\n    return {n}\n' for n in range(3)
        ]
        long = f'def long():\n    """Return long {number}."""\n    return "{"x" * 120}"\n'
        same = 'def same():\n    """Return the same."""\n    return 1\n'
        (library / f"m{number}.py").write_text("\n\n".join([*functions, long, same]))
    for folder in ("test", "site-packages"):
        (library / folder / "m.py").write_text('def f():\n    """Is left out."""\n    return 1\n')
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda name: str(library))
    tool.docstrings(out=tmp_path, max_characters=100)
    train, held_out, preferences = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held-out", "preferences")
    )
    assert len(train) + len(held_out) == 3 * 60 + 1
    assert len(held_out) > 6
    assert len(preferences) == len(train)
    assert not {row["module"] for row in train} & {row["module"] for row in held_out}
    for row in held_out:
        source = row["prompt"].removesuffix(tool.QUESTION)
        assert ast.get_docstring(ast.parse(source).body[0]) is None
    printed = capsys.readouterr().out
    assert "left out: 60 (a function of more than 100 characters)" in printed
    assert "left out: 59 (a function that occurred before)" in printed


@pytest.mark.slow
def test_the_example_trains_measures_and_goes_on(tiny, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", *tiny, "--trainer.max_steps", "2", "--trainer.default_root_dir", "base"])
    (tmp_path / "short.yaml").write_text(
        "data: {context_length: 1024, batch_size: 2, cache_dir: cache}\n"
        "trainer: {limit_val_batches: 1, accelerator: cpu}\nsample: {max_new_tokens: 4}\n"
    )
    base = ["--base", "base/checkpoints/last.ckpt", "--recipes", "short.yaml"]
    command = [sys.executable, TOOLS / "docstrings_study.py", "--out", "out", *base, "--limit", "3", "--variants"]
    subprocess.run([*command, "full,LoRA", "--steps", "2"], check=True)
    checkpoint = tmp_path / "out" / "runs" / "LoRA-0" / "checkpoints" / "last.ckpt"
    before = checkpoint.resolve().stat().st_mtime_ns
    subprocess.run([*command, "full,LoRA,LoRA + imaginary,DPO", "--steps", "2"], check=True)
    assert checkpoint.resolve().stat().st_mtime_ns == before
    results = json.loads((tmp_path / "out" / "page" / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["before", "full", "LoRA", "LoRA + imaginary", "DPO"]
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert [line for line in tables.splitlines() if line.startswith("Differences")] == [
        "Differences are to before:", "Differences are to full:", "Differences are to LoRA:",
    ]  # fmt: skip
    # Two layers of width 32 and 4 heads of 8: their two imaginary halves are 32 × 32 each.
    trained = dict(line.strip("| ").split(" | ")[:2] for line in tables.splitlines()[-4:])
    numbers = {name: int(number.replace(",", "")) for name, number in trained.items()}
    assert numbers["LoRA + imaginary"] == numbers["LoRA"] + 2 * 32 * 32
    assert all(json.loads(path.read_text())["seconds"] > 0 for path in tmp_path.glob("out/runs/*/finished.json"))
    for words, message in (
        (["full", "--steps", "3"], "holds the run of another command"),
        (["full,PPO"], "variants: no variant 'PPO'"),
        (["DPO,full"], "variants: DPO is initialized from full; name that one before it"),
    ):
        failed = subprocess.run([*command, *words], check=False, capture_output=True, text=True)
        assert failed.returncode == 1
        assert message in failed.stderr
