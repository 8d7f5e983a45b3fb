"""Tests of `tools/run` on a project that installs in seconds without a network."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end

SCRIPT = Path(__file__).parent.parent / "tools" / "run"
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "small"
version = "{version}"
optional-dependencies = {{ dev = [] }}
"""
BACKEND = '''
"""Build backend that counts its builds in the file `builds`, and fails if the file `fail` exists."""
import os, time, tomllib, zipfile
from pathlib import Path

here = Path(__file__).parent


def build_editable(folder, config_settings=None, metadata_directory=None):
    with open(here / "builds", "a") as file:
        file.write("build\\n")
    assert not (here / "fail").exists(), "told to fail"
    version = tomllib.loads((here / "pyproject.toml").read_text())["project"]["version"]
    wheel, info = f"small-{version}-py3-none-any.whl", f"small-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\\nName: small\\nVersion: {version}\\nProvides-Extra: dev\\n"
    files = {
        "small.pth": f"{here}\\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: backend\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{info}/entry_points.txt": "[console_scripts]\\nsmall = small:main\\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(Path(folder) / wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel
'''
MODULE = 'def main():\n    import importlib.metadata, sys\n    print(importlib.metadata.version("small"), sys.prefix)\n'


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "a project"  # with a space
    (folder / "tools").mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "tools")
    write_project(folder, "1.0")
    (folder / "backend.py").write_text(BACKEND)
    (folder / "small.py").write_text(MODULE)
    return folder


def write_project(folder, version):
    (folder / "pyproject.toml").write_text(PROJECT.format(version=version))


def start(folder, *command, **environment):
    """Starts the script with a minimal environment: the system's PATH and no package index."""
    environment = {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PYTHON": sys.executable, **environment}
    return subprocess.Popen(
        [folder / "tools" / "run", *command], cwd=folder.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process, returncode=0):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == returncode, output + errors
    return output, errors


def builds(folder):
    return len((folder / "builds").read_text().splitlines())


def test_installs_once_and_after_changes_of_the_project(project):
    venv = project / ".venv"
    (project / "fail").touch()
    assert "told to fail" in finish(start(project, "small"), 1)[1]
    (project / "fail").unlink()
    # The next call completes the failed installation; two concurrent calls install once.
    for process in [start(project, "small") for _ in range(2)]:
        output, errors = finish(process)
        assert output == f"1.0 {venv}\n"
        assert errors.splitlines()[-1] == f"tools/run: environment: {venv}"
    assert builds(project) == 2
    before = time.perf_counter()
    output, errors = finish(start(project, "sh", "-c", 'pwd; echo "$VIRTUAL_ENV"; exit 7', PYTHON=""), 7)
    assert time.perf_counter() - before < 1
    assert output == f"{project.parent}\n{venv}\n"
    assert errors == f"tools/run: environment: {venv}\n"
    write_project(project, "1.1")
    assert finish(start(project, "small"))[0] == f"1.1 {venv}\n"
    assert builds(project) == 3
    # An environment does not work at another path, so it is created again.
    moved = project.rename(project.parent / "moved")
    assert finish(start(moved, "small"))[0] == f"1.1 {moved / '.venv'}\n"
    assert builds(moved) == 4


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHON": "/no/python"}, "PYTHON: /no/python is not a Python 3.11 to 3.13"),
        ({"PYTHON": "", "PATH": "{tools}"}, "no Python 3.11 to 3.13 with the modules venv and ensurepip"),
        ({"ROPEPP_LIT_VENV": "full"}, "/full is not a virtual environment; delete it or set ROPEPP_LIT_VENV"),
    ],
)
def test_mistakes(project, environment, message):
    tools = project.parent / "bin"  # a PATH that has no Python
    tools.mkdir()
    for name in ("bash", "env", "dirname", "head", "cat", "cmp"):
        (tools / name).symlink_to(shutil.which(name))
    (project.parent / "full").mkdir()
    (project.parent / "full" / "file").touch()
    environment = {key: value.format(tools=tools) for key, value in environment.items()}
    _, errors = finish(start(project, "small", **environment), 2)
    assert errors.startswith("tools/run: error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert (project.parent / "full" / "file").exists()
    assert not (project / ".venv").exists()
    assert "give a command" in finish(start(project), 2)[1]
