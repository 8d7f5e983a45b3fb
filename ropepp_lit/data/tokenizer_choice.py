"""Which tokenizer text is prepared with: the recipe's, or that of the checkpoint which a run continues from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ropepp_lit.data.prepare import Settings, cached_folder
from ropepp_lit.data.shards import MANIFEST, Manifest
from ropepp_lit.errors import UsageError
from ropepp_lit.text.identity import same_tokenizer
from ropepp_lit.text.tokenizer import check_choice, load_tokenizer


class TokenizerChoice:
    """The tokenizer of a recipe. A checkpoint's own goes on where the recipe trains one, or names one that is gone.

    Args:
        tokenizer: See :class:`~ropepp_lit.data.token_data.TokenData`.
        train_tokenizer: See there.
    """

    def __init__(self, tokenizer: str | None, train_tokenizer: int | None) -> None:
        self._name, self._train = tokenizer, train_tokenizer
        self._checkpoint: tuple[str, str] | None = None
        self._loaded: str | None = None
        self._is_loaded = False
        self.notices: list[str] = []
        """Lines to print before the data are used."""

    def continue_from(self, path: str, entry: dict[str, Any]) -> None:
        """Use the tokenizer of a checkpoint where it has one.

        Args:
            path: The checkpoint.
            entry: Its entry `ropepp_lit`.
        """
        self._checkpoint = (path, entry["tokenizer"]) if entry.get("tokenizer") else None

    def check(self, *, shards: list[str], texts: list[str]) -> None:
        """Load the tokenizer that the recipe names.

        Args:
            shards: Sources that are prepared.
            texts: Sources that are text.

        Raises:
            UsageError: none or two are chosen, the tokenizer cannot be loaded, or it is not the checkpoint's.
        """
        is_free = self._checkpoint is not None and self._name is None  # text is read with the checkpoint's
        if texts and not is_free:
            check_choice("data.", self._name, self._train)
        if not texts and self._train is not None:
            raise UsageError(
                f"data.train_tokenizer: {', '.join(shards)} holds token shards and their tokenizer; leave it out"
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
                f"data.tokenizer: {self._name} is not the tokenizer of {path}; leave it as it was, or start another "
                f"run from the weights by --model.init_from {path}"
            )

    def check_shards(self, source: str, tokenizer: str) -> None:
        """Compare the tokenizer that the recipe names with that of prepared shards.

        Args:
            source: Of the shards.
            tokenizer: Their tokenizer.json.

        Raises:
            UsageError: they differ.
        """
        if self._loaded is not None and not same_tokenizer(tokenizer, self._loaded):
            raise UsageError(
                f"data.tokenizer: {self._name} is not the tokenizer that {source} was prepared with; leave "
                "data.tokenizer out, or prepare the text again with it"
            )

    def settings(self, source: str, others: Settings, *, cache_dir: Path) -> Settings:
        """How the text of a source is prepared.

        Args:
            source: The text.
            others: The settings but for the tokenizer.
            cache_dir: Of prepared text.
        """
        settings = dataclasses.replace(others, tokenizer=self._name, train_tokenizer=self._train)
        if self._checkpoint is None or self._loaded is not None:
            return settings
        path, stored = self._checkpoint
        if self._train is not None:
            folder = cached_folder(source, settings, cache_dir=cache_dir)
            was_prepared = (folder / MANIFEST).is_file()
            if was_prepared and same_tokenizer(Manifest.read(folder).read_tokenizer(folder), stored):
                return settings
        return dataclasses.replace(settings, tokenizer=path, train_tokenizer=None)
