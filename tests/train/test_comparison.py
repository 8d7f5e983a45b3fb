"""Comparison of a checkpoint with a recipe: each use of the checkpoint, each possible difference."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.cli import main
from ropepp_lit.text.identity import same_tokenizer
from ropepp_lit.text.tokenizer import byte_tokenizer

pytestmark = pytest.mark.end_to_end

TINY = ["--config", str(Path(__file__).parent / "tiny.yaml"), "--trainer.limit_val_batches", "1"]
BPE = ["--data.tokenizer", "null", "--data.train_tokenizer", "300", "--model.decoder.vocab_size", "300"]


@pytest.fixture(scope="module")
def trained(run, texts, tmp_path_factory):
    """Folder with `texts` and a run of two steps that trained its tokenizer on them."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(texts, folder / "texts")
    run("fit", *options("run"), "--trainer.max_steps", 2, cwd=folder)
    return folder


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    """Copy of that folder, as the current folder."""
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def options(folder, *more):
    source = ["--data.source", "texts", "--data.cache_dir", "cache"]
    return [*TINY, *BPE, *source, "--trainer.default_root_dir", folder, *more]


def last(folder):
    return read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")


def samples(checkpoint):
    return checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["samples"]


def change_text(folder):
    for path in sorted((folder / "texts").iterdir())[:20]:
        path.write_text("Quite another text, zebras and all. " * 9)


def touch_text(folder):
    for path in (folder / "texts").iterdir():
        os.utime(path, (1, 1))


def lose_cache(folder):
    shutil.rmtree(folder / "cache")


@pytest.mark.parametrize(
    ("change", "starts_over"),
    [(change_text, True), (touch_text, False), (lose_cache, False)],
    ids=["changed", "touched", "no cache"],
)
def test_a_run_continues_with_its_own_tokenizer(run, copied, change, starts_over):
    before = last(copied)
    change(copied)
    printed = run("fit", *options("run"), "--ckpt_path", "auto", "--trainer.max_steps", 3, cwd=copied).stdout
    after = last(copied)
    assert after["global_step"] == 3
    assert after[KEY]["tokenizer"] == before[KEY]["tokenizer"]
    assert samples(after) == (0 if starts_over else 4) + 2
    line = "Note: the data start over at sample 0 instead of 4: the training documents of texts have different contents"
    assert (line in printed) == starts_over
    held_out = "held out other documents than texts; it may have been trained on these"
    assert (held_out in printed) == starts_over


def test_held_out_documents_are_those_of_the_run(run, copied, tmp_path):
    arguments = [copied / "run" / "checkpoints" / "last.ckpt", "--tasks", "perplexity", "--lengths", 64]
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "texts").mkdir(parents=True)
    for number in range(40):
        (elsewhere / "texts" / f"{number}.txt").write_text(f"Something else {number}. " * 9)
    failed = run("evaluate", *arguments, "--out", "out", cwd=elsewhere, returncode=2).stderr
    assert "text: the documents held out of texts here differ from those of the run that created" in failed
    lose_cache(copied)
    touch_text(copied)
    shutil.rmtree(elsewhere / "texts")
    shutil.move(copied / "texts", elsewhere / "texts")  # the path of the documents does not matter
    assert "Note" not in run("evaluate", *arguments, "--out", "out", cwd=elsewhere).stdout
    checkpoint = last(copied)
    del checkpoint[KEY]["held_out"]
    torch.save(checkpoint, elsewhere / "old.ckpt")
    printed = run("evaluate", "old.ckpt", *arguments[1:], "--out", "old", cwd=elsewhere).stdout
    assert "Note: old.ckpt is of an earlier version and does not store its held-out documents; those" in printed


