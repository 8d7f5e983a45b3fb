"""Files and folders that appear under their name only when they are complete, and names that stay in their folder."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ropepp_lit.errors import UsageError, did_you_mean

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What flock answers on file systems that have no locks."""

_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS, errno.EBADF}
"""What fsync answers on file systems or for folders that have no such operation."""


def inside(folder: Path, name: Any, *, source: str | Path | None = None, for_writing: bool = False) -> Path:
    """The path of a file whose name comes from a manifest, an index or a store.

    Args:
        folder: Folder that the name may not leave.
        name: Relative path of the file, with forward slashes.
        source: File that contains the name, for the message; empty means the folder.
        for_writing: Refuse symbolic links that lead out of the folder too. Files are read through links, since
            Hugging Face's cache and users keep large files behind them.

    Raises:
        UsageError: the name is not a relative path, or leads out of the folder.
    """
    where = source if source is not None else folder
    if not isinstance(name, str) or not _is_relative(name):
        raise UsageError(f"{where}: {name!r} is not a file name inside its folder; get the files from elsewhere")
    path = folder / name
    if for_writing and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UsageError(f"{path}: a symbolic link leads out of {folder}; remove the link")
    return path


def _is_relative(name: str) -> bool:
    """Whether a name is a path below a folder, on every operating system."""
    if "\0" in name or "\\" in name or re.match("[A-Za-z]:", name):
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def escaped(text: str) -> str:
    r"""A text that UTF-8 can encode: a byte of a file name that is not UTF-8 becomes `\xff`, as in messages."""
    return re.sub(
        "[\ud800-\udfff]",
        lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}" if "\udc80" <= match[0] <= "\udcff" else ascii(match[0])[1:-1],
        text,
    )


def local_path(key: str, value: str) -> str:
    """A file or folder on this machine that a user names.

    Args:
        key: What the user calls it, for messages.
        value: Its path.

    Returns:
        The path, absolute where it is given by dots alone, such as `.`.

    Raises:
        UsageError: it is a URL, the root folder or empty.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|(hf|file):", value):
        raise UsageError(f"{key}: {value} is a URL; name a file or folder on this machine")
    if not value or "\0" in value:
        raise UsageError(f"{key}: {value!r} is not a path; name a file or folder")
    if not Path(os.path.abspath(value)).name:
        raise UsageError(f"{key}: {value} is the root of all folders; name a folder inside it")
    return os.path.abspath(value) if Path(value).name in ("", "..") else value


def nearest_file(path: Path) -> str:
    """Name the file or folder whose name is nearest to one that does not exist, as the end of a message."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ""
    return did_you_mean(path.name, names)


def check_new_folder(path: Path) -> None:
    """Raise where a folder that is to appear whole cannot take the name.

    Raises:
        UsageError: there is something of that name that is not an empty folder, or it is the current folder.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"out: {path}: already exists and is not a folder; name another one")
    if path.exists() and any(path.iterdir()):
        raise UsageError(f"out: {path} is not empty; name an empty or a new folder")
    if path.exists() and path.samefile(os.curdir):
        raise UsageError(f"out: {path} is the current folder; name a folder inside it")


def read_text(path: Path) -> str:
    """Read a file of UTF-8 text.

    Raises:
        OSError: it cannot be read, or is no regular file: a named pipe would wait for ever.
        UnicodeDecodeError: it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return path.read_text(encoding="utf-8")


