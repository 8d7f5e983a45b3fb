"""Find, fetch or prepare the folder of token shards of each source."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection
from pathlib import Path

from ropepp_lit.data.manifest import MANIFEST, TOKENIZER, Manifest
from ropepp_lit.data.prepare import PrepareSettings, cached_folder, prepare_cached
from ropepp_lit.data.remote import RemoteFolder, is_remote
from ropepp_lit.data.samples import TokenSource
from ropepp_lit.data.tokenizer_choice import TokenizerChoice
from ropepp_lit.errors import UsageError
from ropepp_lit.text.sources import BUILTIN, HUB, find_files


class SourceFolders:
    """Folders of token shards of the training sources and validation sets.

    A source is a folder of token shards, a URL of one in an object store, or text that is prepared in the cache.

    Args:
        sources: Training sources.
        validation: Validation sets: folders of token shards.
        tokenizer: Choice of the tokenizer.
        settings: Returns the settings for preparing text, without the tokenizer.
        cache_dir: Folder of prepared and fetched data.
        max_bytes: Maximum size of the chunks fetched from object stores.
    """

    def __init__(
        self,
        sources: Collection[str],
        validation: Collection[str],
        tokenizer: TokenizerChoice,
        *,
        settings: Callable[[], PrepareSettings],
        cache_dir: Path,
        max_bytes: int,
    ) -> None:
        self._sources, self._validation, self._tokenizer = sources, validation, tokenizer
        self._base_settings, self._cache_dir, self._max_bytes = settings, cache_dir, max_bytes
        self._remotes: dict[str, RemoteFolder] = {}
        self.folders: dict[str, Path] = {}
        """Folder of each source and validation set that has been found or prepared."""

    def check(self) -> None:
        """Find the folders that exist, and check everything else before anything is written.

        Raises:
            UsageError: A source is missing or empty, a validation set is not prepared, or the choice of the tokenizer
                is not valid.
        """
        texts = []
        for name in (*self._sources, *self._validation):
            if is_remote(name):
                self._remotes[name] = RemoteFolder(name, self._cache_dir, max_bytes=self._max_bytes)
                self.folders[name] = self._remotes[name].folder
            elif (Path(name).expanduser() / MANIFEST).is_file():
                self.folders[name] = Path(name).expanduser()
            elif name not in self._sources:
                raise UsageError(
                    f"data.validation: {name} contains no token shards; prepare them by `ropepp-lit prepare`"
                )
            else:
                texts.append(name)
        find_files(texts, key="data.source")
        self._tokenizer.check(shards=[name for name in self._sources if name not in texts], texts=texts)

    def prepare(self) -> None:
        """Fetch the manifests of object stores, and prepare text; call :meth:`check` first."""
        for remote in self._remotes.values():
            for file in (MANIFEST, TOKENIZER):
                remote.fetch_small(file)
        for source in self._sources:
            if source not in self.folders:
                self.folders[source] = prepare_cached(source, self._settings(source), cache_dir=self._cache_dir)

    @property
    def exist(self) -> bool:
        """Whether all sources and validation sets exist on this machine, in an object store or on the Hub."""
        names = (*self._sources, *self._validation)
        return all(is_remote(name) or name.startswith(HUB) or name == BUILTIN or glob.glob(name) for name in names)

    @property
    def are_prepared(self) -> bool:
        """Whether all text sources have been prepared; call :meth:`check` first."""
        texts = (source for source in self._sources if source not in self.folders)
        folders = (cached_folder(source, self._settings(source), cache_dir=self._cache_dir) for source in texts)
        return all((folder / MANIFEST).is_file() for folder in folders)

    def read_manifest(self, source: str) -> Manifest:
        """Read the manifest of a source or validation set."""
        return Manifest.read(self.folders[source], url=self._url(source))

    def open(self, source: str, weight: float = 1.0) -> tuple[TokenSource, str]:
        """Open the token shards of a source or validation set.

        Args:
            source: Name of the source.
            weight: Weight in the training mixture.

        Returns:
            The token shards, and the content of their tokenizer.json.

        Raises:
            UsageError: The folder is damaged, or its tokenizer is not the recipe's.
        """
        folder, manifest = self.folders[source], self.read_manifest(source)
        tokenizer = manifest.read_tokenizer(folder, url=self._url(source))
        self._tokenizer.check_shards(source, tokenizer)
        return TokenSource(source, folder, manifest, self._remotes.get(source), weight), tokenizer

    def _url(self, source: str) -> str | None:
        return self._remotes[source].url if source in self._remotes else None

    def _settings(self, source: str) -> PrepareSettings:
        return self._tokenizer.settings(source, self._base_settings(), cache_dir=self._cache_dir)