REFUSED, NOTED, ACCEPTED = "refused", "noted", "accepted"
WAYS = ("init_from", "ckpt_path", "validate")
TABLE = {  # difference: result for each use of the checkpoint, and printed text
    "nothing": ((ACCEPTED, ACCEPTED, ACCEPTED), ""),
    "tokenizer of the data": ((NOTED, REFUSED, REFUSED), "tokenizer"),
    "special ids": ((NOTED, REFUSED, NOTED), "opening [5] → [0], eos_token_id 2 → 1"),
    "base": ((NOTED, NOTED, NOTED), "model.frequencies.rope_theta 10000.0 → 20000.0"),
    "shapes": ((REFUSED, REFUSED, REFUSED), "its weights do not fit the recipe's model"),
    "ties": (
        (REFUSED, REFUSED, REFUSED),
        "its weights do not fit the recipe's model (model.decoder.tie_word_embeddings",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", TABLE)
def test_differences_by_use_of_the_checkpoint(copied, capsys, way, what):
    """In this process: `plan` runs the checks of `fit`."""
    happens, text = TABLE[what][0][WAYS.index(way)], TABLE[what][1]
    path = "run/checkpoints/last.ckpt"
    more = []
    if what == "tokenizer of the data":  # a recipe with another tokenizer
        more = ["--data.train_tokenizer", "null", "--data.tokenizer", "bytes"]
    if what == "special ids":
        checkpoint = last(copied)
        checkpoint[KEY] |= {"opening": [5], "eos_token_id": 2}
        path = "special.ckpt"
        torch.save(checkpoint, path)
    if what == "base":
        more = ["--model.frequencies.rope_theta", "20000"]
    if what == "shapes":
        more = ["--model.decoder.intermediate_size", "64"]
    if what == "ties":
        more = ["--model.decoder.tie_word_embeddings", "true"]
    names = ["--model.init_from", path] if way == "init_from" else ["--ckpt_path", path]
    if what == "tokenizer of the data":  # so that a plan finds the data
        main(["prepare", "texts", "--out", "other", "--tokenizer", "bytes", "--validation_fraction", "0.2"])
        more = ["--data.train_tokenizer", "null", "--data.source", "other"]
    command = ["validate" if way == "validate" else "plan", *options("fresh"), *names, *more]
    capsys.readouterr()
    code = 0
    try:
        main(command)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == (2 if happens == REFUSED else 0), printed
    if happens == REFUSED:
        (line,) = [line for line in printed.err.splitlines() if line.startswith("ropepp-lit: error: ")]
        assert text in line
    elif happens == NOTED:
        assert text in printed.out
    else:
        assert "Note" not in printed.out
        assert "differs" not in printed.out


@pytest.mark.parametrize("subcommand", ["fit", "validate", "plan"])
def test_another_tokenizer_in_the_recipe_of_a_continued_run(copied, capsys, subcommand):
    path = "run/checkpoints/last.ckpt"
    more = ["--data.train_tokenizer", "null", "--data.tokenizer", "bytes", "--ckpt_path", path]
    before = sorted(copied.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main([subcommand, *options("run"), *more])
    assert stop.value.code == 2
    assert (
        f"data.tokenizer: bytes is not the tokenizer of {path}; restore the previous value, or"
        in capsys.readouterr().err
    )
    assert sorted(copied.rglob("*")) == before


def test_a_run_continues_without_init_from_tokenizer_and_cache(run, copied):
    """A run was initialized from weights, with their tokenizer; only its own checkpoint still exists."""
    shutil.copy(copied / "run" / "checkpoints" / "last.ckpt", copied / "weights.ckpt")
    shutil.rmtree(copied / "run")
    begin = ["--model.init_from", "weights.ckpt", "--data.train_tokenizer", "null", "--data.tokenizer", "weights.ckpt"]
    run("fit", *options("run"), *begin, "--trainer.max_steps", 2, cwd=copied)
    (copied / "weights.ckpt").unlink()
    lose_cache(copied)
    go_on = ["--config", "run/recipe.yaml", "--ckpt_path"]
    plan = run("plan", *go_on, "auto", "--trainer.max_steps", 3, cwd=copied).stdout
    fitted = run("fit", *go_on, "auto", "--trainer.max_steps", 3, cwd=copied).stdout
    validated = run("validate", *go_on, "run/checkpoints/last.ckpt", cwd=copied).stdout
    note = "Note: data.tokenizer: weights.ckpt cannot be loaded; the tokenizer of run/checkpoints/"
    for printed in (plan, fitted, validated):
        assert note in printed
    assert "Continuing from run/checkpoints/step=2.ckpt at step 2 of 3: 1 steps are left" in plan
    assert "bits per byte" in validated
    assert samples(last(copied)) == 6  # the data position continues
    assert last(copied)[KEY]["origin"] == "weights.ckpt"
    arguments = ["run/checkpoints/last.ckpt", "--tasks", "perplexity", "--lengths", 64, "--out", "out"]
    run("evaluate", *arguments, cwd=copied)


def llama3_1(copied):
    """Import of a model whose scaling supports half of the context length that it states."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_parameters=scaling,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(copied / "hf")
    byte_tokenizer().tokenizer.save(str(copied / "hf" / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (copied / "hf" / "tokenizer_config.json").write_text(json.dumps(names))
    main(["import", "hf", "llama.ckpt"])


def test_an_imported_recipe_passes_plan_fit_and_validate(run, copied):
    """With text, and with shards prepared with the same tokenizer."""
    llama3_1(copied)
    main(["prepare", "texts", "--out", "shards", "--tokenizer", "llama.ckpt", "--validation_fraction", "0.2"])
    recipe = [*TINY, "--config", "llama.yaml", "--data.cache_dir", "cache", "--data.source"]
    note = "Note: data.context_length: 128 is beyond the 64 tokens (factor × original_max_position_embeddings)"
    for source in ("texts", "shards"):
        more = [source, "--trainer.default_root_dir", f"of {source}", "--trainer.max_steps", 1]
        for subcommand in ("fit", "plan"):
            assert note in run(subcommand, *recipe, *more, cwd=copied).stdout
    path = "of shards/checkpoints/last.ckpt"
    for checkpoint in (path, "llama.ckpt"):
        assert note in run("validate", *recipe, "texts", "--ckpt_path", checkpoint, cwd=copied).stdout
    assert note in run("plan", *recipe, "texts", "--ckpt_path", path, "--trainer.max_steps", 2, cwd=copied).stdout
    beyond = [*recipe, "texts", "--data.context_length", 129]
    for subcommand, way in (("fit", []), ("plan", []), ("validate", ["--ckpt_path", "llama.ckpt"])):
        failed = run(subcommand, *beyond, *way, cwd=copied, returncode=2).stderr
        assert "data.context_length: 129 is beyond the 64 tokens" in failed


def test_vocab_size_is_checked_against_tokens_in_the_data(run, copied):
    """The tokenizer has one token more than the model, first absent from and then present in the data."""
    tokenizer = byte_tokenizer().tokenizer
    tokenizer.add_tokens(["<never>"])
    tokenizer.save(str(copied / "more.json"))
    more = [*TINY, "--data.tokenizer", "more.json", "--data.cache_dir", "cache", "--trainer.max_steps", 1]
    note = "Note: the tokenizer has 259 tokens and the model 258; the data do not contain the others"
    fresh = [*more, "--data.source", "texts", "--trainer.default_root_dir", "fresh"]
    for subcommand in ("fit", "plan"):
        assert note in run(subcommand, *fresh, cwd=copied).stdout
    (copied / "texts" / "more.txt").write_text("This one says <never>.")
    failed = run("fit", *fresh, "--trainer.default_root_dir", "other", cwd=copied, returncode=2).stderr
    assert "258 is below the 259 tokens of the tokenizer, and 258 occurs in the data; set it to 259" in failed
    go_on = [*fresh, "--ckpt_path", "auto", "--trainer.max_steps", 2]
    failed = run("fit", *go_on, cwd=copied, returncode=2).stderr
    assert "258 occurs in the data; prepare the data with the tokenizer of fresh/checkpoints/step=1.ckpt" in failed


def test_tokenizers_are_compared_by_behavior():
    text = byte_tokenizer().tokenizer.to_str()
    values = json.loads(text)
    values |= {"truncation": {"max_length": 64, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
    values["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    values["model"] = {name: value for name, value in reversed(values["model"].items()) if value not in (None, False)}
    assert same_tokenizer(text, json.dumps(values, indent=3))
    Tokenizer.from_str(json.dumps(values))  # it is one
    values["model"]["merges"] = ["a b"]
    merged = json.dumps(values)
    assert not same_tokenizer(text, merged)
    values["model"]["merges"] = [["a", "b"]]
    assert same_tokenizer(merged, json.dumps(values))
    values["normalizer"] = {"type": "Lowercase"}
    assert not same_tokenizer(merged, json.dumps(values))
