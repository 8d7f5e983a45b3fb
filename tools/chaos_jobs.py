"""Jobs of chaos.py: commands on tiny inputs, and the results that must be the same in each run."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import Tensor

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.sharded import is_sharded

RECIPE = {
    "seed_everything": 0,
    "model": {
        "decoder": {
            "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "schedule": {"class_path": "Cosine", "init_args": {"warmup_steps": 2}},
    },
    "data": {"tokenizer": "bytes", "context_length": 64, "batch_size": 2, "validation_fraction": 0.2},
    "trainer": {
        "accelerator": "cpu", "max_steps": 12, "val_check_interval": 4, "limit_val_batches": 1, "log_every_n_steps": 3,
    },
    "checkpoints": {"every_n_steps": 2, "keep": 2},
    "sample": {"max_new_tokens": 4},
}  # fmt: skip
"""Recipe of a model with a few thousand parameters."""

FIT = ("fit", "--config", "{inputs}/recipe.yaml", "--ckpt_path", "auto", "--trainer.default_root_dir", "run")
TEXTS = ("--data.source", "{inputs}/texts", "--data.cache_dir", "cache")
SHARDS = ("--data.source", "{inputs}/shards")
FSDP2 = ("--trainer.strategy", "ropepp_lit.train.fsdp.FSDP2Strategy")


class Job(NamedTuple):
    """A resumable command."""

    command: tuple[str, ...]
    """Arguments after `ropepp-lit`; {inputs} stands for the folder of the inputs."""

    ranks: int = 1
    """Number of processes."""

    limit_s: float = 120.0
    """Seconds after which a process counts as hung, also on a busy machine."""


JOBS = {
    "train": Job((*FIT, *TEXTS)),
    "train-shards": Job((*FIT, *SHARDS, "--trainer.accumulate_grad_batches", "2", "--data.num_workers", "1")),
    "train-async": Job((*FIT, *SHARDS, "--checkpoints.async_save", "true")),
    "train-lora": Job(
        (*FIT, *SHARDS, "--model.init_from", "{inputs}/rope.ckpt", "--model.positions", "RoPE",
         "--model.lora.rank", "2"),
    ),
    "train-ddp": Job((*FIT, *SHARDS, "--trainer.strategy", "ddp"), ranks=2),
    "train-fsdp2": Job((*FIT, *SHARDS, *FSDP2, "--trainer.strategy.save_distributed_checkpoint", "true"), ranks=2),
    "train-context": Job(
        (*FIT, *SHARDS, *FSDP2, "--trainer.strategy.context_parallel_size", "2"), ranks=4
    ),
    "prepare": Job(
        ("prepare", "{inputs}/corpus.jsonl", "--tokenizer", "bytes", "--chunk_size", "40KB", "--dedup", "true",
         "--validation_fraction", "0.1", "--workers", "1", "--out", "shards"),
    ),
    "prepare-part": Job(
        ("prepare", "{inputs}/corpus.jsonl", "--tokenizer", "bytes", "--chunk_size", "40KB", "--part", "2/2",
         "--workers", "1", "--out", "part"),
    ),
    "prepare-merge": Job(("prepare", "--merge", "{inputs}/part-1", "{inputs}/part-2", "--out", "shards")),
    "import": Job(("import", "{inputs}/hf", "imported.ckpt")),
    "export": Job(("export", "{inputs}/rope.ckpt", "exported", "--check", "false")),
    "upcycle": Job(("upcycle", "{inputs}/rope.ckpt", "ec.ckpt", "--variant", "ec")),
    "evaluate": Job(
        ("evaluate", "A={inputs}/rope.ckpt", "--text", "{inputs}/texts", "--lengths", "128", "--limit", "3",
         "--tasks", "perplexity,recall:4", "--out", "pages"),
    ),
    "generate": Job(
        ("generate", "{inputs}/rope.ckpt", "--prompts", "{inputs}/prompts.jsonl", "--out", "written.jsonl",
         "--batch_size", "4", "--max_new_tokens", "8"),
    ),
}  # fmt: skip


def inputs_of(job: Job, inputs: Path) -> list[str]:
    """Return the arguments of a job's command."""
    return [word.replace("{inputs}", str(inputs)) for word in job.command]


