"""Exports checkpoints as Hugging Face folders, which transformers loads without ropepp-lit."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from ropepp_lit import __version__
from ropepp_lit.checkpoint import KEY, compute_dtype, geometry_of, instantiate
from ropepp_lit.errors import UsageError
from ropepp_lit.files import whole_folder
from ropepp_lit.hf.compare import load_in_float32
from ropepp_lit.hf.config import Architecture, write_config
from ropepp_lit.hf.folder import GENERATION, TOKENIZER, weights_of
from ropepp_lit.hf.layouts import CONFIG
from ropepp_lit.nn import Frequencies, PositionScheme
from ropepp_lit.nn.lora import LINEAR
from ropepp_lit.text import tokenizer_files
from ropepp_lit.text.tokenizer import TextTokenizer

MODELING = ("configuration_ropepp.py", "modeling_ropepp.py")

AUTO_MAP = {
    "AutoConfig": "configuration_ropepp.RopePPConfig",
    "AutoModel": "modeling_ropepp.RopePPModel",
    "AutoModelForCausalLM": "modeling_ropepp.RopePPForCausalLM",
}

TESTED_VERSIONS = "4.56.2, 4.57.6, 5.23.0 and 5.24.0"
"""Versions of transformers with which the logits of a RoPE++ export were verified."""

PROBE_TOKENS = 64
"""Number of tokens whose logits are compared, starting at position 0 and beyond the training context."""

PROBE_TEXT = "A fox: 漢字 + 4096."
"""Text whose tokens are compared, including BOS and EOS tokens."""

CHECK = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ropepp_lit":
            raise ImportError("the export must not need ropepp_lit")

sys.meta_path.insert(0, Hidden())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, inputs, outputs = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype="auto").eval()
stored = model.dtype
for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
    module.float()
for block in model.model.layers:  # computes in float32, block by block
    block.register_forward_pre_hook(lambda block, _: block.float() and None)
    block.register_forward_hook(lambda block, *_: block.to(stored) and None)
values = load_file(inputs)
with torch.no_grad():
    logits = [
        model(values["input_ids"], position_ids=row[None], use_cache=False).logits[0] for row in values["position_ids"]
    ]
results = {"logits": torch.stack(logits)}
if "text" in values:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    results["text"] = torch.tensor(tokenizer(sys.argv[4]).input_ids)
save_file(results, outputs)
"""


def export(
    checkpoint: dict[str, Any], out: Path, *, dtype: torch.dtype | None, max_shard_bytes: int, check: bool
) -> float | None:
    """Export a checkpoint as a folder for transformers, which is written atomically, after the check.

    Args:
        checkpoint: Checkpoint from :func:`~ropepp_lit.hf.folder.open_checkpoint`.
        out: Output folder; must not exist, or be empty.
        dtype: Dtype of the weights; None keeps the dtype of each tensor.
        max_shard_bytes: Maximum size of a file with weights.
        check: Whether to load the folder in a new process that cannot import ropepp_lit, and compare the logits, also
            at positions beyond the training context.

    Returns:
        The largest difference of a logit, relative to the largest logit; None without the check.

    Raises:
        UsageError: The folder is not empty or cannot be written, the model cannot be exported, or the logits differ.
    """
    architecture = architecture_of(checkpoint)
    fields = write_config(architecture)
    model_dtype = dtype or compute_dtype(checkpoint)
    with whole_folder(out) as folder:
        _write_weights(weights_of(checkpoint), folder, dtype, max_shard_bytes)
        _write_settings(checkpoint[KEY], fields, model_dtype, folder)
        _write_card(checkpoint[KEY], architecture, fields, model_dtype, folder)
        return _check(checkpoint, folder, architecture, model_dtype) if check else None


def architecture_of(checkpoint: dict[str, Any]) -> Architecture:
    """Return the architecture of a checkpoint's model.

    Raises:
        UsageError: The position scheme or the frequencies are not part of ropepp-lit.
    """
    described = checkpoint[KEY]["architecture"]
    return Architecture(
        geometry_of(checkpoint),
        instantiate(described["positions"], PositionScheme),
        instantiate(described["frequencies"], Frequencies),
        checkpoint[KEY].get("context_length") or 2048,
    )


