"""The documents that a checkpoint's run held out, found again."""

from __future__ import annotations

from typing import Any

from ropepp_lit.data.comparison import HELD_OUT, compare
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError


def data_of_run(path: str, entry: dict[str, Any]) -> TokenData:
    """The data of the run that made a checkpoint, set up to read the documents that it held out.

    Args:
        path: The checkpoint, for messages.
        entry: Its entry `ropepp_lit`.

    Returns:
        The data. Its `notices` are to be printed.

    Raises:
        UsageError: the checkpoint does not store its recipe, or other documents are held out of its sources here, as
            where a relative path of the recipe names another folder.
    """
    if entry.get("recipe") is None:
        raise UsageError(f"text: {path} does not say what text was held out from it; name files by --text")
    try:
        data = TokenData(**entry["recipe"]["data"])
    except TypeError as error:
        raise UsageError(f"text: the data of the recipe that {path} stores cannot be read ({error})") from error
    data.continue_from(path, entry)
    data.setup("evaluate")
    sources, stored = ", ".join(data.weights), entry.get("held_out")
    if stored is None:
        data.notices.append(
            f"Note: {path} is of an earlier version and does not store what was held out from it; the documents that "
            f"are held out of {sources} here are used."
        )
    elif HELD_OUT in compare(entry, data.entry) or len(stored) != len(data.held_out):
        raise UsageError(
            f"text: the documents held out of {sources} here are not those of the run that made {path}; start the "
            "command in the folder where the run was started, or name files by --text"
        )
    return data
