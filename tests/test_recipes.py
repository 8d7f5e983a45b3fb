"""All recipes: planned unchanged, and run for two steps with reduced sizes."""

import itertools
import json
from pathlib import Path

import pytest

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.cli import main

RECIPES = Path(__file__).parent.parent / "recipes"
FREQUENCIES = ["ntk", "linear", "yarn", "yarn-transformers"]
LONG = ["paper/pretrain", "paper/long"]
STACKS = {
    "quickstart": ["quickstart"],
    "laptop": ["laptop/pretrain"],
    **{f"laptop-{name}": ["laptop/pretrain", "laptop/continue", f"frequencies/{name}"] for name in FREQUENCIES},
    "paper": ["paper/pretrain"],
    "paper-decay": ["paper/pretrain", "paper/decay"],
    **{f"paper-{name}": [*LONG, f"frequencies/{name}"] for name in FREQUENCIES},
    "branch": ["quickstart", "stages/branch"],
    "drope": ["quickstart", "stages/drope"],
    "study": ["study/recall"],
    "study-pretrain": ["study/recall", "study/pretrain"],
    "study-continue": ["study/recall", "study/pretrain", "study/continue"],
    "comparison": ["quickstart", "upcycle/comparison"],
    "llama-8b": ["upcycle/llama-8b"],
    "llama-8b-128k": ["upcycle/llama-8b", "upcycle/128k"],
}
"""Layered files, in order."""

DECAYS = {"paper-decay", "branch"}
"""Stacks whose decay starts at a step beyond those of a test run."""

FINE_TUNING = {
    "docstrings": ["quickstart", "finetune/docstrings"],
    "docstrings-lora": ["quickstart", "finetune/docstrings", "finetune/docstrings-lora"],
    "docstrings-dpo": ["quickstart", "finetune/docstrings", "finetune/docstrings-dpo"],
    "chat": ["quickstart", "finetune/chat"],
    "chat-lora": ["quickstart", "finetune/chat", "finetune/lora"],
    "chat-dpo": ["quickstart", "finetune/chat", "finetune/dpo"],
    "chat-lora-dpo": ["quickstart", "finetune/chat", "finetune/lora", "finetune/dpo"],
    "chat-fsdp2": ["quickstart", "finetune/chat", "finetune/fsdp2"],
    "chat-long": ["quickstart", "finetune/chat", "finetune/fsdp2", "finetune/long"],
    "chat-long-lora": ["quickstart", "finetune/chat", "finetune/lora", "finetune/fsdp2", "finetune/long"],
}
"""Files layered over the recipe of the model to fine-tune."""

ALL = {**STACKS, **FINE_TUNING}

VARIANTS = {
    "rope": (["--model.positions", "RoPE"], "RoPE, base"),
    "eh": (["--model.positions.variant", "eh"], "RoPE++ EH, base"),
    "ec": (["--model.positions.variant", "ec"], "RoPE++ EC, base"),
}
GEOMETRY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SHRINK = [
    *("--model.decoder.vocab_size", "300", "--data.train_tokenizer", "300"),
    *itertools.chain.from_iterable((f"--model.decoder.{name}", str(value)) for name, value in GEOMETRY.items()),
    *("--model.decoder.num_key_value_heads", "2", "--data.context_length", "32", "--data.batch_size", "2"),
    *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--model.schedule.warmup_steps", "1"),
    *(
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
        "--trainer.accumulate_grad_batches",
        "1",
    ),
    *("--trainer.precision", "32-true", "--trainer.num_nodes", "1", "--trainer.val_check_interval", "2"),
    *("--model.init_from", "null", "--data.validation", "null", "--diagnostics.far", "8"),
]

pytestmark = pytest.mark.end_to_end


def configs(stack):
    return list(itertools.chain.from_iterable(("--config", str(RECIPES / f"{name}.yaml")) for name in ALL[stack]))


@pytest.mark.parametrize("stack", ALL)
def test_plan(stack, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["--model.init_from", "base.ckpt"] if stack in FINE_TUNING else []
    main(["plan", *configs(stack), *base, "--data.cache_dir", "cache"])
    printed = capsys.readouterr().out
    for expected in ("tokens in all", "RoPE++ EH", "KV cache", "memory per device", "The data are not on this machine"):
        assert expected in printed


@pytest.mark.parametrize(
    ("stack", "variant"), [*((stack, "ec") for stack in STACKS), ("paper", "rope"), ("paper", "eh")]
)
def test_two_steps(stack, variant, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data.source", str(texts), "--data.cache_dir", "cache", "--trainer.default_root_dir", "run"]
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    one += ["--model.schedule.decay_from", "1"] if stack in DECAYS else []
    options, banner = VARIANTS[variant] if stack != "drope" else ([], "positions  NoPE")
    main(["fit", *configs(stack), *SHRINK, *data, *options, *one])
    printed = capsys.readouterr().out
    assert banner in printed
    assert "at step 2" in printed
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize(
    ("stack", "options", "devices"),
    [
        pytest.param("paper-ntk", [], "2 rows × 1 accumulated × 2 devices", marks=pytest.mark.slow),
        ("llama-8b", ["--trainer.strategy.context_parallel_size", "2"], "accumulated × 1 groups of 2 devices"),
    ],
)
def test_two_steps_of_two_processes(stack, options, devices, texts, tmp_path, run):
    data = ["--data.source", texts, "--data.cache_dir", "cache", "--trainer.default_root_dir", "run"]
    printed = run("fit", *configs(stack), *SHRINK, *data, "--trainer.devices", "2", *options, cwd=tmp_path).stdout
    assert devices in printed
    assert "at step 2" in printed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Small model, and files of pairs and of conversations for fine-tuning."""
    folder = tmp_path_factory.mktemp("base")
    pairs = [{"prompt": f"def f{n}(): return {n}\n#", "completion": f" Return {n}."} for n in range(40)]
    roles = ("user", "assistant")
    chats = [{"messages": [{"role": role, "content": f"{role} {n}"} for role in roles]} for n in range(40)]
    answers = [{"prompt": f"user {n}", "chosen": "yes", "rejected": f"no {n}"} for n in range(40)]
    for name, rows in (("pairs", pairs), ("chats", chats), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("\n\n".join(f"def f{n}(): return {n}  # user, assistant" for n in range(300)))
    options = ["--data.source", str(folder / "text.txt"), "--data.split", r"\n\n"]
    run = ["--data.cache_dir", str(folder / "cache"), "--trainer.default_root_dir", str(folder / "run")]
    main(["fit", *configs("quickstart"), *SHRINK, *options, *run])
    return folder


@pytest.mark.parametrize("stack", ["docstrings", "docstrings-lora", "chat", "chat-long-lora", "chat-lora-dpo"])
def test_two_steps_of_fine_tuning(stack, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(base / "run/checkpoints/last.ckpt")
    model = ["--model.init_from", checkpoint, "--data.tokenizer", checkpoint, "--data.train_tokenizer", "null"]
    data = ["--data.source", str(base / "pairs.jsonl")]
    if "chat" in stack:
        data = ["--data.source", str(base / "chats.jsonl"), "--data.format", "chat"]
        if "dpo" in stack:
            data = ["--data.source", str(base / "answers.jsonl"), "--data.format", "chat_pairs"]
        data += ["--data.chat_template", str(RECIPES / "finetune" / "chat_template.jinja")]
    size = ["--data.context_length", "64", "--data.batch_size", "1", "--trainer.default_root_dir", "run"]
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--data.cache_dir", "cache"]
    main(["fit", *configs(stack), *SHRINK, *model, *data, *size, *one])
    printed = capsys.readouterr().out
    assert "at step 2" in printed
    assert ("Held-out pairs" if "dpo" in stack else "trained tokens") in printed
    assert ("adapter" in read_checkpoint("run/checkpoints/last.ckpt")[KEY]) == ("lora" in stack)


def test_every_recipe_is_tested():
    tried = {f"{name}.yaml" for stack in ALL.values() for name in stack}
    assert tried == {str(path.relative_to(RECIPES)) for path in RECIPES.glob("**/*.yaml")}


@pytest.mark.parametrize("recipe", sorted(set(itertools.chain(*ALL.values()))))
def test_the_header_states_the_requirements(recipe):
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert header
    if not recipe.startswith("frequencies/"):  # layered over recipes of any size
        for word in ("ropepp-lit fit --config ", f"recipes/{recipe}.yaml", "Hardware:", "Tokens:", "Memory", "ime"):
            assert word in header
