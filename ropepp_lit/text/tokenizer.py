"""Load or train tokenizers: bytes, a byte-level BPE trained on documents, or a Hugging Face tokenizer.

Truncation and padding are always disabled. The tokens before and after a text are determined by calling the tokenizer
(`encode(text, add_special_tokens=True)`, as transformers does).
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
    LoadedTokenizer,
    added_around,
    encoding_errors,
    make_deterministic,
    processor_around,
    stop_ids,
)

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
"""BOS and EOS tokens of the tokenizers created here; every document begins and ends with them."""

KNOWN_EOS = (EOS, "<|endoftext|>", "</s>", "<eos>")
"""Candidates for the EOS token if neither the tokenizer's files nor an option specify it."""

MIN_VOCAB_SIZE = 256 + 2
"""Smallest vocabulary: the 256 bytes and the two special tokens."""


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer, and the special tokens before and after texts and documents."""

    tokenizer: Tokenizer
    """Tokenizer of the library tokenizers."""

    bos_token_id: int | None = None
    """Id of the BOS token; whether texts begin with it is defined by :attr:`opening`."""

    eos_token_id: int | None = None
    """Id of the token that ends a document; None if it is not specified."""

    opening: tuple[int, ...] = ()
    """Token ids before every text."""

    closing: tuple[int, ...] = ()
    """Token ids that the tokenizer's post-processor appends to every text."""

    stop_token_ids: frozenset[int] = frozenset()
    """Token ids that end generation: `eos_token_id`, and those of generation_config.json."""

    settings: dict[str, Any] | None = None
    """Values of tokenizer_config.json merged with special_tokens_map.json; None if there is neither file."""

    is_bytes: bool = False
    """Whether this is a :func:`byte_tokenizer`, which encodes by table look-up, about 100 times faster."""

    def __post_init__(self) -> None:
        make_deterministic(self.tokenizer)
        self.tokenizer.encode_special_tokens = True  # special tokens in a text are plain text, and do not end it
        stops = self.stop_token_ids | ({self.eos_token_id} if self.eos_token_id is not None else set())
        object.__setattr__(self, "stop_token_ids", frozenset(stops))

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> TextTokenizer:
        """Create the tokenizer that is stored in a checkpoint or in prepared data.

        Args:
            entry: Mapping with `tokenizer` (JSON), `bos_token_id`, `eos_token_id`, and optionally `opening` (token
                ids), `generation_config` and `tokenizer_config` (JSON).
        """
        tokenizer = tokenizer_files.parse(entry["tokenizer"], "stored tokenizer.json")
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
    def from_files(cls, loaded: LoadedTokenizer) -> TextTokenizer:
        """Create a tokenizer from a loaded file or Hugging Face folder."""
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
        """Content of tokenizer.json."""
        return self.tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1, including added tokens."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_text(self, text: str) -> list[int]:
        """Tokenize a text without the tokens before and after it; special tokens in the text are plain text."""
        with encoding_errors():
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the character range (start, end) of each token of :meth:`encode_text`."""
        with encoding_errors():
            return self.tokenizer.encode(text, add_special_tokens=False).offsets

    def encode_prompt(self, text: str) -> list[int]:
        """Tokenize a text that a model continues, with the tokens before every text.

        Special tokens in the text are parsed, and opening tokens that the text already begins with are not repeated. If
        the text is empty and there are no opening tokens, the result is the EOS token.

        Raises:
            UsageError: The result would be empty because there is no EOS token either.
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
            raise UsageError("prompt: it is empty, and this tokenizer has no BOS or EOS token; pass a prompt")
        return ids or [int(self.eos_token_id or 0)]

    def encode_whole(self, text: str) -> list[int]:
        """Tokenize a text with the tokens before and after it: transformers' `tokenizer(text).input_ids`."""
        return [*self.opening, *self.encode_text(text), *self.closing]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokenize complete documents, with opening and closing tokens and EOS; returns one int32 array per text."""
        if self.is_bytes:
            bodies = [self._byte_ids[np.frombuffer(text.encode("utf-8"), dtype=np.uint8)] for text in texts]
        else:
            with encoding_errors():
                encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            encodings.reverse()
            bodies = []
            while encodings:  # each takes about 100 bytes per token: free it at once
                bodies.append(np.asarray(encodings.pop().ids, dtype=np.int32))
        opening, closing = (np.asarray(ids, dtype=np.int32) for ids in self.document_tokens)
        return [np.concatenate((opening, body, closing)) for body in bodies]

    @property
    def document_tokens(self) -> tuple[Sequence[int], Sequence[int]]:
        """Token ids before and after complete documents: the opening tokens, and the closing tokens with EOS."""
        assert self.eos_token_id is not None
        end = self.closing if self.closing[-1:] == (self.eos_token_id,) else (*self.closing, self.eos_token_id)
        return self.opening, end

    @cached_property
    def _byte_ids(self) -> np.ndarray:
        ids = [self.tokenizer.token_to_id(character) for character in _byte_characters()]
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, skipping special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token(self, token_id: int | None) -> str | None:
        """Return the vocabulary entry of a token id; None for None."""
        return None if token_id is None else self.tokenizer.id_to_token(token_id)

    @property
    def description(self) -> str:
        """Description of the tokens at the beginning of texts and the end of documents."""
        before = " ".join(str(self.token(token)) for token in self.opening)
        end = self.token(self.eos_token_id) or "no token"
        return f"texts begin with {before or 'no token'}, documents end with {end}"

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's content and its opening, closing and EOS tokens, independent of white space."""
        contents = [json.loads(self.json), list(self.opening), list(self.closing), self.eos_token_id]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def byte_tokenizer() -> TextTokenizer:
    """Create a tokenizer whose tokens are the 256 bytes and the two special tokens."""
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, *sorted(_byte_characters())])}
    return _byte_level(models.BPE(vocab=vocabulary, merges=[]), is_bytes=True)


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE (as in GPT-2) on documents.

    Args:
        documents: Texts.
        vocab_size: Size of the vocabulary, at least 258. It is smaller if the texts do not have enough merges.
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
    """Load a tokenizer by name, and check that it has an EOS token.

    Args:
        name: `bytes`, a tokenizer.json, a checkpoint of this package, or a Hugging Face folder or name on the Hub
            (ORGANIZATION/MODEL).
        bos_token: Token before texts, instead of the tokenizer's opening tokens; an empty string means none.
        eos_token: Token that ends documents, instead of the one that the tokenizer's files specify.

    Raises:
        UsageError: There is no such tokenizer, a token is unknown, or no EOS token is specified.
    """
    path = Path(name).expanduser()
    if name == "bytes":
        tokenizer = byte_tokenizer()
    elif path.suffix == ".ckpt":
        tokenizer = _load_from_checkpoint(path)
    else:
        if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            path = tokenizer_files.fetch(name)
        loaded = tokenizer_files.load(path)
        if loaded is None:
            raise UsageError(
                f"tokenizer: {name}: no such tokenizer; pass bytes, a tokenizer.json, a folder with one, or one on the "
                f"Hub{nearest_file(path)}"
            )
        tokenizer = TextTokenizer.from_files(loaded)
    if bos_token is not None:
        bos = None if bos_token == "" else _token_id(tokenizer.tokenizer, bos_token, key="bos_token", name=name)
        tokenizer = replace(tokenizer, bos_token_id=bos, opening=() if bos is None else (bos,))
    if eos_token is not None:
        eos = _token_id(tokenizer.tokenizer, eos_token, key="eos_token", name=name)
        tokenizer = replace(tokenizer, eos_token_id=eos)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"eos_token: {name} defines no EOS token; pass the token by ropepp-lit prepare --eos_token")
    return tokenizer


def _token_id(tokenizer: Tokenizer, token: str, *, key: str, name: str) -> int:
    token_id = None if escaped(token) != token else tokenizer.token_to_id(token)
    if token_id is None:
        raise UsageError(f"{key}: {token!r} is not in the vocabulary of {name}")
    return token_id


def _load_from_checkpoint(path: Path) -> TextTokenizer:
    """Load the tokenizer that a checkpoint stores."""
    from ropepp_lit.checkpoint import KEY, read_checkpoint  # imports torch

    entry = read_checkpoint(path, shapes_only=True)[KEY]
    if entry["tokenizer"] is None:
        raise UsageError(f"tokenizer: {path}: the checkpoint stores no tokenizer")
    return TextTokenizer.from_entry(entry)


def check_choice(prefix: str, tokenizer: str | None, train_tokenizer: int | None) -> None:
    """Check that exactly one valid tokenizer option is set; raise UsageError with the keys after `prefix` if not."""
    if (tokenizer is None) == (train_tokenizer is None):
        raise UsageError(
            f"{prefix}tokenizer: set either {prefix}tokenizer or {prefix}train_tokenizer (a vocabulary size)"
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
    """Return the character that represents each byte in a byte-level vocabulary (GPT-2's convention)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
