"""The Python API: its names, and the examples of ropepp_lit/README.md as they are written there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import ropepp_lit
from ropepp_lit.checkpoint import write_checkpoint

PACKAGE = Path(ropepp_lit.__file__).parent
README = (PACKAGE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_names_are_the_same_for_type_checkers_and_at_run_time():
    (typed,) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    for_type_checkers = [(name.name, node.module) for node in typed.body for name in node.names]
    assert sorted(name for name, _ in for_type_checkers) == sorted(ropepp_lit.__all__)
    lazy = [(name, f"ropepp_lit.{module}") for module, names in ropepp_lit._MODULES.items() for name in names]
    assert sorted(lazy) == sorted(for_type_checkers)
    for name, module in lazy:
        assert getattr(ropepp_lit, name) is getattr(sys.modules[module], name)
        assert re.search(rf"\b{name}\b", README), name
    assert set(ropepp_lit.__all__) <= set(dir(ropepp_lit))
    assert not hasattr(ropepp_lit, "nothing")
    assert (PACKAGE / "py.typed").is_file()


def test_importing_the_package_imports_no_library():
    code = "import ropepp_lit, sys; print(*sorted({'torch', 'lightning', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"


def test_the_40_lines_are_those_of_the_package():
    (method,) = [code for language, code in BLOCKS if language == "py"]
    assert f"\n\n{method}\n" in (PACKAGE / "nn" / "positions.py").read_text(encoding="utf-8")
    assert len(method.splitlines()) <= 40


def test_examples_print_what_the_document_shows(texts, tmp_path, monkeypatch, capsys):
    """On another model and other text: numbers, and the text that a model generates, are not compared."""
    import small_checkpoints

    write_checkpoint(tmp_path / "rope.ckpt", small_checkpoints.make())
    (tmp_path / "texts").symlink_to(texts)
    monkeypatch.chdir(tmp_path)
    names, shown = {}, []
    for language, code in [block for block in BLOCKS if block[0] in ("python", "text")]:
        if language == "python":
            capsys.readouterr()
            exec(compile(code, "README.md", "exec"), names)
            printed = [_without_numbers(line) for line in capsys.readouterr().out.splitlines()]
            continue
        shown.append(code)
        lines = [_without_numbers(line) for line in code.splitlines()]
        if "…" in lines:
            assert [line for line in lines if line != "…" and line not in printed] == []
        else:
            assert lines == printed
    assert len(shown) == 7


def _without_numbers(line: str) -> str:
    return "text" if line.startswith(("'", '"')) else re.sub(r"\d[\d.,e+-]*", "0", line)
