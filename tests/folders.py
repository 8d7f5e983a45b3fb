"""Hugging Face folders written without transformers."""

import json

import torch
from safetensors.torch import save_file

from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPE
from ropepp_lit.text.tokenizer import byte_tokenizer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


def make_weights(**changes):
    """Return weights of a decoder with the geometry of CONFIG."""
    fields = {key: value for key, value in {**CONFIG, **changes}.items() if key in DecoderConfig.__dataclass_fields__}
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**fields), RoPE(), Frequencies()).state_dict()


def save_single(folder, weights, name="model.safetensors"):
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / name, metadata={"format": "pt"})


def old_format(weights, path):
    """Save in the format of torch before version 1.6, without a zip archive."""
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def in_parts(save, stem, ending, *, index=True):
    """Return a layout of three files, with or without an index."""

    def write(folder, weights):
        places = {}
        for number in range(3):
            name = f"{stem}-{number + 1:05}-of-00003.{ending}"
            part = dict(list(weights.items())[number::3])
            save(part, folder / name)
            places |= dict.fromkeys(part, name)
        if index:
            (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))

    return write


LAYOUTS = {
    "model.safetensors": save_single,
    "one file of another name": lambda folder, weights: save_single(folder, weights, "llama-tiny.safetensors"),
    "index of safetensors": in_parts(save_file, "model", "safetensors"),
    "index of another name": in_parts(save_file, "model.fp32", "safetensors"),
    "safetensors without an index": in_parts(save_file, "model", "safetensors", index=False),
    "pytorch_model.bin": lambda folder, weights: torch.save(weights, folder / "pytorch_model.bin"),
    "old pytorch_model.bin": lambda folder, weights: old_format(weights, folder / "pytorch_model.bin"),
    "index of .bin": in_parts(torch.save, "pytorch_model", "bin"),
    "index of old .bin": in_parts(old_format, "pytorch_model", "bin"),
    ".bin without an index": in_parts(torch.save, "pytorch_model", "bin", index=False),
}


def make_folder(folder, *, layout="model.safetensors", weights=None, tokenizer=False, **config):
    """Write a folder with config.json and weights in a layout."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    LAYOUTS[layout](folder, weights or make_weights())
    if tokenizer:
        byte_tokenizer().tokenizer.save(str(folder / "tokenizer.json"))
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def put_in_hub_cache(cache, name, folder, *, commit="0" * 40, reference="main"):
    """Move a folder into the Hub cache layout, with files behind symbolic links."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / reference).write_text(commit)
    (root / "blobs").mkdir(exist_ok=True)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = root / "blobs" / f"{commit[:4]}{number}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot
