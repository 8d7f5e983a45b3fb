"""Exceptions that the command prints in one line, and the system's error numbers for failed writes."""

import errno

DISK_ERRORS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room",  # a file beyond the largest size
    errno.EROFS: "make the file system writable",
    errno.EIO: "check the disk",
}
"""Remedies by the system's error number for a failed write."""


class UsageError(ValueError):
    """A user error, with a message of one line that names the key or file, the problem and the remedy.

    The command prints the line and exits with code 2. Any other exception is a bug and is printed with its traceback.
    """


class LostProcessError(UsageError):
    """Another process of a distributed run cannot be reached; every process that detects this prints the line.

    The command exits with code 1, so that a launcher can restart all processes.
    """
