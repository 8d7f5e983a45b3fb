"""Targets of the fuzzer: a valid, tiny input, the files to modify, the action that reads it, and a judge.

An action is a subcommand or the deepest public function that it calls first. It returns what was read as plain values;
if it succeeds although the input was modified, the judge decides from these whether that is right.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from fuzzing.cases import Target
from fuzzing.data import judge_rows, make_rows, make_shards, make_tables, read_rows, read_shards, read_tables
from fuzzing.judges import any_success, same, same_if_sealed
from fuzzing.models import (
    TEXTS,
    judge_config,
    judge_weights,
    make_checkpoint_file,
    make_folder,
    make_sharded,
    make_tokenizer,
    read_checkpoint_file,
    read_entries,
    read_folder,
    read_sharded,
    read_tokenizer,
)
from fuzzing.parsers import kept_parsers
from fuzzing.preparations import make_parts, make_unfinished, read_parts, read_unfinished
from fuzzing.training import judge_run, make_adapter, make_run, read_adapter, read_run
from fuzzing.writing import judge_prompts, make_evaluation, make_prompts, read_evaluation, read_prompts
from ropepp_lit.cli import main


def make_recipe(folder: Path) -> None:
    """Create a recipe with most kinds of settings."""
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("\n".join(TEXTS))
    (folder / "recipe.yaml").write_text(RECIPE)


RECIPE = """\
seed_everything: 0
model:
  decoder:
    vocab_size: 258
    hidden_size: 16
    intermediate_size: 24
    num_hidden_layers: 1
    num_attention_heads: 2
    num_key_value_heads: 1
    rms_norm_eps: 1.0e-05
  positions:
    class_path: RoPEPP
    init_args:
      variant: ec
  frequencies:
    class_path: Yarn
    init_args:
      rope_theta: 10000.0
      factor: 2.0
      original_max_position_embeddings: 32
  optimizer:
    class_path: AdamW
    init_args:
      lr: 0.001
      betas: [0.9, 0.95]
      weight_decay: 0.1
  schedule:
    class_path: Cosine
    init_args:
      warmup_steps: 2
      total_steps: 8
data:
  source:
    text.txt: 1.0
  tokenizer: bytes
  context_length: 64
  batch_size: 2
  validation_fraction: 0.2
  cache_dir: cache
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 8
  precision: 32-true
  gradient_clip_val: 1.0
  accumulate_grad_batches: 2
  limit_val_batches: 2
  val_check_interval: 4
  log_every_n_steps: 1
  default_root_dir: run
checkpoints:
  every_n_steps: 2
  keep: 2
sample:
  prompt: ''
  max_new_tokens: 8
"""


def read_recipe(folder: Path, changed: Path) -> Any:
    """Run `plan`, which parses and checks as `fit` does, without training."""
    with contextlib.chdir(folder), kept_parsers():
        main(["plan", "--config", "recipe.yaml", "--simulate", "false"])


TARGETS = {
    "manifests": Target(make=make_shards, files={"*/manifest.json": "json"}, read=read_shards, judge=same_if_sealed),
    "indexes": Target(
        make=make_shards, files={"*/*/index.json": "json", "*/tokenizer.json": "json"}, read=read_shards, judge=same
    ),
    "chunks": Target(make=make_shards, files={"*/*/*.bin": "bytes"}, read=read_shards, judge=same),
    "recipes": Target(make=make_recipe, files={"recipe.yaml": "yaml"}, read=read_recipe, judge=any_success),
    "config.json": Target(make=make_folder, files={"hf/config.json": "json"}, read=read_folder, judge=judge_config),
    "safetensors": Target(
        make=make_folder, files={"hf/model.safetensors": "safetensors"}, read=read_folder, judge=judge_weights
    ),
    "weight indexes": Target(
        make=lambda folder: make_folder(folder, parts=3), files={"hf/*.index.json": "json"}, read=read_folder,
        judge=same,
    ),
    "pytorch_model.bin": Target(
        make=lambda folder: make_folder(folder, pickled=True), files={"hf/*.bin": "bytes"}, read=read_folder, judge=same
    ),
    "tokenizers": Target(
        make=make_tokenizer,
        files={"hf/tokenizer.json": "json", "hf/*_config.json": "json", "hf/special_tokens_map.json": "json",
               "hf/chat_template.jinja": "bytes"},
        read=read_tokenizer, judge=any_success,
    ),
    "checkpoints": Target(
        make=make_checkpoint_file, files={"model.ckpt": "bytes"}, read=read_checkpoint_file, judge=same
    ),
    "entries": Target(make=make_checkpoint_file, files={"model.ckpt": "entries"}, read=read_entries, judge=any_success),
    "sharded tables": Target(make=make_sharded, files={"model.ckpt/.metadata": "table"}, read=read_sharded, judge=same),
    "shards": Target(
        make=make_sharded, files={"model.ckpt/*.distcp": "bytes", "model.ckpt/meta.pt": "bytes"}, read=read_sharded,
        judge=same,
    ),
    "conversations": Target(make=make_rows, files={"*.jsonl": "jsonl"}, read=read_rows, judge=judge_rows),
    "texts": Target(
        make=make_tables, files={"a.json": "json", "*.jsonl.*": "bytes", "a.[pfact]*": "bytes"}, read=read_tables,
        judge=any_success,
    ),
    "prompts": Target(
        make=make_prompts, files={"prompts.jsonl": "jsonl", "*.partial": "jsonl"}, read=read_prompts,
        judge=judge_prompts,
    ),
    "evaluations": Target(
        make=make_evaluation,
        files={"evaluated/parts/*.json": "json", "evaluated/results.json": "json", "evaluated/answers.jsonl": "jsonl"},
        read=read_evaluation, judge=same_if_sealed,
    ),
    "unfinished": Target(
        make=make_unfinished,
        files={".shards.partial/parts/*.json": "json", ".shards.partial/identity.json": "json",
               ".shards.partial/parts/*.digests": "bytes", ".shards.partial/t*/*.bin": "bytes",
               ".shards.partial/tokenizer.json": "json"},
        read=read_unfinished, judge=same,
    ),
    "parts": Target(
        make=make_parts, files={"part-*/*.json": "json", "part-*/*/*.bin": "bytes"}, read=read_parts, judge=same
    ),
    "adapters": Target(
        make=make_adapter, files={"adapters.ckpt": "entries", "*s.ckpt": "bytes"}, read=read_adapter, judge=any_success
    ),
    "runs": Target(make=make_run, files={"run/checkpoints/*.ckpt": "entries"}, read=read_run, judge=judge_run),
}  # fmt: skip
"""Targets by name."""