def _write_weights(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """Write the weights as safetensors, with one shard in memory at a time."""
    sizes = {name: torch.empty_like(value, dtype=dtype, device="meta") for name, value in weights.items()}
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for filename, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            value = weights[name].to(dtype or weights[name].dtype).contiguous()
            # Shared tensors are written separately.
            is_shared = value.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in shard.values()}
            shard[name] = value.clone() if is_shared else value
        save_file(shard, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_settings(entry: dict[str, Any], fields: dict[str, Any], dtype: torch.dtype, folder: Path) -> None:
    """Write config.json, generation_config.json, the tokenizer and, for RoPE++, the modeling code."""
    ids = {f"{key}_token_id": entry[f"{key}_token_id"] for key in ("bos", "eos")}
    name = str(dtype).removeprefix("torch.")
    config = {**fields, **ids, "pad_token_id": None, "torch_dtype": name, "use_cache": True}
    if fields["model_type"] == "ropepp":
        config["auto_map"] = AUTO_MAP
        for file in MODELING:
            shutil.copyfile(Path(__file__).with_name(file), folder / file)
    generation = {key: value for key, value in ids.items() if value is not None}
    if entry.get("generation_config") is not None:
        generation |= json.loads(entry["generation_config"])
    for file, values in ((CONFIG, config), (GENERATION, generation)):
        (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if entry["tokenizer"] is not None:
        _write_tokenizer(entry, folder, model_max_length=fields["max_position_embeddings"])


def _write_tokenizer(entry: dict[str, Any], folder: Path, *, model_max_length: int) -> None:
    """Write the tokenizer, configured to add the same BOS and EOS tokens as in training."""
    text_tokenizer = TextTokenizer.from_entry(entry)
    tokenizer = text_tokenizer.tokenizer
    bos, eos = (text_tokenizer.token(index) for index in (text_tokenizer.bos_token_id, text_tokenizer.eos_token_id))
    settings = json.loads(entry.get("tokenizer_config") or "{}")
    settings.pop("auto_map", None)  # custom code, which trust_remote_code would run
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings.setdefault("model_max_length", model_max_length)
    settings.setdefault("clean_up_tokenization_spaces", False)
    for key, token in (("bos_token", bos), ("eos_token", eos)):
        if tokenizer_files.content_of(settings.get(key)) != token:
            settings[key] = token
    opening, closing = text_tokenizer.opening, text_tokenizer.closing
    if tokenizer_files.added_around(tokenizer) != (opening, closing):
        tokenizer.post_processor = tokenizer_files.processor_around(tokenizer, opening, closing)
        if "add_bos_token" in settings:  # transformers recreates the post-processor from it
            settings["add_bos_token"] = opening == (text_tokenizer.bos_token_id,)
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    tokenizer_files.write_settings(folder, settings)


def _write_card(
    entry: dict[str, Any], architecture: Architecture, fields: dict[str, Any], dtype: torch.dtype, folder: Path
) -> None:
    """Write README.md, the model card: architecture, usage, and training."""
    is_ropepp, config = fields["model_type"] == "ropepp", architecture.decoder
    variant = fields.get("variant", "rope")
    heads = f"{fields['num_attention_heads']} attention heads"
    if variant != "rope":
        heads += f" ({fields['num_attention_heads'] // 2} real, {fields['num_attention_heads'] // 2} imaginary)"
    cache = 2 * config.num_hidden_layers * fields["num_key_value_heads"] * config.head_dim * dtype.itemsize
    remote = ", trust_remote_code=True" if is_ropepp else ""
    card = entry.get("card") or {}
    front = {
        **card,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ropepp-lit", *(["ropepp", "custom_code"] if is_ropepp else [])],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {'RoPE++ ' + variant.upper() if variant != 'rope' else 'RoPE'} language model",
        "",
        f"- {heads}, {fields['num_key_value_heads']} key/value heads of {config.head_dim}, "
        f"{config.num_hidden_layers} layers, width {config.hidden_size}",
        f"- {architecture.frequencies}; context length {architecture.context_length:,} tokens",
        f"- KV cache: {cache:,} bytes per token in {str(dtype).removeprefix('torch.')}",
        f"- exported by ropepp-lit {__version__}",
    ]
    if entry.get("origin"):
        lines.append(f"- initialized from {entry['origin']}")
    if entry["tokens_seen"]:
        lines.append(f"- trained on {entry['tokens_seen']:,} tokens")
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if entry["tokenizer"] else ""),
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{remote})',
        *([f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{remote})'] if entry["tokenizer"] else []),
        "",
        "# LoRA, for peft.get_peft_model(model, config)",
        "from peft import LoraConfig",
        "",
        f'config = LoraConfig(task_type="CAUSAL_LM", target_modules={list(LINEAR)})',
        "```",
        "",
    ]
    if is_ropepp:
        lines += [
            "This repository includes custom modeling code (RoPE++, arXiv 2512.07525), which requires only torch and "
            f"transformers; tested with transformers {TESTED_VERSIONS}.",
            "",
        ]
    for name, metrics in (entry.get("validation") or {}).items():
        values = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items() if metric != "step")
        lines += [f"Held-out text of {name}, step {metrics['step']:,.0f}: {values}.", ""]
    if entry["recipe"] is not None:
        recipe = yaml.safe_dump(entry["recipe"], sort_keys=False)
        lines += ["<details><summary>Recipe</summary>", "", "```yaml", recipe + "```", "", "</details>", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _check(checkpoint: dict[str, Any], folder: Path, architecture: Architecture, dtype: torch.dtype) -> float:
    """Compare the logits of the exported folder, computed in a new process, with those of the decoder."""
    config, context = architecture.decoder, architecture.context_length
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    positions = torch.arange(PROBE_TOKENS) + torch.tensor([[0], [context - PROBE_TOKENS // 2], [2 * context]])
    decoder = load_in_float32(checkpoint, dtype=dtype)
    with torch.no_grad():
        expected = torch.stack([decoder(input_ids, positions=row[None])[0] for row in positions])
    del decoder
    with tempfile.TemporaryDirectory() as name:
        inputs, outputs = Path(name) / "inputs.safetensors", Path(name) / "outputs.safetensors"
        values = {"input_ids": input_ids, "position_ids": positions}
        if checkpoint[KEY]["tokenizer"] is not None:
            values["text"] = torch.tensor(TextTokenizer.from_entry(checkpoint[KEY]).encode_whole(PROBE_TEXT))
        save_file(values, inputs)
        finished = subprocess.run(  # noqa: S603 (trusted input)
            [sys.executable, "-c", CHECK, str(folder.resolve()), str(inputs), str(outputs), PROBE_TEXT],
            capture_output=True,
            text=True,
            check=False,
            cwd=name,
            env={**os.environ, "HF_MODULES_CACHE": str(Path(name) / "modules"), "HF_HUB_OFFLINE": "1"},
        )
        if finished.returncode < 0:
            raise UsageError(
                f"out: the process that loads the export was killed ({signal.Signals(-finished.returncode).name}), "
                "probably because it ran out of memory; free some, or skip the check by --check false"
            )
        if finished.returncode:
            reason = (finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"])[-1]
            raise UsageError(f"out: transformers cannot load the export ({reason})")
        results = load_file(outputs)
    if "text" in values and values["text"].tolist() != results["text"].tolist():
        raise UsageError(
            f"out: transformers would tokenize {PROBE_TEXT!r} as {results['text'].tolist()}, but the model was trained "
            f"with {values['text'].tolist()}; the tokenizer's settings contradict its tokenizer.json"
        )
    difference = float((results["logits"] - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-4 or math.isnan(difference):
        raise UsageError(f"out: the export's logits differ from the checkpoint's by {difference:.1e} of the largest")
    return difference
