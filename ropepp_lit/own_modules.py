"""Modules of the user's own, in the current folder."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType
from typing import Any

_IMPORTERS = {"__main__", "jsonargparse._util", "ropepp_lit.checkpoint"}
"""Modules that import the classes that a recipe or an option names."""


class CurrentFolder:
    """Finds modules in the current folder, behind all others: those that a recipe names, and what they import.

    The folder is not on `sys.path`: libraries look there for others that may be installed, such as `flash_attn`, and
    would run a file of that name.
    """

    def __init__(self) -> None:
        self._own: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As importlib asks finders of `sys.meta_path`."""
        if path is not None or not self._is_asked(sys._getframe(1)):
            return None
        spec = PathFinder.find_spec(name, [os.getcwd()])
        if spec is not None:
            self._own.add(name)
        return spec

    def _is_asked(self, frame: FrameType | None) -> bool:
        """Whether the module that imports, the first below importlib's, is one that may."""
        while frame is not None:
            name = frame.f_globals.get("__name__") or ""
            if not name.startswith(("importlib", "_frozen_importlib")):
                return name in _IMPORTERS or name.partition(".")[0] in self._own
            frame = frame.f_back
        return False


def leave_current_folder() -> None:
    """Take the current folder off `sys.path`, for a process that is the command's."""
    current = os.getcwd()
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != current]


def find_in_current_folder() -> None:
    """Find the user's own modules in the current folder, also where it is not on `sys.path`."""
    if not any(isinstance(finder, CurrentFolder) for finder in sys.meta_path):
        sys.meta_path.append(CurrentFolder())
