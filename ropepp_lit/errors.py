"""Exceptions that the command prints in one line, exit codes, and the system's error numbers for failed writes."""

import difflib
import errno
from collections.abc import Iterable

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


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Name the choice nearest to a word that is none of them.

    Returns:
        The end of a message, such as `; did you mean temperature?`; empty where no choice is near.
    """
    nearest = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.7)
    return f"; did you mean {nearest[0]}?" if nearest else ""


EXIT_CODES = """exit codes:
  0    success
  1    another process of a distributed run was lost; doctor: something is broken; with a traceback: a bug
  2    a mistake of the user, reported in one line
  124  the watchdog ended a run that made no progress
  130  interrupted by Ctrl-C; during training, a checkpoint was saved
  138  stopped by SIGUSR1; during training, a checkpoint was saved
  141  the reader of the output closed the pipe
  143  stopped by SIGTERM; during training, a checkpoint was saved
"""
"""Text at the end of every `--help`."""