def write_whole(path: Path, contents: str | bytes) -> None:
    """Write a file, text as UTF-8, that appears under its name only when it is complete."""
    with whole_file(path) as partial:
        partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Make a file that appears under its name only when the block ends without an error.

    Args:
        path: The file; one of that name is replaced.

    Yields:
        A file beside it, to be written and closed. It is renamed at the end, or deleted after an error.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Make a folder that appears under its name only when the block ends without an error.

    Args:
        path: Folder that does not exist, or an empty one.

    Yields:
        A folder beside it, to be filled. It is renamed at the end, or deleted after an error.

    Raises:
        UsageError: see :func:`check_new_folder`; or the folder cannot be written.
    """
    path = Path(os.path.abspath(path))
    check_new_folder(path)
    partial = path.with_name(f".{path.name}.partial")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for file in partial.rglob("*"):
                flush(file)
                if file.is_file():  # safetensors lets nobody else read its files
                    with suppress(OSError):  # file systems without permissions
                        file.chmod(partial.stat().st_mode & 0o666)
            os.replace(partial, path)
            flush(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Report that a file or folder cannot be written, for example because the disk is full, in one line.

    Args:
        path: What the block writes, for the message.

    Raises:
        UsageError: instead of an OSError, or of an error of torch or safetensors that one caused.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise UsageError(f"{path}: cannot be written: {reason}") from error


def write_failure(error: BaseException) -> str | None:
    """Why the operating system refused to write, in a few words; None where an error has another cause."""
    found = system_error(error)
    return None if found is None else found.strerror or str(found)


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error that an error is, or was caused by; None where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and "requested and" in str(seen):  # NumPy's, without a number
            return OSError(errno.ENOSPC, "not all bytes were taken, perhaps because the disk is full")
        if isinstance(seen, OSError):
            return seen
        # safetensors passes the system's error on as text. torch's archive writer fails again when it closes a file
        # that it could not write; the cause is the error before, which a thread or another rank does not pass on.
        if match := re.search(r"\(os error (\d+)\)", str(seen)):
            return OSError(int(match[1]), os.strerror(int(match[1])))
        if "inline_container" in str(seen) and seen.__context__ is None:
            return OSError(errno.ENOSPC, "the archive cannot be written, perhaps because the disk is full")
        seen = seen.__context__
    return None


def sync(descriptor: int) -> None:
    """Fsync an open file; goes on where the file system has no such operation.

    Raises:
        OSError: the file cannot be written to the disk.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def flush(path: Path) -> None:
    """Fsync a file or folder by its name, where the file system has such an operation.

    Raises:
        OSError: what was written cannot be kept.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder, on Windows
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes that lock the same file waiting until the block ends.

    Where the file system has no locks a file beside it marks that the block runs. Where nothing can be written no lock
    is taken: what is complete can be read, and whatever would be written fails by itself.

    Args:
        path: The lock's file, in an existing folder.
    """
    from filelock import FileLock, SoftFileLock

    try:
        lock = FileLock(path) if has_locks(path) else SoftFileLock(path.with_name(f"{path.name}.held"))
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        yield
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def held(path: Path, *, busy: str) -> Iterator[bool]:
    """Keep a lock until the block ends; the system releases it when the process ends, even by a kill.

    Where nothing can be written no lock is taken: whatever the block writes fails by itself.

    Args:
        path: The lock's file, which stays; its folder is created.
        busy: What to say where another process has the lock.

    Yields:
        Whether the file system has locks; without any, nothing is locked.

    Raises:
        UsageError: another process has the lock.
    """
    from filelock import FileLock, Timeout

    lock, locks = FileLock(path), True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        locks = has_locks(path)
        if locks:
            lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(busy) from error
    except OSError:
        pass
    try:
        yield locks
    finally:
        lock.release()


def has_locks(path: Path) -> bool:
    """Whether a file can be locked, which is made where it is missing.

    filelock's own way out of it may delete the mark of another process.
    """
    try:
        import fcntl
    except ImportError:  # Windows has locks of another kind
        return True
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _NO_LOCKS
    finally:
        os.close(descriptor)
    return True


LFS_POINTER = b"version https://git-lfs"
"""How the small file begins that git-lfs leaves in place of a large one."""


def refuse_pointer(path: Path, content: bytes | None = None) -> None:
    """Raise UsageError where a file is git-lfs's pointer to the real one.

    Args:
        path: Of the file; one that cannot be read is none.
        content: How it begins, where that is known.
    """
    if content is None:
        if not path.is_file():  # a named pipe would wait for ever
            return
        try:
            with path.open("rb") as file:
                content = file.read(len(LFS_POINTER))
        except OSError:
            return
    if content.startswith(LFS_POINTER):
        raise UsageError(f"{path}: a git-lfs pointer, not the file; run `git lfs pull` in {path.parent}")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's SHA-256, or of those of all files of a folder and their names, in hexadecimal digits."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        digest.update(bytes.fromhex(checksum(file)))
    return digest.hexdigest()
