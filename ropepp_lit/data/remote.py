"""Fetch token shards from object stores with litdata's downloaders, into a cache of bounded size."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ropepp_lit.errors import UsageError
from ropepp_lit.files import inside, locked, write_errors

SCHEMES = ("s3://", "gs://")
"""URL schemes of the supported object stores."""

SECONDS_TO_FAIL = 25
"""Timeout for fetching a small file, the first request to a store; the libraries would retry for minutes."""


def is_remote(source: str) -> bool:
    """Return whether a source is a URL of an object store."""
    return source.startswith(SCHEMES)


def default_cache_dir() -> Path:
    """Return the default folder of prepared data: `ropepp_lit` in the user's cache folder (XDG convention)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ropepp_lit"


class RemoteFolder:
    """A folder in an object store, whose files are fetched once and cached.

    Credentials and endpoint are read from the environment: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` and the like for
    `s3://`, Google's application default credentials for `gs://`.

    Args:
        url: `s3://BUCKET/FOLDER` or `gs://BUCKET/FOLDER`.
        cache_dir: Folder of the cache, with a subfolder for each URL.
        max_bytes: Maximum size of all cached chunks, for all URLs together; the least recently used are deleted.

    Raises:
        UsageError: The URL has no bucket.
    """

    def __init__(self, url: str, cache_dir: Path, *, max_bytes: int) -> None:
        if not urlsplit(url).netloc:
            raise UsageError(f"{url}: no bucket; write {SCHEMES[0]}BUCKET/FOLDER")
        self.url = url.rstrip("/")
        self._cache, self._max_bytes = cache_dir / "remote", max_bytes
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = self._cache / f"{urlsplit(self.url).path.rpartition('/')[2] or 'bucket'}-{digest}"
        """Local folder of the fetched files."""
        self._downloader: tuple[int, Any] | None = None

    def fetch_small(self, name: str) -> None:
        """Fetch a small file, even if it is cached, within :data:`SECONDS_TO_FAIL`.

        Raises:
            UsageError: The file or bucket does not exist, access is denied, the store does not respond in time, its
                library is missing, or the cache cannot be written.
        """
        errors: list[Exception] = []
        content = io.BytesIO()

        def fetch() -> None:
            try:
                self._copy(name, content)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(SECONDS_TO_FAIL)
        if thread.is_alive():
            raise UsageError(f"{self.url}/{name}: no response within {SECONDS_TO_FAIL} seconds; check the endpoint")
        if errors:
            raise errors[0]
        path = inside(self.folder, name, source=self.url, for_writing=True)
        with write_errors(path):
            if not path.is_file() or path.read_bytes() != content.getvalue():
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, lambda file: file.write(content.getvalue()))

    def fetch_chunk(self, name: str, num_bytes: int) -> tuple[Path, bool]:
        """Return a chunk's file in the cache, downloading it unless a file of the right size is cached.

        Args:
            name: Path relative to the URL.
            num_bytes: Size of the file.

        Returns:
            The path of the file, and whether it was downloaded by this call.

        Raises:
            UsageError: See :meth:`fetch_small`.
        """
        path = inside(self.folder, name, source=self.url, for_writing=True)

        def is_cached() -> bool:
            return path.is_file() and path.stat().st_size == num_bytes

        cached = is_cached()  # without a lock, so that a complete cache can be read-only
        if not cached:
            with write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with locked(path.with_name(f".{path.name}.lock")):
                    cached = is_cached()
                    if not cached:
                        _write(path, lambda file: self._copy(name, file))
        with suppress(OSError):  # a read-only cache
            os.utime(path)
        self._evict(keep=path)
        return path, not cached

    def _copy(self, name: str, file: IO[bytes]) -> None:
        try:
            # Not download_file: it returns without the file if another process holds its lock.
            self._connect().download_fileobj(f"{self.url}/{name}", file)
        except Exception as error:
            if not _is_store_error(error):
                raise
            problem = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(
                f"{self.url}/{name}: {problem}; check the URL, the endpoint and the credentials in the environment"
            ) from error

    def _connect(self) -> Any:
        """Return the downloader of this process; connections do not survive a fork."""
        if self._downloader is None or self._downloader[0] != os.getpid():
            from botocore.config import Config
            from litdata.streaming.downloader import get_downloader

            options: dict[str, Any] = {}
            if self.url.startswith("s3://"):
                retries = {"total_max_attempts": 3, "mode": "standard"}
                options["config"] = Config(connect_timeout=5, read_timeout=15, retries=retries)
            try:
                self._downloader = os.getpid(), get_downloader(self.url, str(self.folder), [], options)
            except ModuleNotFoundError as error:
                raise UsageError(
                    f"{self.url}: gs:// requires google-cloud-storage: pip install 'ropepp-lit[gs]'"
                ) from error
        return self._downloader[1]

    def _evict(self, keep: Path) -> None:
        """Delete chunks until the cache is within its maximum size; processes can still read open files after that."""
        chunks = []
        for path in self._cache.rglob("chunk-*.bin"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process has deleted it
                continue
            chunks.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in chunks)
        for _, size, path in sorted(chunks):
            if total <= self._max_bytes:
                return
            if path != keep:
                with suppress(OSError):  # a read-only cache
                    path.unlink(missing_ok=True)
                total -= size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_downloader": None}


def _write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file, which appears only when it is complete; multiple processes can do this concurrently."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            fill(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _is_store_error(error: Exception) -> bool:
    """Return whether the store or connection caused an error; clients raise ValueError for invalid endpoints."""
    return isinstance(error, ValueError) or type(error).__module__.split(".")[0] in {
        "boto3",
        "botocore",
        "s3transfer",
        "google",
        "requests",
        "urllib3",
    }
