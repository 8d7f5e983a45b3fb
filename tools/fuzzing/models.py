"""Targets of models, tokenizers and checkpoints: valid inputs, and readers as in the subcommands."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed_checkpoint

from fuzzing.judges import hash_of, same
from ropepp_lit.checkpoint import KEY, decoder_weights, describe_architecture, load_decoder, make_checkpoint
from ropepp_lit.commands import convert, generate
from ropepp_lit.eval.models import load_model as load_measured
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPE, RoPEPP
from ropepp_lit.sharded import SHARDED_METADATA
from ropepp_lit.text.tokenizer import load_tokenizer, train_tokenizer

GEOMETRY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return a digest of each tensor by name."""
    return {
        name: f"{value.dtype} {tuple(value.shape)} "
        + hashlib.sha256(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for name, value in tensors.items()
    }


TEXTS = [" ".join(f"word{(n * step) % 97}" for step in range(1, 20 + n)) + f" naïve 漢字 {n}" for n in range(12)]


@cache
def trained_tokenizer() -> Any:
    """Return a byte-level BPE with 300 tokens."""
    return train_tokenizer(TEXTS, vocab_size=300)


def make_decoder(scheme: Any = None) -> Decoder:
    """Return a tiny model for the 300 tokens."""
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocab_size=300, **GEOMETRY), scheme or RoPE(), Frequencies())


def make_whole(scheme: Any = None) -> dict[str, Any]:
    """Return its checkpoint, with a tokenizer that has a chat template."""
    decoder, tokenizer = make_decoder(scheme), trained_tokenizer()
    return make_checkpoint(
        dict(decoder.state_dict()),
        architecture=describe_architecture(decoder.config, decoder.scheme, decoder.frequencies),
        context_length=64,
        tokenizer=tokenizer.json,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        opening=list(tokenizer.opening),
        tokenizer_config=json.dumps({"chat_template": TEMPLATE, "bos_token": "<|begin_of_text|>"}),
        generation_config=json.dumps({"eos_token_id": [1, 2]}),
    )


def make_folder(folder: Path, *, parts: int = 1, pickled: bool = False) -> None:
    """Create a Hugging Face folder."""
    folder.mkdir(parents=True)
    export(make_whole(), folder / "hf", dtype=None, max_shard_bytes=10**9, check=False)
    hf = folder / "hf"
    weights = {name: value.clone() for name, value in make_decoder().state_dict().items()}
    if parts == 1 and not pickled:
        return
    (hf / "model.safetensors").unlink()
    if pickled:
        torch.save(weights, hf / "pytorch_model.bin")
        return
    places = {}
    for number in range(parts):
        name = f"model-{number + 1:05}-of-{parts:05}.safetensors"
        part = dict(list(weights.items())[number::parts])
        save_file(part, hf / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))


def read_folder(folder: Path, changed: Path) -> Any:
    """Read a Hugging Face folder as `import`, `generate`, `export`, `upcycle` and `evaluate` do."""
    return _loaded(open_checkpoint(str(folder / "hf"), checksums=True))


def _loaded(checkpoint: dict[str, Any]) -> dict[str, Any]:
    decoder = load_decoder(checkpoint)
    entry = checkpoint[KEY]
    with torch.no_grad():
        logits = decoder(torch.tensor([[0, 5, 9, 200]]))
    return {
        "weights": digest(decoder_weights(checkpoint)),
        "decoder": decoder.config.to_dict(),
        "positions": decoder.positions_description,
        "theta": decoder.frequencies.rope_theta,
        "logits": logits.double().sum().item(),
        **{name: value for name, value in entry.items() if name not in ("architecture", "origin", "card")},
    }


