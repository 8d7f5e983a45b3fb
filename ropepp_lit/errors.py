"""Errors that are told in one line, and what the system answers when a disk cannot be written."""

import errno

DISK_ERRORS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room",  # a file beyond the largest size
    errno.EROFS: "make the file system writable",
    errno.EIO: "check the disk",
}
"""What the system answers when a disk cannot be written, by number, and what to do."""


class UsageError(ValueError):
    """A user's mistake, told in one line that names the key or file and the remedy.

    The command prints the line and exits with code 2. Every other exception is a bug and keeps its traceback.
    """


class LostProcessError(UsageError):
    """Another process of a distributed run cannot be reached any more; every process that notices it prints the line.

    The command exits with code 1, so that a launcher may start all of them again.
    """


EXIT_CODES = """exit codes:
  0    success
  1    another process of a distributed run was lost; doctor: something is broken; with a traceback: a bug
  2    a mistake of the user, reported in one line
  124  the watchdog ended a run that made no progress
  130  interrupted by Ctrl-C
  138  a run was stopped by SIGUSR1, and saved a checkpoint
  143  a run was stopped by SIGTERM, and saved a checkpoint
  141  nobody reads the output any more, of a command that only prints
"""
"""End of every `--help`."""
