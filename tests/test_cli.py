"""Tests of the command line: mistakes are reported in one line with exit code 2, and nothing is written."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
import yaml

from ropepp_lit.arguments import call
from ropepp_lit.cli import SUBCOMMANDS, main
from ropepp_lit.errors import EXIT_CODES, UsageError
from ropepp_lit.train.cli import RecipeCLI

pytestmark = pytest.mark.end_to_end


STRATEGY = ["--trainer.devices", "2", "--trainer.strategy", "FSDP2Strategy"]
CONTEXT = [*STRATEGY, "--trainer.strategy.context_parallel_size"]
MODE = ["--trainer.strategy.context_parallel_mode"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            [*CONTEXT, "3", *MODE, "heads"],
            "trainer.strategy.context_parallel_mode: heads needs a context_parallel_size that divides the 4 query "
            "heads computed at once; 3 does not; choose gather",
        ),
        ([*CONTEXT, "3"], "3 ranks cannot split rows of 64 tokens into 6 equal chunks"),
        ([*CONTEXT, "2", *MODE, "ring"], "context_parallel_mode"),
        ([*CONTEXT, "0"], "trainer.strategy.context_parallel_size: 0 must be 1 or more"),
        (
            [*CONTEXT, "2", "--data.context_length", "63"],
            "cannot split rows of 63 tokens into 4 equal chunks; choose a data.context_length that 4 divides",
        ),
        ([*STRATEGY, "--trainer.strategy.replicate_size", "3"], "replicate_size: 3 must divide the 2 devices"),
        (["--model.activation_checkpointing", "-1"], "model.activation_checkpointing: -1 must be 0 (none) or more"),
        (["--model.attention_head_groups", "3"], "model.attention_head_groups: 3 must divide the 2 key/value heads"),
        (
            ["--model.attention_head_groups", "2", "--model.activation_checkpointing", "attention"],
            "model.attention_head_groups: activation_checkpointing attention keeps",
        ),
        (["--model.mlp_chunk_tokens", "0"], "model.mlp_chunk_tokens: 0 must be 1 or more"),
        (
            ["--model.offload_activations", "true"],
            "model.offload_activations: moves what activation_checkpointing keeps",
        ),
        (
            ["--model.offload_activations", "true", "--model.activation_checkpointing", "1"],
            "model.offload_activations: moves activations from a GPU to the CPU, and this run has no GPU",
        ),
        (["--model.decoder.hiden_size", "64"], "hiden_size"),
        (["--trainer.max_stepps", "64"], "max_stepps"),
        (["--trainer.max_steps", "many"], "max_steps"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps: give the number of optimizer steps"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["--model.decoder.num_attention_heads", "3"],
            "model.decoder.hidden_size: 32 is not a multiple of num_attention_heads",
        ),
        (["--model.decoder.size", "7b"], "model.decoder.size: no size '7b'"),
        (["--model.positions.variant", "xy"], "variant"),
        (["--model.positions", "RoPEPlus"], "model.positions: no class 'RoPEPlus'; choose one of RoPE, RoPEPP, "),
        (["--model.positions=PositionScheme"], "model.positions: no class 'PositionScheme'; choose one of RoPE, "),
        (["--model.optimizer.class_path", "Adam"], "model.optimizer: no class 'Adam'; choose one of AdamW, Muon, or"),
        (["--model.schedule", "nowhere.Linear"], "model.schedule: nowhere.Linear: cannot be imported (No module named"),
        (["--model.frequencies", "torch.nn.Linear"], "model.frequencies: torch.nn.Linear is not a Frequencies"),
        (["--model.positions"], "expected one argument"),
        (
            ["--model.positions.variant", "eh", "--model.decoder.num_key_value_heads", "1"],
            "model.decoder.num_key_value_heads: RoPE++ EH halves it, so 1 must be even",
        ),
        (["--model.decoder.vocab_size", "100"], "model.decoder.vocab_size: 100 is below the 258 tokens"),
        (["--model.optimizer.lr", "0"], "model.optimizer.lr: 0.0 must be above 0"),
        (["--model.optimizer.eps", "-1"], "model.optimizer.eps: -1.0 must be 0 or more"),
        (["--model.optimizer.weight_decay", "-1"], "model.optimizer.weight_decay: -1.0 must be 0 or more"),
        (["--model.optimizer.betas", "[0.9, 1]"], "model.optimizer.betas: 1.0 must be 0 or more and below 1"),
        (["--model.optimizer", "Muon", "--model.optimizer.momentum", "1"], "model.optimizer.momentum: 1.0 must be"),
        (["--model.decoder.initializer_range", "-1"], "model.decoder.initializer_range: -1.0 must be 0 or more"),
        (["--model.optimizer.lr", "null"], "model.optimizer.lr: must not be null; give a value, or leave the key"),
        (["--model.schedule.warmup_steps", "null"], "model.schedule.warmup_steps: must not be null"),
        (["--model.frequencies.rope_theta", "null"], "model.frequencies.rope_theta: must not be null"),
        (
            ["--trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitor: a, patience: null}}"],
            "trainer.callbacks.patience: must not be null",
        ),
        (
            ["--model.frequencies", "Yarn", "--model.frequencies.factor", "2", "--data.context_length", "10000"],
            "data.context_length: 10,000 is beyond the 8,192 tokens (factor × original_max_position_embeddings)",
        ),
        (["--model.init_optimizer", "true"], "model.init_optimizer: loads the optimizer state of model.init_from"),
        (["--trainer.enable_checkpointing", "false"], "trainer.enable_checkpointing: a run always saves its last step"),
        (["--data.context_length", "1000000"], "data.context_length: 1000000 is longer than"),
        (["--checkpoints.every_n_steps", "0"], "checkpoints.every_n_steps: 0 must be 1 or more"),
        (["--sample.top_p", "2"], "sample.top_p: 2.0 must be above 0"),
    ],
)
def test_mistakes(mistake, options, expected):
    message = mistake(*options)
    assert expected in message
    assert mistake(*options, subcommand="plan") == message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.accelerator", "gpu"], "trainer: "),
        (["--trainer.strategy", "fsdp3"], "trainer: You selected an invalid strategy name"),
        (["--data.source", "nowhere"], "data.source: nowhere: no such file or folder"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt: no such checkpoint"),
        (["--ckpt_path", "."], ".: a folder, not a checkpoint; name a .ckpt file"),
        (["--seed_everything", "-1"], "seed_everything: -1 must be 0 or more and below 2^32"),
    ],
)
def test_mistakes_that_plan_accepts(mistake, options, expected):
    assert expected in mistake(*options)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("{class_path: RoPEPP, init_args: {varient: eh}}", "varient"),
        (
            "{class_path: RoPEPlus, init_args: {variant: eh}}",
            "model.positions: no class 'RoPEPlus'; choose one of RoPE",
        ),
        ("RoPEPlus", "model.positions: no class 'RoPEPlus'; choose one of RoPE"),
        ("3", "model.positions: no class '3'; choose one of RoPE"),
        ("[", "mine.yaml: not valid YAML: while parsing a flow node"),
    ],
)
def test_mistakes_in_a_recipe(mistake, tmp_path, positions, expected):
    (tmp_path / "mine.yaml").write_text(f"model:\n  positions: {positions}\n")
    for option in ("--config", "-c"):
        assert expected in mistake(option, "mine.yaml")


@pytest.mark.parametrize(("subcommand", "world_size"), [("generate", "2"), ("fit", ""), ("fit", "2")])
def test_only_rank_0_of_a_run_prints_an_error(monkeypatch, capsys, subcommand, world_size):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(SystemExit):
        main([subcommand, "--config", "nowhere.yaml"])
    errors = capsys.readouterr().err
    assert errors.count("ropepp-lit: error: ") == (0 if (subcommand, world_size) == ("fit", "2") else 1)


def test_empty_folder(mistake, tmp_path):
    (tmp_path / "bare").mkdir()
    assert "data.source: bare: it contains no files to read" in mistake("--data.source", "bare")


def test_validate_requires_a_checkpoint(mistake):
    assert "ckpt_path is missing" in mistake(subcommand="validate")


def test_files_that_are_not_checkpoints(mistake, tmp_path):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    assert "text.ckpt: not a readable checkpoint" in mistake("--ckpt_path", "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    assert "foreign.ckpt: not a checkpoint of ropepp-lit" in mistake("--ckpt_path", "foreign.ckpt")


def test_incompatible_checkpoints(mistake, run, tiny, tmp_path):
    run("fit", *tiny, "--trainer.max_steps", "1", "--trainer.default_root_dir", "run", cwd=tmp_path)
    path = "run/checkpoints/last.ckpt"
    other = ["--ckpt_path", path, "--trainer.default_root_dir", "other"]
    wider = mistake(*other, "--model.decoder.hidden_size", "64")
    assert f"{path}: its weights do not fit" in wider
    assert "model.decoder.hidden_size 32 → 64" in wider
    assert "model.positions.variant ec → eh" in mistake(*other, "--model.positions.variant", "eh")
    assert "model.positions.variant ec → none" in mistake(*other, "--model.positions", "RoPE")
    muon = mistake(*other, "--model.optimizer", "Muon")
    assert f"model.optimizer: {path} stores the state of AdamW, which Muon cannot continue" in muon
    for options in (["--ckpt_path", path], ["--model.init_from", path]):
        wider = [*options, "--trainer.default_root_dir", "other", "--model.decoder.hidden_size", "64"]
        assert mistake(*wider, subcommand="plan") == mistake(*wider)
    again = mistake("--trainer.default_root_dir", "run")
    assert "holds checkpoints of an earlier run (step 1); continue it by --ckpt_path auto" in again
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / path).read_bytes()[:-1000])
    assert "cut.ckpt: not a readable checkpoint" in mistake("--ckpt_path", "cut.ckpt")


def test_generate(mistake, tmp_path):
    assert "nowhere.ckpt: no such checkpoint" in mistake("nowhere.ckpt", subcommand="generate", base=[])
    assert "checkpoint" in mistake(subcommand="generate", base=[])
    assert "tmperature" in mistake("x", "--tmperature", "1", subcommand="generate", base=[])
    assert "temperature: -1.0 must be 0" in mistake("x", "--temperature", "-1", subcommand="generate", base=[])
    assert "max_new_tokens: 0 must be 1" in mistake("x", "--max_new_tokens", "0", subcommand="generate", base=[])


def test_unknown_subcommand(mistake):
    message = mistake(subcommand="trian")
    assert "no subcommand 'trian'; choose one of fit, validate, plan, prepare, import, export, upcycle, " in message
    assert "generate, chat, serve, evaluate, figures, doctor" in message


def test_help_and_version(run, command_path, tmp_path):
    def fresh(*words):
        """Returns the output of the command in a new process, which takes at most two seconds."""
        return subprocess.run([command_path, *words], capture_output=True, text=True, check=True, timeout=2).stdout

    printed = fresh("--help")
    for name in SUBCOMMANDS:
        assert name in printed
    assert "--max_new_tokens" in fresh("generate", "--help")
    assert "--chat_template" in fresh("chat", "--help")
    for name in ("fit", "validate"):
        printed = run(name, "--help", cwd=tmp_path).stdout
        for key in ("--model.decoder.size", "--data.context_length", "--checkpoints.every_n_steps", "--ckpt_path"):
            assert key in printed, (name, key)
    assert fresh("--version").startswith("ropepp-lit 0.")


@pytest.mark.parametrize("subcommand", ["generate", "chat", "serve", "figures", "doctor"])
def test_help_imports_nothing_heavy(subcommand):
    code = (
        "import sys; from ropepp_lit.cli import main\n"
        f"try: main(['{subcommand}', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'lightning', 'tokenizers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.parametrize("text", ["---", "~", "#", "# a", "Null", "1e3", "no", "[a]"])
def test_special_texts_of_yaml_reach_a_subcommand(text):
    """Separators and tokens can be such texts."""
    found = []

    def subcommand(*, split: "str | None" = None, limit: "int | None" = None) -> None:
        found.append((split, limit))

    call(subcommand, ["subcommand", f"--split={text}"])
    call(subcommand, ["subcommand", "--split", "null", "--limit", "null"])
    assert found == [(text, None), (None, None)]


def test_a_number_that_yaml_reads_as_null():
    def subcommand(*, limit: "int | None" = None) -> None:
        raise AssertionError

    for text in ("~", "# a", "null "):
        with pytest.raises(UsageError, match=f"limit: '{text}' is not a valid value"):
            call(subcommand, ["subcommand", "--limit", text])


def test_special_texts_of_yaml_reach_a_run(tmp_path, monkeypatch):
    """Covers each of our options of type `str | None`, and separators, in a recipe and on the command line."""
    found = {}

    def note(cli):
        options = cli.parser._subcommands_action._name_parser_map["fit"]._actions
        ours = [a.dest for a in options if a.dest.split(".")[0] in ("model", "data", "sample", "evaluation")]
        texts = [a.dest for a in options if a.dest in ours and getattr(a, "_typehint", None) == str | None]
        found.update({key: cli.config["fit"][key] for key in (*texts, "data.split")})
        raise SystemExit

    def read(*words):
        found.clear()
        with pytest.raises(SystemExit):
            RecipeCLI(["fit", *map(str, words)])
        return dict(found)

    monkeypatch.setattr(RecipeCLI, "instantiate_classes", note)
    keys = list(read())
    texts = {"data.tokenizer", "data.cache_dir", "data.chat_template", "data.split"}
    assert texts | {"model.init_from", "model.decoder.size"} == set(keys)
    recipe = tmp_path / "recipe.yaml"
    for text in ("---", "# a", "~", "Null"):
        expected = dict.fromkeys(keys, text)
        nested = {}
        for key in keys:
            *groups, name = key.split(".")
            part = nested
            for group in groups:
                part = part.setdefault(group, {})
            part[name] = text
        recipe.write_text(json.dumps(nested), encoding="utf-8")
        assert read("--config", recipe) == expected
        assert read(*(f"--{key}={text}" for key in keys)) == expected
    nothing = {**dict.fromkeys(keys), "data.split": "null"}
    assert read(*(f"--{key}=null" for key in keys)) == nothing
    recipe.write_text("data:\n  tokenizer:\n  cache_dir: ~ # none\nmodel: {init_from: null}\n", encoding="utf-8")
    assert {key for key, value in read("--config", recipe).items() if value is not None} == {"data.split"}


@pytest.mark.parametrize("mode", ["verify", "merge"])
@pytest.mark.parametrize(("option", "value"), [("tokenizer", "bytes"), ("dedup", "true"), ("limit", "3")])
def test_no_option_of_prepare_is_ignored(mistake, mode, option, value):
    message = mistake(f"--{mode}", "shards", "more", f"--{option}", value, subcommand="prepare")
    assert f"{option}: has no effect with --{mode}; leave it out" in message


def test_numbers_and_choices_that_yaml_reads_as_null(mistake):
    for key in ("data.train_tokenizer", "model.attention", "trainer.gradient_clip_val"):
        for text in ("~", "# a", "null "):
            assert f"{key}: {text!r} is not a valid value; write null for none" in mistake(f"--{key}", text)
    later = mistake("--data.train_tokenizer", "300", "--data.train_tokenizer", "null", "--data.tokenizer", "none.json")
    assert "train_tokenizer" not in later


@pytest.mark.parametrize(
    ("subcommand", "options", "suggestion"),
    [
        ("fit", ["--trainer.max_stepps", "64"], "trainer.max_steps"),
        ("fit", ["--model.positions.varient", "eh"], "variant"),
        ("fit", ["--config", "typo.yaml"], "model.decoder.hidden_size"),
        ("fit", ["--config", "tpyo.yaml"], "typo.yaml"),
        ("fit", ["--model.optimizer", "AdamV"], "AdamW"),
        ("fit", ["--trainer.precision", "bf16-mixd"], "bf16-mixed"),
        ("plan", ["--data.context_lenght", "64"], "data.context_length"),
        ("generate", ["x", "--tmperature=1"], "temperature"),
        ("generate", ["tpyo.yaml"], "typo.yaml"),
        ("prepare", ["tpyo.yaml", "--out", "o", "--tokenizer", "bytes"], "typo.yaml"),
        ("prepare", ["typo.yaml", "--out", "o", "--tokenizer", "bites.json"], "bytes.json"),
        ("prepare", ["x", "--out", "o", "--on_error", "skp"], "skip"),
        ("evaluate", ["x", "--out", "o", "--lenghts", "4"], "lengths"),
        ("evalute", [], "evaluate"),
    ],
)
def test_typos(mistake, tmp_path, subcommand, options, suggestion):
    (tmp_path / "typo.yaml").write_text("model: {decoder: {hiden_size: 32}}\n")
    (tmp_path / "bytes.json").write_text("{}")
    assert mistake(*options, subcommand=subcommand).endswith(f"; did you mean {suggestion}?")


def test_no_suggestion_where_nothing_is_near(mistake):
    for options in (["x", "--volume", "11"], ["nowhere.ckpt"], ["x", "y"]):
        assert "did you mean" not in mistake(*options, subcommand="generate")


def test_exit_codes_are_in_every_help(capsys):
    for words in ([], *([name] for name in SUBCOMMANDS)):
        with contextlib.suppress(SystemExit):
            main([*words, "--help"])
        assert EXIT_CODES.strip() in capsys.readouterr().out, words


def test_print_config(run, tiny, tmp_path):
    """The printed recipe is one that the same command reads, and its values are those given."""
    printed = run("fit", *tiny, "--trainer.max_steps", "3", "--print_config", cwd=tmp_path).stdout
    (tmp_path / "printed.yaml").write_text(printed)
    again = run("fit", "--config", "printed.yaml", "--print_config", cwd=tmp_path).stdout
    assert yaml.safe_load(again) == yaml.safe_load(printed)
    assert yaml.safe_load(printed)["trainer"]["max_steps"] == 3