def judge_config(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Accept another model of the same shapes, which config.json can define; the weights must be the same."""
    if whole["weights"] != found["weights"]:
        return "other weights"
    stated = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "num_attention_heads",
    )
    for name in names:
        if name in stated and stated[name] is not None and found["decoder"][name] != stated[name]:
            return f"{name} {found['decoder'][name]} instead of {stated[name]}"
    context = stated.get("max_position_embeddings")
    if context is not None and found["context_length"] != context:
        return f"context_length {found['context_length']} instead of {context}"
    numbers = [found["theta"], found["decoder"]["rms_norm_eps"], found["logits"]]
    if not all(math.isfinite(number) for number in numbers):
        return f"not finite: {numbers}"
    return None


def judge_weights(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Require the same names and shapes; contents can differ, because safetensors has no checksums."""
    shapes = [
        {name: text.split(") ")[0].split(" (")[1] for name, text in one["weights"].items()} for one in (whole, found)
    ]
    if shapes[0] != shapes[1]:
        return "other names or shapes"
    return same({**whole, "weights": 0, "logits": 0}, {**found, "weights": 0, "logits": 0}, change, path)


def make_tokenizer(folder: Path) -> None:
    """Create the tokenizer of a Hugging Face folder with all of its files."""
    make_folder(folder)
    hf = folder / "hf"
    for name in ("model.safetensors", "README.md"):
        (hf / name).unlink(missing_ok=True)
    special = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>", "lstrip": False}}
    (hf / "special_tokens_map.json").write_text(json.dumps(special))


def read_tokenizer(folder: Path, changed: Path) -> Any:
    """Load a tokenizer as `prepare --tokenizer`, `fit` and `import` do, encode and decode."""
    tokenizer = load_tokenizer(str(folder / "hf"))
    text = "word1 naïve 漢字 <|end_of_text|>"
    ids = tokenizer.encode([text])[0].tolist()
    return {"ids": ids, "text": tokenizer.decode(tokenizer.encode_text(text)), "prompt": tokenizer.encode_prompt("a"),
            "description": tokenizer.description, "name": len(tokenizer.fingerprint),
            "size": tokenizer.vocab_size}  # fmt: skip


def make_checkpoint_file(folder: Path) -> None:
    """Create a checkpoint in one file."""
    folder.mkdir(parents=True)
    torch.save(make_whole(RoPEPP(variant="ec")), folder / "model.ckpt")


def read_checkpoint_file(folder: Path, changed: Path) -> Any:
    """Read a checkpoint as every subcommand does, and generate a token."""
    found = _loaded(open_checkpoint(str(folder / "model.ckpt"), checksums=True))
    generate.generate(str(folder / "model.ckpt"), max_new_tokens=1, prompt="word")
    return found


def read_entries(folder: Path, changed: Path) -> Any:
    """Do the same, or `export`, `upcycle`, the checks of `validate` and `fit`, or those of `evaluate`."""
    way = hash_of(changed) % 4
    path = str(folder / "model.ckpt")
    if way == 0:
        return read_checkpoint_file(folder, changed)
    if way == 1:
        convert.export(path, str(folder / "exported"), check=False)
    elif way == 2:
        load_measured(path, dtype=torch.float32, device=torch.device("cpu")).describe()
        load_tokenizer(path)
    else:
        generate.generate(path, max_new_tokens=1, prompt="word", chat=True)
    return None


def make_sharded(folder: Path) -> None:
    """Create a checkpoint in a folder of shards."""
    path, whole = folder / "model.ckpt", make_whole()
    folder.mkdir(parents=True)
    state = {
        "state_dict": whole.pop("state_dict"),
        "optimizer_0": {"param_groups": [{"lr": 0.25, "betas": (0.9, 0.95)}]},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save(state, checkpoint_id=path)
    torch.save(whole, path / SHARDED_METADATA)


def read_sharded(folder: Path, changed: Path) -> Any:
    """Read a folder of shards as every subcommand does: weights and shapes only."""
    found = _loaded(open_checkpoint(str(folder / "model.ckpt"), checksums=True))
    shapes = open_checkpoint(str(folder / "model.ckpt"), shapes_only=True, checksums=True)["state_dict"]
    return {**found, "shapes": {name: (tuple(value.shape), str(value.dtype)) for name, value in shapes.items()}}
