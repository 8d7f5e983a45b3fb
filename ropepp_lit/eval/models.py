"""A model under evaluation: decoder, tokenizer and the metadata that results report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ropepp_lit.checkpoint import KEY, load_decoder
from ropepp_lit.errors import UsageError
from ropepp_lit.files import escaped, fingerprint
from ropepp_lit.hf.folder import locate, open_checkpoint
from ropepp_lit.nn import Decoder
from ropepp_lit.text.tokenizer import TextTokenizer

MAX_BATCH_TOKENS = 16_384
"""Maximum number of tokens of a batch with more than one row."""


@dataclass(kw_only=True)
class Model:
    """A decoder with its tokenizer and metadata."""

    name: str
    """Name of the model; models with the same name are runs (seeds) of one model."""

    path: str
    decoder: Decoder
    tokenizer: TextTokenizer
    fingerprint: str
    """SHA-256 of the checkpoint."""

    entry: dict[str, Any] = field(default_factory=dict)
    """Metadata of the checkpoint; see :mod:`ropepp_lit.checkpoint`."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.model.embed_tokens.weight.device

    @property
    def opening(self) -> list[int]:
        """Token ids at the start of every text (BOS)."""
        return list(self.tokenizer.opening)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS and EOS tokens."""
        return self.tokenizer.encode_text(text)

    def describe(self) -> dict[str, Any]:
        """Return the metadata for results."""
        decoder = self.decoder
        config, layout = decoder.config, decoder.head_layout
        cache = decoder.allocate_cache(batch_size=1, max_tokens=1)
        return {
            "name": self.name,
            "path": self.path,
            "fingerprint": f"sha256:{self.fingerprint}",
            "positions": decoder.positions_description,
            "parameters": decoder.num_parameters,
            "layers": config.num_hidden_layers,
            "attention_heads": layout.num_attention_heads,
            "key_value_heads": layout.num_key_value_heads,
            "context_length": self.entry.get("context_length"),
            "tokens_seen": self.entry.get("tokens_seen"),
            "kv_cache_bytes_per_token": cache.nbytes,
        }


def load_model(
    source: str, *, trust: str | None = None, dtype: torch.dtype, device: torch.device, weights: bool = True
) -> Model:
    """Load a checkpoint, a Hugging Face folder or a repository of the Hugging Face Hub.

    Args:
        source: `PATH` or `NAME=PATH`; the default name is that of the run's folder, or of the file.
        trust: `module.Class` of a position scheme outside this package that may be imported.
        dtype: Dtype of the weights and the computation.
        device: Device of the model.
        weights: Whether to load the weights; otherwise the file is checked and the parameters are on the meta device.

    Raises:
        UsageError: The checkpoint does not exist, is damaged, or has no tokenizer.
    """
    name, path = _split(source)
    location = locate(path)
    contents = open_checkpoint(location, shapes_only=not weights, checksums=True)
    entry: dict[str, Any] = contents[KEY]
    if entry["tokenizer"] is None:
        raise UsageError(f"{path}: the checkpoint stores no tokenizer, so it cannot be evaluated on text")
    if not weights:
        device = torch.device("meta")
        contents["state_dict"] = {name: value.to(device) for name, value in contents["state_dict"].items()}
    return Model(
        name=escaped(name or _name_of(Path(path))),
        path=path,
        decoder=load_decoder(contents, trust=trust, dtype=dtype).to(device, dtype),
        tokenizer=TextTokenizer.from_entry(entry),
        fingerprint=fingerprint(location),
        entry=entry,
    )


def _split(source: str) -> tuple[str, str]:
    """Split into name and path; the name may be empty."""
    name, path = source.split("=", 1) if "=" in source and not Path(source).exists() else ("", source)
    return name, path


def _name_of(path: Path) -> str:
    """Return NAME for runs/NAME/checkpoints/last.ckpt, and otherwise the name of the file or folder."""
    path = path.absolute()
    if path.parent.name == "checkpoints":
        return path.parent.parent.name
    return path.stem if path.suffix == ".ckpt" else path.name
