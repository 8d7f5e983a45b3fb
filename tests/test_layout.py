"""Import layers, as described in .github/CONTRIBUTING.md, and the length of files."""

import ast
from pathlib import Path

import ropepp_lit

ROOT = Path(ropepp_lit.__file__).parent

LAYERS = (
    {"__main__"},
    {"cli"},
    {"commands"},
    {"train"},
    {"eval"},
    {"inference"},
    {"data", "hf"},
    {"text"},
    {"checkpoint"},
    {"sharded", "checkpoint_values"},
    {"nn"},
    {"arguments"},
    {"json_files"},
    {"files", "malicious", "sizes", "terminal"},
    {"errors"},
)
"""Layers from the top; a module imports only from layers below its own, not from other packages of its layer."""


def _part(module: str) -> str:
    """Return the package or module below `ropepp_lit`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _imports(path: Path) -> set[str]:
    """Return the parts of ropepp_lit that a file imports, at module level or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {_part(name.name) for name in node.names if name.name.split(".")[0] == "ropepp_lit"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ropepp_lit":
            names = [node.module] if node.module != "ropepp_lit" else [f"ropepp_lit.{name.name}" for name in node.names]
            found |= {_part(name) for name in names}
    return found & set.union(*LAYERS)


def test_files_are_short():
    """Files of the package and of the tests have at most 400 lines."""
    files = [*ROOT.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    assert len(files) > 150
    assert not [str(path) for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400]


def test_imports_run_downward():
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for other in _imports(path) - {part}:
            if level[other] <= level[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong
