"""Checkpoints of small models with random weights."""

import json

import others
import torch
from tokenizers import Tokenizer, pre_tokenizers

from ropepp_lit.checkpoint import describe_architecture, make_checkpoint
from ropepp_lit.nn import (
    Decoder,
    DecoderConfig,
    Frequencies,
    RoPE,
)
from ropepp_lit.text.tokenizer import byte_tokenizer, train_tokenizer

BYTES = byte_tokenizer()


def make(scheme=None, frequencies=None, tokenizer=BYTES, dtype=torch.float32, entry=None, **changes):
    """Return a checkpoint with random weights of std 0.3, around 1 in norms."""
    scheme, frequencies = scheme or RoPE(), frequencies or Frequencies()
    geometry = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    geometry |= {"num_key_value_heads": 2, "vocab_size": tokenizer.vocab_size, "rms_norm_eps": 2e-5}
    config = DecoderConfig(**{**geometry, **changes})
    torch.manual_seed(0)
    decoder = Decoder(config, scheme, frequencies)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.3)
    stored = {"tokenizer": tokenizer.json, "bos_token_id": tokenizer.bos_token_id}
    stored |= {"eos_token_id": tokenizer.eos_token_id, "opening": list(tokenizer.opening)}
    return make_checkpoint(
        {name: value.to(dtype) for name, value in decoder.state_dict().items()},
        architecture=describe_architecture(config, scheme, frequencies),
        context_length=512,
        **{**stored, **(entry or {})},
    )


YARN = {"factor": 8.0, "original_max_position_embeddings": 64}


def changed(change, **options):
    """Return a function that builds a checkpoint with a modified BPE tokenizer."""

    def tokenizer():
        found = Tokenizer.from_str(train_tokenizer(others.TEXTS, vocab_size=300).json)
        found = change(found) or found
        return make(tokenizer=BYTES, vocab_size=320, entry={"tokenizer": found.to_str(), **options})

    return tokenizer


def assign(name, value):
    return lambda tokenizer: setattr(tokenizer, name, value)


def without(characters, **values):
    """Return a change that removes tokens with some byte-level characters, and sets values of the model."""

    def change(tokenizer):
        contents = json.loads(tokenizer.to_str())
        model = contents["model"] | values
        model["merges"] = [pair for pair in model["merges"] if not set(characters) & set("".join(pair))]
        model["vocab"] = {token: index for token, index in model["vocab"].items() if not set(characters) & set(token)}
        return Tokenizer.from_str(json.dumps({**contents, "model": model}))

    return change


DIGITS = pre_tokenizers.Digits(individual_digits=True)


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
