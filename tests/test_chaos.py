"""Tests of tools/chaos.py: fault injection into commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end

TOOLS = Path(__file__).parent.parent / "tools"


def chaos(folder, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, TOOLS / "chaos.py", "--out", folder / "chaos", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, [json.loads(line) for line in (folder / "chaos/cases.jsonl").read_text().splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD and /proc")
def test_each_kind_of_fault(tmp_path):
    """Signals at file operations, and errors of the disk."""
    kinds = ["SIGKILL", "SIGTERM"]
    if shutil.which("cc"):
        kinds += ["full disk", "EIO"]
    printed, rows = chaos(tmp_path, jobs="train-async,prepare-part", kinds=",".join(kinds), cases=1, minutes=10)
    assert len(rows) == 2 * len(kinds)
    assert {row["verdict"] for row in rows} <= {"right", "late"}
    assert "0 lost, 0 wrong, 0 traceback, 0 hung" in printed


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("fault", "expected"),
    [("signal 9", "-9 10"), ("once 5", "2 10"), ("always 28", "2 10"), ("clock 90000", "0 20")],
)
def test_faults_occur_at_their_operation(tmp_path, fault, expected):
    """Twenty files are opened, written and renamed; the fault occurs at operation 31, when a file is opened."""
    library, folder = tmp_path / "faults.so", tmp_path / "files"
    folder.mkdir()
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, TOOLS / "faults.c", "-ldl"], check=True)
    code = (
        "import os, sys, time\nstarted = time.time()\n"
        "try:\n"
        "    for number in range(20):\n"
        "        with open(f'{number}.partial', 'w') as file:\n            file.write('text')\n"
        "        os.replace(f'{number}.partial', str(number))\n"
        "except OSError as error:\n    sys.exit(2)\n"
        "sys.exit(0 if time.time() - started > 80000 or 'clock' not in os.environ['CHAOS_FAULT'] else 3)\n"
    )
    variables = {"CHAOS_FOLDER": str(folder), "CHAOS_AT": "31", "CHAOS_FAULT": fault, "LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, **variables}, check=False)
    finished = [path for path in folder.iterdir() if path.suffix != ".partial"]
    assert f"{done.returncode} {len(finished)}" == expected
