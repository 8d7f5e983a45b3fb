"""Round trips of recipes and commands that a run writes."""

import shlex
from pathlib import Path

import pytest
import yaml

from ropepp_lit.arguments import call, command
from ropepp_lit.cli import main
from ropepp_lit.errors import UsageError
from ropepp_lit.train.plan import PlanCLI
from ropepp_lit.train.recipe import to_yaml, write_recipe

pytestmark = pytest.mark.end_to_end


TEXTS = [
    "1e3", "on", "Off", "y", "1:30", "null", "~", "", " a ", "-x", "--prompt", "a'b \"c\" $HOME \\n", "0x1f", "1_000",
    "[1, 2]", "{a: b}", "# no comment", "é→", ".5", "5.", "=", "<<", "!x", "&a", "*a", "%", "@", "`", "2020-01-01",
    "nan", ".inf", "- x", "x: y", "a\nb\n", "\ttab", "True", "?", "...", "---", "1", "+1", "0o7", "\u2028", "\x7f",
    "\U0001f600",
]  # fmt: skip


def test_recipes_round_trip(tiny, tmp_path):
    """With the parser of `fit` and with other YAML parsers."""
    values = dict(zip(TEXTS, reversed(TEXTS), strict=True))
    recipe = {"data": {"validation": values, "source": {"a": 3e-3, "b": 2.0}}, "sample": {"prompt": "1e3"}}
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe), encoding="ascii")
    cli = PlanCLI(["fit", *tiny, "--config", str(tmp_path / "recipe.yaml")])
    assert yaml.safe_load(to_yaml(recipe)) == recipe
    read = cli._read_recipe(tmp_path / "recipe.yaml")
    assert read["data"]["validation"] == values
    assert read["data"]["source"] == {"a": 3e-3, "b": 2.0}
    assert read["sample"]["prompt"] == "1e3"


def test_recipes_with_yaml_callbacks_in_a_folder_named_like_an_option(tiny, tmp_path, monkeypatch):
    """Timer has an enum as default."""
    monkeypatch.chdir(tmp_path)
    timer = "{class_path: Timer, init_args: {duration: {minutes: 5}}}"
    cli = PlanCLI(["fit", *tiny, "--trainer.callbacks", f"[LearningRateMonitor, {timer}]"])
    write_recipe(Path("-run/recipe.yaml"), cli._as_plain(cli.config), cli._read_recipe)
    recipe = yaml.safe_load(Path("-run/recipe.yaml").read_text())
    assert recipe["trainer"]["callbacks"][1]["init_args"]["interval"] == "step"


def test_a_recipe_that_does_not_round_trip_is_not_written(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(UsageError, match=r"gives another one: sample\.prompt 'a' → 1000\.0"):
        write_recipe(path, {"sample": {"prompt": "a"}}, lambda path: {"sample": {"prompt": 1000.0}})
    assert not path.exists()


@pytest.mark.parametrize("text", TEXTS)
def test_commands_round_trip(text):
    read = []

    def generate(checkpoint: str, *, prompt: str = "") -> None:
        read.append((checkpoint, prompt))

    arguments = shlex.split(command("ropepp-lit", "generate", f"runs/{text}", prompt=text))
    call(generate, arguments[1:])
    assert read == [(f"runs/{text}", text)]


def test_a_run_with_special_characters_in_prompt_and_folder(fit, run, capsys):
    """The written recipe and the printed commands work."""
    fit("it's", "--sample.prompt=1e3", "--trainer.max_steps", 1)
    printed = capsys.readouterr().out
    arguments = shlex.split(printed.partition("Next:")[2])
    assert arguments[:5] == ["ropepp-lit", "generate", "it's/checkpoints/last.ckpt", "--prompt", "1e3"]
    end = arguments.index("ropepp-lit", 6)
    main(arguments[6:end])
    assert "at step 1, " in capsys.readouterr().out
    start = arguments.index("fit")
    main(arguments[start : start + 7])
    assert "--- sample at step 2 ---" in capsys.readouterr().out
