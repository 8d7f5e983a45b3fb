"""Every recipe: instantiated by the command, and run for two steps in a shrunken copy."""

from pathlib import Path

import pytest
import yaml

from ropepp_lit.cli import main

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("**/*.yaml"))
VARIANTS = {
    "rope": ["--model.positions", "RoPE"],
    "eh": ["--model.positions.variant", "eh"],
    "ec": ["--model.positions.variant", "ec"],
}
SHRINK = [
    *("--model.decoder.vocab_size", "300", "--data.train_tokenizer", "300"),
    *("--model.decoder.hidden_size", "32", "--model.decoder.intermediate_size", "48"),
    *("--model.decoder.num_hidden_layers", "1", "--data.context_length", "32", "--data.batch_size", "2"),
    *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--model.schedule.warmup_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
]

pytestmark = pytest.mark.end_to_end


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps(recipe, variant, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data.source", str(texts), "--data.cache_dir", "cache"]
    main(["fit", "--config", str(recipe), *SHRINK, *data, *VARIANTS[variant], "--trainer.default_root_dir", "run"])
    printed = capsys.readouterr().out
    assert {"rope": "RoPE, base", "eh": "RoPE++ EH, base", "ec": "RoPE++ EC, base"}[variant] in printed
    assert "at step 2" in printed
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_header_says_what_the_recipe_needs(recipe):
    header = "\n".join(line for line in recipe.read_text().split("\n\n\n")[0].splitlines() if line.startswith("#"))
    for word in (f"ropepp-lit fit --config recipes/{recipe.name}", "Hardware:", "Tokens:", "Memory"):
        assert word in header
    assert yaml.safe_load(recipe.read_text())["trainer"]["max_steps"] > 0
