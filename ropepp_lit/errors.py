"""The one error that means: the user can mend this."""


class UsageError(ValueError):
    """A user's mistake, told in one line that names the key or file and the remedy.

    The command prints the line and exits with code 2. Every other exception is a bug and keeps its traceback.
    """
