"""Who imports whom: only downward, as .github/CONTRIBUTING.md says; and how long files are."""

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
"""From the top; a module imports what stands below its own layer. Packages of one layer do not import each other."""


def _part(module: str) -> str:
    """The package or module below `ropepp_lit`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _imports(path: Path) -> set[str]:
    """The parts of ropepp_lit that a file imports, at its head or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {_part(name.name) for name in node.names if name.name.split(".")[0] == "ropepp_lit"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ropepp_lit":
            names = [node.module] if node.module != "ropepp_lit" else [f"ropepp_lit.{name.name}" for name in node.names]
            found |= {_part(name) for name in names}
    return found & set.union(*LAYERS)


def test_files_are_short():
    """Of the package and of the tests: what is longer is split by what it is about."""
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
