"""Tokenizers: bytes, or a byte-level BPE trained on the spot. Both are `tokenizers` files, so one reader serves all."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_TOKEN_ID, EOS_TOKEN_ID = 0, 1
"""Special tokens of the tokenizers made here; every document stands between them."""

MIN_VOCAB_SIZE = 256 + 2
"""The bytes and the two special tokens."""


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are the 256 bytes and the two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, *alphabet])}
    return _byte_level(models.BPE(vocab=vocabulary, merges=[]))


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """A byte-level BPE (GPT-2's kind) trained on documents.

    Args:
        documents: Texts.
        vocab_size: Tokens in all, at least 258. Fewer come out where the texts are too short for so many merges.
        show_progress: Draw the library's progress bars.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(documents, trainer)
    return _byte_level(tokenizer.model)


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer
