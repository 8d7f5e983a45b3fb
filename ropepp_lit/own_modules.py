"""Import of the user's modules from the current folder."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType
from typing import Any

_IMPORTERS = {"__main__", "jsonargparse._util", "ropepp_lit.checkpoint"}
"""Modules that import the classes given in a recipe or an option."""


class CurrentFolder:
    """Finder of modules in the current folder, last on `sys.meta_path`: those given in a recipe, and their imports.

    The folder is not on `sys.path`: libraries search it for optional packages, such as `flash_attn`, and would execute
    a file of that name.
    """

    def __init__(self) -> None:
        self._own: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of a module in the current folder (protocol of `sys.meta_path`)."""
        if path is not None or not self._is_allowed(sys._getframe(1)):
            return None
        spec = PathFinder.find_spec(name, [os.getcwd()])
        if spec is not None:
            self._own.add(name)
        return spec

    def _is_allowed(self, frame: FrameType | None) -> bool:
        """Return whether the importing module, the first frame outside importlib, may import from the folder."""
        while frame is not None:
            name = frame.f_globals.get("__name__") or ""
            if not name.startswith(("importlib", "_frozen_importlib")):
                return name in _IMPORTERS or name.partition(".")[0] in self._own
            frame = frame.f_back
        return False


def leave_current_folder() -> None:
    """Remove the current folder from `sys.path`, in a process of the command."""
    current = os.getcwd()
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != current]


def find_in_current_folder() -> None:
    """Enable imports of the user's modules from the current folder, even if it is not on `sys.path`."""
    if not any(isinstance(finder, CurrentFolder) for finder in sys.meta_path):
        sys.meta_path.append(CurrentFolder())
