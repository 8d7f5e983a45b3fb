"""Tokenizers: bytes, a byte-level BPE trained on the spot, or one of Hugging Face's. All are `tokenizers` files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.errors import UsageError

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
"""Special tokens of the tokenizers made here; every document stands between them."""

KNOWN_EOS = (EOS, "<|endoftext|>", "</s>", "<eos>")
"""What ends documents where a bare tokenizer.json does not say."""

MIN_VOCAB_SIZE = 256 + 2
"""The bytes and the two special tokens."""


class TextTokenizer(NamedTuple):
    """A tokenizer, and the tokens that open and close a document."""

    tokenizer: Tokenizer
    bos_token_id: int | None
    eos_token_id: int
    is_bytes: bool = False
    """Made by :func:`byte_tokenizer`: encoded by a look-up, a hundred times faster."""

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1, added tokens included."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_json(cls, text: str, *, bos_token_id: int | None, eos_token_id: int) -> TextTokenizer:
        """A tokenizer that a checkpoint or prepared data carry."""
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode_special_tokens = True  # a text that spells a special token does not end its document
        return cls(tokenizer, bos_token_id, eos_token_id)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of whole documents, opening and closing tokens included; int32, one array per text."""
        opening = [] if self.bos_token_id is None else [self.bos_token_id]
        if self.is_bytes:
            ids = np.asarray(
                [self.tokenizer.token_to_id(character) for character in _byte_characters()], dtype=np.int32
            )
            bodies = [ids[np.frombuffer(text.encode("utf-8"), dtype=np.uint8)] for text in texts]
        else:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            encodings.reverse()
            bodies = []
            while encodings:  # each takes a hundred bytes a token: let it go at once
                bodies.append(np.asarray(encodings.pop().ids, dtype=np.int32))
        return [np.concatenate((opening, body, [self.eos_token_id])).astype(np.int32) for body in bodies]


def byte_tokenizer() -> TextTokenizer:
    """A tokenizer whose tokens are the 256 bytes and the two special tokens."""
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, *sorted(_byte_characters())])}
    return _byte_level(models.BPE(vocab=vocabulary, merges=[]))._replace(is_bytes=True)


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """A byte-level BPE (GPT-2's kind) trained on documents.

    Args:
        documents: Texts.
        vocab_size: Tokens in all, at least 258. Fewer come out where the texts are too short for so many merges.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = _byte_level(models.BPE()).tokenizer
    tokenizer.train_from_iterator(documents, trainer)
    return _byte_level(tokenizer.model)


def load_tokenizer(name: str, *, bos_token: str | None = None, eos_token: str | None = None) -> TextTokenizer:
    """A tokenizer by name.

    Args:
        name: `bytes`, a tokenizer.json, a checkpoint of ours, or a Hugging Face folder or name on the Hub
            (ORGANIZATION/MODEL).
        bos_token: What opens documents; empty means what the folder's tokenizer_config.json says, else nothing.
        eos_token: What closes documents; empty means what the folder says, else the first known one in the vocabulary.

    Raises:
        UsageError: no such tokenizer, an unknown token, or none that closes documents.
    """
    if name == "bytes":
        return byte_tokenizer()
    path = Path(name).expanduser()
    if path.suffix == ".ckpt":
        return _of_checkpoint(path)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        path = _fetch(name)
    is_folder = path.is_dir()
    folder, path = (path, path / "tokenizer.json") if is_folder else (path.parent, path)
    if not path.is_file():
        raise UsageError(
            f"tokenizer: {name}: no such tokenizer; name bytes, a tokenizer.json, a folder with one, or one on the Hub"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
        settings = json.loads((folder / "tokenizer_config.json").read_text()) if is_folder else {}
    except FileNotFoundError:
        settings = {}
    except Exception as error:  # tokenizers raises bare Exception
        raise UsageError(f"tokenizer: {path}: not a tokenizer ({str(error).splitlines()[0]})") from error
    bos_token = bos_token or _content(settings.get("bos_token"))
    eos_token = eos_token or _content(settings.get("eos_token"))
    if eos_token is None:
        eos_token = next((token for token in KNOWN_EOS if tokenizer.token_to_id(token) is not None), None)
    if eos_token is None:
        raise UsageError(f"eos_token: {path} does not say what closes a document; name the token by --eos_token")
    ids = {}
    for key, token in (("bos_token", bos_token), ("eos_token", eos_token)):
        ids[key] = None if token is None else tokenizer.token_to_id(token)
        if token is not None and ids[key] is None:
            raise UsageError(f"{key}: {token!r} is not in the vocabulary of {path}")
    assert ids["eos_token"] is not None
    tokenizer.encode_special_tokens = True  # a text that spells a special token does not end its document
    return TextTokenizer(tokenizer, ids["bos_token"], ids["eos_token"])


def _of_checkpoint(path: Path) -> TextTokenizer:
    """The tokenizer that a checkpoint carries."""
    ours = read_checkpoint(path)[KEY]
    if ours["tokenizer"] is None or ours["eos_token_id"] is None:
        raise UsageError(f"tokenizer: {path}: holds no tokenizer that says what closes a document")
    return TextTokenizer.from_json(
        ours["tokenizer"], bos_token_id=ours["bos_token_id"], eos_token_id=ours["eos_token_id"]
    )


def _fetch(name: str) -> Path:
    """A tokenizer's files from the Hugging Face Hub, or from its cache on this machine."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["tokenizer.json", "tokenizer_config.json"]))
    except Exception as error:  # httpx's, and the Hub's own
        raise UsageError(
            f"tokenizer: {name}: neither here nor to be had from the Hugging Face Hub ({type(error).__name__}); "
            "check the name and the connection"
        ) from error


def check_choice(prefix: str, tokenizer: str | None, train_tokenizer: int | None) -> None:
    """Raise UsageError, naming the keys after `prefix`, unless just one tokenizer is chosen and can be."""
    if (tokenizer is None) == (train_tokenizer is None):
        raise UsageError(
            f"{prefix}tokenizer: give either {prefix}tokenizer or {prefix}train_tokenizer (a vocabulary size)"
        )
    if train_tokenizer is not None and train_tokenizer < MIN_VOCAB_SIZE:
        raise UsageError(
            f"{prefix}train_tokenizer: {train_tokenizer} must be {MIN_VOCAB_SIZE} or more (bytes and special tokens)"
        )


def _content(token: str | dict | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _byte_level(model: models.Model) -> TextTokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.encode_special_tokens = True  # a text that spells a special token does not end its document
    return TextTokenizer(tokenizer, 0, 1)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's convention)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
