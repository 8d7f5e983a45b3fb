"""Choose the tokenizer for preparing text: the recipe's, or that of the checkpoint from which a run resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ropepp_lit.data.manifest import MANIFEST, Manifest
from ropepp_lit.data.prepare import PrepareSettings, cached_folder
from ropepp_lit.errors import UsageError
from ropepp_lit.text.identity import same_tokenizer
from ropepp_lit.text.tokenizer import check_choice, load_tokenizer


class TokenizerChoice:
    """Choice of the tokenizer for a recipe.

    If a run resumes from a checkpoint, the checkpoint's tokenizer is used when the recipe trains a tokenizer, or sets
    one that can no longer be loaded.

    Args:
        tokenizer: See :class:`~ropepp_lit.data.token_data.TokenData`.
        train_tokenizer: See there.
    """

    def __init__(self, tokenizer: str | None, train_tokenizer: int | None) -> None:
        self._name, self._train_tokenizer = tokenizer, train_tokenizer
        self._checkpoint: tuple[str, str] | None = None
        self._loaded: str | None = None
        self._is_loaded = False
        self.notices: list[str] = []
        """Lines to print before the data is used."""

    def continue_from(self, path: str, entry: dict[str, Any]) -> None:
        """Use the tokenizer of a checkpoint, if it stores one.

        Args:
            path: Path of the checkpoint.
            entry: Entry `ropepp_lit` of the checkpoint.
        """
        self._checkpoint = (path, entry["tokenizer"]) if entry.get("tokenizer") else None

    def check(self, *, shards: list[str], texts: list[str]) -> None:
        """Check the options, and load the tokenizer that the recipe sets.

        Args:
            shards: Sources that are token shards.
            texts: Sources that are text.

        Raises:
            UsageError: Not exactly one tokenizer is set, it cannot be loaded, or it differs from the checkpoint's.
        """
        uses_checkpoint = self._checkpoint is not None and self._name is None
        if texts and not uses_checkpoint:
            check_choice("data.", self._name, self._train_tokenizer)
        if not texts and self._train_tokenizer is not None:
            raise UsageError(
                f"data.train_tokenizer: {', '.join(shards)} contains token shards with their tokenizer; remove it"
            )
        if self._name is None or self._is_loaded:
            return
        try:
            self._loaded = load_tokenizer(self._name).json
        except UsageError:
            if self._checkpoint is None:
                raise
            path = self._checkpoint[0]
            self.notices.append(f"Note: data.tokenizer: {self._name} cannot be loaded; the tokenizer of {path} is used")
        self._is_loaded = True
        if self._checkpoint is None or self._loaded is None:
            return
        path, stored = self._checkpoint
        if not same_tokenizer(self._loaded, stored):
            raise UsageError(
                f"data.tokenizer: {self._name} is not the tokenizer of {path}; restore the previous value, or start a "
                f"new run from the weights by --model.init_from {path}"
            )

    def check_shards(self, source: str, tokenizer: str) -> None:
        """Check that the recipe's tokenizer is that of token shards.

        Args:
            source: Source of the shards.
            tokenizer: Content of their tokenizer.json.

        Raises:
            UsageError: The tokenizers differ.
        """
        if self._loaded is not None and not same_tokenizer(tokenizer, self._loaded):
            raise UsageError(
                f"data.tokenizer: {self._name} is not the tokenizer that {source} was prepared with; remove "
                "data.tokenizer, or prepare the text again with it"
            )

    def settings(self, source: str, base: PrepareSettings, *, cache_dir: Path) -> PrepareSettings:
        """Return the settings for preparing a text source with the chosen tokenizer.

        Args:
            source: Text source.
            base: Settings without a tokenizer.
            cache_dir: Folder of prepared text.
        """
        settings = dataclasses.replace(base, tokenizer=self._name, train_tokenizer=self._train_tokenizer)
        if self._checkpoint is None or self._loaded is not None:
            return settings
        path, stored = self._checkpoint
        if self._train_tokenizer is not None:
            folder = cached_folder(source, settings, cache_dir=cache_dir)
            was_prepared = (folder / MANIFEST).is_file()
            if was_prepared and same_tokenizer(Manifest.read(folder).read_tokenizer(folder), stored):
                return settings
        return dataclasses.replace(settings, tokenizer=path, train_tokenizer=None)