def make_inputs(folder: Path, run: Any) -> None:
    """Write the inputs of the jobs.

    Args:
        folder: New folder.
        run: Function that runs a command, given by its arguments, in the folder.
    """
    draw = random.Random(0)
    words = [f"word{number}" for number in range(97)]
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(40):
        (texts / f"{number:02}.txt").write_text(f"Text {number}. {' '.join(draw.choices(words, k=60 + number))}\n")
    documents = [f"Document {number}: {' '.join(draw.choices(words, k=20 + number % 80))}" for number in range(600)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in [*documents, *documents[:50]])
    (folder / "corpus.jsonl").write_text(rows)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text[:20]}) + "\n" for text in documents[:24]))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    run(["prepare", "corpus.jsonl", "--tokenizer", "bytes", "--validation_fraction", "0.1", "--out", "shards"])
    for part in (1, 2):
        command = ["prepare", "corpus.jsonl", "--tokenizer", "bytes", "--chunk_size", "40KB"]
        run([*command, "--part", f"{part}/2", "--out", f"part-{part}"])
    options = ["--data.source", "shards", "--model.positions", "RoPE", "--trainer.max_steps", "2"]
    run(["fit", "--config", "recipe.yaml", *options, "--trainer.default_root_dir", "rope"])
    shutil.copyfile(folder / "rope/checkpoints/step=2.ckpt", folder / "rope.ckpt")
    run(["export", "rope.ckpt", "hf", "--check", "false"])


def result(folder: Path) -> dict[str, str]:
    """Return the files of a job's folder by name, each with a digest of the contents that must be reproducible."""
    found: dict[str, str] = {}
    curves: dict[str, float] = {}
    checkpoints = [path for path in folder.rglob("*.ckpt") if not path.name.startswith(".")]
    for path in checkpoints:
        if not path.name.startswith("step="):  # the older ones depend on where a run was stopped
            found[str(path.relative_to(folder))] = _digest(_state(path))
    found["checkpoints"] = str(len(checkpoints))
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or any(parent in checkpoints for parent in (path, *path.parents)):
            continue
        name = str(path.relative_to(folder))
        if ".tfevents." in name:
            curves |= _values(path)
        elif not name.endswith(".lock"):
            found[name] = hashlib.sha256(_content(path)).hexdigest()
    if curves:
        found["curves"] = _digest({name: value for name, value in curves.items() if "tokens_per_second" not in name})
    return found


def _content(path: Path) -> bytes:
    """Return the content of a file without what depends on time or folder."""
    content = path.read_bytes()
    if path.name == "results.json":
        results = json.loads(content)
        return json.dumps({key: results[key] for key in ("scores", "tasks", "lengths") if key in results}).encode()
    return b"" if path.suffix in (".html", ".png") or path.parent.name == "parts" else content


def _state(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint from which a run resumes."""
    checkpoint = read_checkpoint(path, checksums=True)
    state = {name: checkpoint.get(name) for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    loops = checkpoint.get("loops")
    state["data"] = None if loops is None else loops["fit_loop"]["state_dict"].get("combined_loader")
    state["ours"] = {name: value for name, value in checkpoint[KEY].items() if name != "recipe" and value is not None}
    if is_sharded(path):
        state["shards"] = {shard.name: shard.read_bytes() for shard in sorted(path.glob("*.distcp"))}
    return state


def _values(path: Path) -> dict[str, float]:
    """Return TensorBoard values by name and step; a step with two values raises AssertionError."""
    found = {}
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            name = f"{value.tag} {event.step}"
            assert name not in found, f"{path}: {name} has two values"
            found[name] = value.simple_value
    return found


def _digest(value: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)} of".encode())
            for part in value:
                add(part)
        else:
            digest.update(value if isinstance(value, bytes) else repr(value).encode())

    add(value)
    return digest.hexdigest()
