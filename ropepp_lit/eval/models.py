"""A model to be measured: decoder, tokenizer, and what the results say of it."""

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

TOKENS_AT_ONCE = 16_384
"""Rows are read together as long as they have no more tokens than this."""


@dataclass(kw_only=True)
class Model:
    """A decoder that reads and writes text."""

    name: str
    """Models of one name are runs (seeds) of one."""

    path: str
    decoder: Decoder
    tokenizer: TextTokenizer
    fingerprint: str
    """SHA-256 of the checkpoint."""

    entry: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint says of itself; see :mod:`ropepp_lit.checkpoint`."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.decoder.model.embed_tokens.weight.device

    @property
    def opening(self) -> list[int]:
        """What texts begin with."""
        return list(self.tokenizer.opening)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without what opens and closes documents."""
        return self.tokenizer.encode_text(text)

    def describe(self) -> dict[str, Any]:
        """What results say of it."""
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
    """A checkpoint, Hugging Face folder or name on the Hugging Face Hub as a model.

    Args:
        source: `PATH`, or `NAME=PATH`; without a name it is that of the run's folder, or of the file.
        trust: `module.Class` of a position scheme that is not ours and may be imported.
        dtype: In which it computes.
        device: On which it computes.
        weights: Read them; else the file is checked, and the parameters are on the meta device.

    Raises:
        UsageError: no such checkpoint, a damaged one, or one without a tokenizer.
    """
    name, path = _split(source)
    location = locate(path)
    contents = open_checkpoint(location, shapes_only=not weights, checksums=True)
    entry: dict[str, Any] = contents[KEY]
    if entry["tokenizer"] is None:
        raise UsageError(f"{path}: the checkpoint stores no tokenizer, so it cannot read text")
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
    """Name and path; without a name it is empty."""
    name, path = source.split("=", 1) if "=" in source and not Path(source).exists() else ("", source)
    return name, path


def _name_of(path: Path) -> str:
    """runs/NAME/checkpoints/last.ckpt is NAME; others are called as their file or folder."""
    path = path.absolute()
    if path.parent.name == "checkpoints":
        return path.parent.parent.name
    return path.stem if path.suffix == ".ckpt" else path.name
