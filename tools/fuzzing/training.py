"""Runs and adapters: created by short training, and continued, imported or merged."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from fuzzing.models import TEXTS, digest, make_decoder, make_whole
from fuzzing.parsers import kept_parsers
from ropepp_lit.checkpoint import KEY, decoder_weights, load_decoder
from ropepp_lit.cli import main
from ropepp_lit.hf.adapters import fingerprint
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.nn import RoPEPP
from ropepp_lit.nn.lora import LoRA, inject
from ropepp_lit.train.lora import adapter_entry, trained_weights

RECIPE = """\
seed_everything: 0
model:
  decoder: {vocab_size: 258, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
            num_key_value_heads: 1}
  schedule: {class_path: Cosine, init_args: {warmup_steps: 2, total_steps: 4}}
data: {source: text.jsonl, tokenizer: bytes, validation_fraction: 0.3, context_length: 32, batch_size: 2,
       cache_dir: cache}
trainer: {accelerator: cpu, devices: 1, max_steps: 2, limit_val_batches: 0, num_sanity_val_steps: 0, logger: false,
          enable_progress_bar: false, default_root_dir: run}
checkpoints: {every_n_steps: 2}
watchdog: {timeout: null}
"""


def make_run(folder: Path) -> None:
    """Train two steps."""
    folder.mkdir(parents=True)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "recipe.yaml").write_text(RECIPE)
    with contextlib.chdir(folder), kept_parsers():
        main(["fit", "--config", "recipe.yaml"])
    (folder / "run" / "checkpoints" / "last.ckpt").unlink()  # a link to the other


def read_run(folder: Path, changed: Path) -> Any:
    """Continue the run for a step."""
    with contextlib.chdir(folder), kept_parsers():
        main(["fit", "--config", "recipe.yaml", "--ckpt_path", "auto", "--trainer.max_steps", "3"])
    checkpoint = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        "step": checkpoint["global_step"],
        "finite": all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values()),
    }


def judge_run(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """The values of a checkpoint decide what a run continues with; its weights stay finite numbers."""
    return None if found["finite"] else "weights that are not finite are saved"


def make_adapter(folder: Path) -> None:
    """Write a base, and LoRA adapters of it with random values."""
    folder.mkdir(parents=True)
    base = make_whole(RoPEPP(variant="ec"))
    torch.save(base, folder / "base.ckpt")
    lora = LoRA(rank=2, train_fully=["imaginary"])
    module = torch.nn.Module()
    module.decoder = make_decoder(RoPEPP(variant="ec"))
    inject(module.decoder, lora)
    for name, value in module.named_parameters():
        if "lora_" in name or "imaginary" in name:
            torch.nn.init.normal_(value, std=0.1)
    weights = trained_weights(module, module.state_dict())
    entry = {**base[KEY], "adapter": adapter_entry(lora, "base.ckpt", fingerprint(base))}
    torch.save({**base, "state_dict": weights, KEY: entry}, folder / "adapters.ckpt")


def read_adapter(folder: Path, changed: Path) -> Any:
    """Merge the adapters with their base, as every subcommand does that takes a checkpoint."""
    merged = open_checkpoint(str(folder / "adapters.ckpt"), base=str(folder / "base.ckpt"), checksums=True)
    decoder = load_decoder(merged)
    with torch.no_grad():
        decoder(torch.tensor([[0, 5, 9, 200]]))
    return digest(decoder_weights(merged))
