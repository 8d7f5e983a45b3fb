"""Preparations that are killed or run out of disk space: resumed, they write the same bytes as uninterrupted ones."""

import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from corpora import DOCUMENTS, contents, run, store

from ropepp_lit.data.prepare import PrepareSettings

KILLED = """
import os, signal, sys, pathlib
from ropepp_lit.data import prepare
from ropepp_lit.data import encoders, segment_writer, preparation as module
module.SEGMENT_BYTES, encoders.BATCH_BYTES, module.CUT_BYTES = 1500, 400, 3000
left = int(sys.argv[1])

def counting(function):
    def counted(*arguments, **keywords):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return counted

# Kill at any point where the state on disk changes.
os.replace = counting(os.replace)
segment_writer.SegmentWriter.add = counting(segment_writer.SegmentWriter.add)
segment_writer.checksum = counting(segment_writer.checksum)
module.shutil.rmtree = counting(module.shutil.rmtree)
pathlib.Path.rename = counting(pathlib.Path.rename)
pathlib.Path.unlink = counting(pathlib.Path.unlink)
settings = prepare.PrepareSettings(tokenizer="bytes", validation_fraction=0.2, dedup=True)
prepare.prepare([sys.argv[2]], settings, out=pathlib.Path(sys.argv[3]), show_progress=False)
print("left", left)
"""


@pytest.fixture(scope="module")
def kill_at(run_file, tmp_path_factory):
    """Function that prepares a source in a process that is killed at a step; returns the steps left if not reached."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "killed.py").write_text(KILLED)

    def kill_at(step, source, out, *, returncode=0):
        printed = run_file(folder / "killed.py", step, source, out, cwd=folder, returncode=returncode).stdout
        return int(printed.split()[-1]) if returncode == 0 else 0

    return kill_at


@pytest.fixture(scope="module")
def uninterrupted(kill_at, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    source = store(folder / "texts", "jsonl.zst", [*DOCUMENTS, *DOCUMENTS[:30]])
    left = kill_at(10_000, source, folder / "out")
    return source, contents(folder / "out"), 10_000 - left


def kill_and_resume(kill_at, uninterrupted, tmp_path, step):
    source, expected, _ = uninterrupted
    kill_at(step, source, tmp_path / "out", returncode=-signal.SIGKILL)
    kill_at(10_000, source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.3, 0.99])
def test_killed_and_resumed(kill_at, uninterrupted, tmp_path, fraction):
    kill_and_resume(kill_at, uninterrupted, tmp_path, round(fraction * uninterrupted[2]))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
def test_killed_at_any_step_and_resumed(kill_at, uninterrupted, tmp_path, number):
    kill_and_resume(kill_at, uninterrupted, tmp_path, random.Random(number).randrange(1, uninterrupted[2] + 1))


@pytest.mark.end_to_end
@pytest.mark.slow
def test_the_installed_command_is_killed_and_resumed(command_path, run_file, tmp_path):
    source = store(tmp_path / "texts", "jsonl", DOCUMENTS * 700)
    command = [command_path, "prepare", source, "--tokenizer", "bytes", "--chunk_size", "400KB", "--out"]
    process = subprocess.Popen([*command, tmp_path / "out"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".out.partial/writing/train/*/*.bin")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    printed = run_file(*command, tmp_path / "out", cwd=tmp_path).stdout
    run_file(*command, tmp_path / "complete", "--workers", "1", cwd=tmp_path)
    (tmp_path / "out/lengths.png").unlink()
    (tmp_path / "complete/lengths.png").unlink()
    assert contents(tmp_path / "out") == contents(tmp_path / "complete")
    assert "42,000" in printed
    assert "fraction of tokens" in printed
    verified = run_file(command_path, "prepare", "--verify", tmp_path / "out", cwd=tmp_path)
    assert "tokens are intact" in verified.stdout


@pytest.mark.end_to_end
def test_launcher_variables_have_no_effect(run, tmp_path, monkeypatch):
    """torchrun sets them on each rank, but one rank prepares the data; litdata would wait forever for the others."""
    source = store(tmp_path / "texts", "jsonl", DOCUMENTS)
    command = ["prepare", source, "--tokenizer", "bytes", "--out"]
    run(*command, "alone", cwd=tmp_path, timeout=60)
    for name, value in {"WORLD_SIZE": 4, "RANK": 1, "GLOBAL_RANK": 1, "LOCAL_RANK": 1, "NNODES": 2}.items():
        monkeypatch.setenv(name, str(value))
    run(*command, "launched", cwd=tmp_path, timeout=60)
    assert contents(tmp_path / "launched") == contents(tmp_path / "alone")


@pytest.mark.end_to_end
def test_no_space_left(tmp_path):
    source = store(tmp_path / "texts", "jsonl", DOCUMENTS * 200)
    code = (
        "import sys; from pathlib import Path; from ropepp_lit.data.prepare import PrepareSettings, prepare\n"
        "from ropepp_lit.errors import UsageError\n"
        "try: prepare([sys.argv[1]], PrepareSettings(tokenizer='bytes'), out=Path(sys.argv[2]), show_progress=False)\n"
        "except UsageError as error: sys.exit(str(error))\n"
    )
    limited = subprocess.run(
        [sys.executable, "-c", code, source, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
        ),
    )
    assert limited.returncode == 1
    assert "make room and run the same command again: finished segments are kept" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert not (tmp_path / "out").exists()
    manifest = run(source, tmp_path / "out", PrepareSettings(tokenizer="bytes"))
    assert manifest.splits["train"].documents == 200 * len(DOCUMENTS)
