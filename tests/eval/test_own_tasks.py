"""Tasks in a user's file: the example of recipes/evaluation.md, and errors."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from copier import Copier

from ropepp_lit.eval.models import Model, load_model
from ropepp_lit.eval.tasks import Request
from ropepp_lit.eval.tasks.retrieval import FAMILIES
from ropepp_lit.text.tokenizer import byte_tokenizer

DOCUMENT = (Path(__file__).parents[2] / "recipes" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example():
    section = DOCUMENT.partition("## A task of your own")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture
def my_tasks(example, tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("my_tasks")
    del sys.modules["my_tasks"]


@pytest.mark.end_to_end
def test_documented_example_with_built_in_tasks(example, run, small_checkpoints, tmp_path):
    (tmp_path / "my_tasks.py").write_text(example)
    for name in ("one", "other"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name} {k * k}" for k in range(60)))
    models = [f"A={small_checkpoints['rope']}", f"B={small_checkpoints['ec']}"]
    tasks = "my_tasks.Parcels,my_tasks.FirstGuess,retrieval:single,noise:my_tasks.Parcels"
    options = ["--lengths", "256,300", "--limit", 3, "--text", "one.txt,other.txt", "--noise_std", 1, "--out", "out"]
    run("evaluate", *models, "--tasks", tasks, *options, cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    actual = {
        (row["task"], row["part"], row["metric"], row["length"], row["heads"]): row
        for row in results["scores"]
        if row["model"] == "B" and row["depth"] is None
    }
    names = [
        ("my_tasks", "Parcels", "score"),
        ("my_tasks", "FirstGuess", "first_guess"),
        ("retrieval", "single", "score"),
    ]
    noisy = [(*names[0], length, heads) for length in (256, 300) for heads in ("real", "imaginary")]
    assert set(actual) == {(*name, length, "") for name in names for length in (256, 300)} | {*noisy}
    assert all(row["examples"] == (2 if row["metric"] == "first_guess" else 3) for row in actual.values())
    assert all(row["low"] <= row["value"] <= row["high"] for row in actual.values())
    assert all(row["difference"] is not None for key, row in actual.items() if key[-1] != "imaginary")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "How many tokens of documents are the model&#39;s first guess." in page
    assert "First guess (%), by length in tokens" in page
    assert (tmp_path / "out" / "task-my_tasks-first_guess.png").exists()
    run("evaluate", models[0], "--tasks", "my_tasks.Parcels", *options, cwd=tmp_path)  # alone
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["task"] for row in results["scores"]} == {"my_tasks"}


def test_a_copier_scores_100_and_a_random_model_0(my_tasks, small_checkpoints, monkeypatch):
    request = Request(length=600, lengths=(600,), limit=10)
    random = load_model(str(small_checkpoints["ec"]), dtype=torch.float32, device=torch.device("cpu"))
    assert my_tasks.Parcels().measure(random, request)[0].value == 0
    monkeypatch.setattr(Model, "device", torch.device("cpu"))
    tokenizer = byte_tokenizer()
    copier = Model(name="copier", path="", decoder=Copier(tokenizer), tokenizer=tokenizer, fingerprint="")
    overall, *by_depth = my_tasks.Parcels().measure(copier, request)
    assert (overall.value, overall.task, overall.part, len(by_depth)) == (100, "my_tasks", "Parcels", 5)


def test_sources_change_with_the_file(my_tasks):
    before = my_tasks.Parcels().sources()
    assert list(before) == ["my_tasks"]
    assert before == my_tasks.FirstGuess().sources()
    with Path(my_tasks.__file__).open("a") as file:
        file.write("# another one\n")
    assert my_tasks.Parcels().sources() != before
    assert FAMILIES["single"].sources() == {}


@torch.no_grad()
def test_first_guesses_match_the_logits(my_tasks, small_checkpoints):
    model = load_model(str(small_checkpoints["ec"]), dtype=torch.float64, device=torch.device("cpu"))
    ids = model.tokenizer.encode_whole("Two and two are four. " * 4)
    request = Request(length=1000, lengths=(1000,), limit=1, documents=[ids])
    (actual,) = my_tasks.FirstGuess().measure(model, request)
    guesses = model.decoder(torch.tensor([ids]))[0, :-1].argmax(-1)
    assert actual.value == pytest.approx(100 * float((guesses == torch.tensor(ids[1:])).double().mean()))
    assert actual.is_share
    assert not actual.is_proportion


MISTAKES = """
from ropepp_lit.eval.tasks import Draft, Family, Task


class Metric(Task):
    def measure(self, model, request):
        return []


class Failing(Task):
    def __init__(self):
        raise ValueError("no data here")

    def measure(self, model, request):
        return []


class WithArguments(Metric):
    def __init__(self, size):
        self.size = size


class Unfinished(Family):
    pass


class Empty(Family):
    def draft(self, rng, *, depth, units):
        return Draft([], [], "?", ["1"])


class Other:
    pass
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.Metric", "nowhere.Metric: cannot be imported (No module named 'nowhere'); run in the folder of"),
        ("mistakes.Nothing", "mistakes.Nothing: cannot be imported (module 'mistakes' has no attribute 'Nothing')"),
        ("mistakes.Other", "tasks: mistakes.Other is not a Task"),
        ("mistakes.Failing", "tasks: mistakes.Failing: cannot be constructed: ValueError: no data here"),
        ("mistakes.WithArguments", "tasks: mistakes.WithArguments: cannot be constructed: TypeError: "),
        ("mistakes.Unfinished", "mistakes.Unfinished: cannot be constructed: TypeError: Can't instantiate abstract"),
        ("mistakes.Empty", "tasks: mistakes.Empty: its drafts have no fillers, so its examples cannot fill a length"),
        ("broken.Metric", "tasks: broken.Metric: cannot be imported: SyntaxError: "),
        ("raising.Metric", "tasks: raising.Metric: cannot be imported: ZeroDivisionError: division by zero"),
        ("retrieval.Metric", "retrieval.Metric: retrieval is a task of ropepp-lit; rename your module"),
        ("noise:mistakes.Metric", "noise is for perplexity and prompts, not mistakes.Metric; set takes_noise = True"),
        ("mistakes.Metric:2", "tasks: no task 'mistakes.Metric:2'"),
    ],
)  # fmt: skip
def test_invalid_tasks(mistake, small_checkpoints, tmp_path, monkeypatch, name, message):
    for module, text in (("mistakes", MISTAKES), ("broken", "def"), ("raising", "1 / 0"), ("retrieval", MISTAKES)):
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    options = ["--tasks", name, "--lengths", 64, "--out", "out"]
    assert message in mistake(small_checkpoints["ec"], *options, subcommand="evaluate", base=[])
    sys.modules.pop("mistakes", None)
