"""Restore the data of the run that created a checkpoint, to read its held-out documents."""

from __future__ import annotations

from typing import Any

from ropepp_lit.data.comparison import HELD_OUT, compare
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError


def data_of_run(path: str, entry: dict[str, Any]) -> TokenData:
    """Set up the data of the run that created a checkpoint, to read its held-out documents.

    Args:
        path: Path of the checkpoint, for messages.
        entry: Entry `ropepp_lit` of the checkpoint.

    Returns:
        The data. The caller prints its `notices`.

    Raises:
        UsageError: The checkpoint does not store its recipe, or the documents held out of its sources differ, for
            example because a relative path of the recipe refers to another folder.
    """
    if entry.get("recipe") is None:
        raise UsageError(f"text: {path} does not store which text was held out; pass files by --text")
    try:
        data = TokenData(**entry["recipe"]["data"])
    except TypeError as error:
        raise UsageError(f"text: the data of the recipe that {path} stores cannot be read ({error})") from error
    data.continue_from(path, entry)
    data.setup("evaluate")
    sources, stored = ", ".join(data.weights), entry.get("held_out")
    if stored is None:
        data.notices.append(
            f"Note: {path} is of an earlier version and does not store its held-out documents; those that are held out "
            f"of {sources} here are used."
        )
    elif HELD_OUT in compare(entry, data.entry) or len(stored) != len(data.held_out):
        raise UsageError(
            f"text: the documents held out of {sources} here differ from those of the run that created {path}; run the "
            "command in the folder where the run was started, or pass files by --text"
        )
    return data
