"""The one entry of tokenizers: bytes, a byte-level BPE trained on documents, or one of Hugging Face's.

Whatever a tokenizer comes from, truncation and padding are switched off, and the tokenizer itself is asked what it puts
before and after a text (`encode(text, add_special_tokens=True)`, as transformers does).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ropepp_lit.errors import UsageError
from ropepp_lit.files import escaped, nearest_file
from ropepp_lit.text import tokenizer_files
from ropepp_lit.text.identity import opening_of
from ropepp_lit.text.tokenizer_files import (
    Loaded,
    added_around,
    encoding_errors,
    exact,
    processor_around,
    stop_ids,
)

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
"""Special tokens of the tokenizers made here; every document stands between them."""

KNOWN_EOS = (EOS, "<|endoftext|>", "</s>", "<eos>")
"""What ends documents where neither the tokenizer's files nor an option name a token."""

MIN_VOCAB_SIZE = 256 + 2
"""The bytes and the two special tokens."""


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer, and the tokens that stand before, behind and between texts."""

    tokenizer: Tokenizer

    bos_token_id: int | None = None
    """The token that is named as the beginning of a text; whether texts begin with it, :attr:`opening` says."""

    eos_token_id: int | None = None
    """The token that ends a document; None where nobody names one."""

    opening: tuple[int, ...] = ()
    """What stands before every text."""

    closing: tuple[int, ...] = ()
    """What the tokenizer itself puts behind every text."""

    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end what a model writes: `eos_token_id`, and those of generation_config.json."""

    settings: dict[str, Any] | None = None
    """tokenizer_config.json with special_tokens_map.json merged into it; None where there is neither."""

    is_bytes: bool = False
    """Made by :func:`byte_tokenizer`: encoded by a look-up, a hundred times faster."""

    def __post_init__(self) -> None:
        exact(self.tokenizer)
        self.tokenizer.encode_special_tokens = True  # a text that spells a special token does not end its document
        stops = self.stop_token_ids | ({self.eos_token_id} if self.eos_token_id is not None else set())
        object.__setattr__(self, "stop_token_ids", frozenset(stops))

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> TextTokenizer:
        """The tokenizer that a checkpoint or prepared data store.

        Args:
            entry: `tokenizer` (JSON), `bos_token_id`, `eos_token_id`, and where they are known `opening` (token ids),
                `generation_config` and `tokenizer_config` (JSON).
        """
        tokenizer = tokenizer_files.parse(entry["tokenizer"], "tokenizer.json that is stored")
        return cls(
            tokenizer=tokenizer,
            bos_token_id=entry["bos_token_id"],
            eos_token_id=entry["eos_token_id"],
            opening=tuple(opening_of(entry)),
            closing=added_around(tokenizer)[1],
            stop_token_ids=stop_ids(tokenizer, entry.get("generation_config")),
            settings=json.loads(entry["tokenizer_config"]) if entry.get("tokenizer_config") else None,
        )

    @classmethod
    def from_files(cls, loaded: Loaded) -> TextTokenizer:
        """The tokenizer of a file or a Hugging Face folder."""
        opening, closing = added_around(loaded.tokenizer)
        bos, eos = loaded.bos_token_id, loaded.eos_token_id
        if bos is None and len(opening) == 1:
            bos = opening[0]
        if eos is None:
            ids = (loaded.tokenizer.token_to_id(token) for token in KNOWN_EOS)
            eos = next((token for token in ids if token is not None), None)
        return cls(
            tokenizer=loaded.tokenizer,
            bos_token_id=bos,
            eos_token_id=eos,
            opening=opening,
            closing=closing,
            stop_token_ids=stop_ids(loaded.tokenizer, loaded.generation_config),
            settings=loaded.settings,
        )

    @property
    def json(self) -> str:
        """The tokenizer in the format of tokenizer.json."""
        return self.tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1, added tokens included."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text alone, without what stands before and behind it; special tokens in it are plain text."""
        with encoding_errors():
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Characters of the text (start:end) that each token of :meth:`encode_text` stands for."""
        with encoding_errors():
            return self.tokenizer.encode(text, add_special_tokens=False).offsets

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that a model continues, with what stands before every text.

        Special tokens in the text are tokens, and what it begins with already is not added again. Where nothing stands
        before texts and the text is empty, the token that ends documents stands there.
        """
        self.tokenizer.encode_special_tokens = False
        try:
            ids = self.encode_text(text)
        finally:
            self.tokenizer.encode_special_tokens = True
        opening = list(self.opening)
        if not opening or ids[: len(opening)] != opening:
            ids = opening + ids
        if not ids and self.eos_token_id is None:
            raise UsageError("prompt: nothing stands before the texts of this tokenizer; give a prompt")
        return ids or [int(self.eos_token_id or 0)]

    def encode_whole(self, text: str) -> list[int]:
        """Token ids of a text with what stands before and behind it: transformers' `tokenizer(text).input_ids`."""
        return [*self.opening, *self.encode_text(text), *self.closing]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of whole documents, opening and closing tokens and EOS included; int32, one array per text."""
        if self.is_bytes:
            bodies = [self._byte_ids[np.frombuffer(text.encode("utf-8"), dtype=np.uint8)] for text in texts]
        else:
            with encoding_errors():
                encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            encodings.reverse()
            bodies = []
            while encodings:  # each takes a hundred bytes a token: let it go at once
                bodies.append(np.asarray(encodings.pop().ids, dtype=np.int32))
        before, behind = (np.asarray(ids, dtype=np.int32) for ids in self.around)
        return [np.concatenate((before, body, behind)) for body in bodies]

    @property
    def around(self) -> tuple[Sequence[int], Sequence[int]]:
        """Tokens before and behind whole documents: opening, and closing with EOS."""
        assert self.eos_token_id is not None
        end = self.closing if self.closing[-1:] == (self.eos_token_id,) else (*self.closing, self.eos_token_id)
        return self.opening, end

    @cached_property
    def _byte_ids(self) -> np.ndarray:
        ids = [self.tokenizer.token_to_id(character) for character in _byte_characters()]
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token(self, token_id: int | None) -> str | None:
        """The token of an id as it is written in the vocabulary."""
        return None if token_id is None else self.tokenizer.id_to_token(token_id)

    @property
    def description(self) -> str:
        """What texts begin with and documents end with, in words."""
        before = " ".join(str(self.token(token)) for token in self.opening)
        end = self.token(self.eos_token_id) or "no token"
        return f"texts begin with {before or 'no token'}, documents end with {end}"

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's content and of :attr:`opening` and EOS, whatever the white space of its file."""
        contents = [json.loads(self.json), list(self.opening), list(self.closing), self.eos_token_id]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def byte_tokenizer() -> TextTokenizer:
    """A tokenizer whose tokens are the 256 bytes and the two special tokens."""
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, *sorted(_byte_characters())])}
    return _byte_level(models.BPE(vocab=vocabulary, merges=[]), is_bytes=True)


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
    """A tokenizer by name, with a token that ends documents.

    Args:
        name: `bytes`, a tokenizer.json, a checkpoint of ours, or a Hugging Face folder or name on the Hub
            (ORGANIZATION/MODEL).
        bos_token: What stands before texts instead of what the tokenizer itself puts there; empty ("") means nothing.
        eos_token: What ends documents instead of what the folder says.

    Raises:
        UsageError: no such tokenizer, an unknown token, or none that ends documents.
    """
    path = Path(name).expanduser()
    if name == "bytes":
        found = byte_tokenizer()
    elif path.suffix == ".ckpt":
        found = _of_checkpoint(path)
    else:
        if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            path = tokenizer_files.fetch(name)
        loaded = tokenizer_files.load(path)
        if loaded is None:
            raise UsageError(
                f"tokenizer: {name}: no such tokenizer; name bytes, a tokenizer.json, a folder with one, or one on the "
                f"Hub{nearest_file(path)}"
            )
        found = TextTokenizer.from_files(loaded)
    if bos_token is not None:
        bos = None if bos_token == "" else _id_of(found.tokenizer, bos_token, key="bos_token", name=name)
        found = replace(found, bos_token_id=bos, opening=() if bos is None else (bos,))
    if eos_token is not None:
        eos = _id_of(found.tokenizer, eos_token, key="eos_token", name=name)
        found = replace(found, eos_token_id=eos)
    if found.eos_token_id is None:
        raise UsageError(
            f"eos_token: {name} does not say what ends a document; name the token by ropepp-lit prepare --eos_token"
        )
    return found


def _id_of(tokenizer: Tokenizer, token: str, *, key: str, name: str) -> int:
    found = None if escaped(token) != token else tokenizer.token_to_id(token)
    if found is None:
        raise UsageError(f"{key}: {token!r} is not in the vocabulary of {name}")
    return found


def _of_checkpoint(path: Path) -> TextTokenizer:
    """The tokenizer that a checkpoint stores."""
    from ropepp_lit.checkpoint import KEY, read_checkpoint  # imports torch

    entry = read_checkpoint(path, shapes_only=True)[KEY]
    if entry["tokenizer"] is None:
        raise UsageError(f"tokenizer: {path}: the checkpoint stores no tokenizer")
    return TextTokenizer.from_entry(entry)


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


def _byte_level(model: models.Model, *, is_bytes: bool = False) -> TextTokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processor_around(tokenizer, [0])
    return TextTokenizer(tokenizer=tokenizer, bos_token_id=0, eos_token_id=1, opening=(0,), is_bytes=is_bytes)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's convention)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
