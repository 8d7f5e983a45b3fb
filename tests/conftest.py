import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ropepp_lit.cli import main
from ropepp_lit.data.prepare import Settings, prepare_cached

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of text files."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(60):
        text = " ".join(f"word{(number * step) % 97}" for step in range(1, 40 + number))
        (folder / f"{number:02}.txt").write_text(f"Text {number}. {text}\n")
    return folder


@pytest.fixture(scope="session")
def tiny(texts, tmp_path_factory):
    """Options of `fit` and `validate` for a model of a few thousand parameters on a folder of text."""
    recipe = Path(__file__).parent / "train" / "tiny.yaml"
    cache = tmp_path_factory.mktemp("cache")
    settings = Settings(tokenizer="bytes", validation_fraction=0.2, on_error="skip")  # those of tiny.yaml
    prepare_cached(str(texts), settings, cache_dir=cache, show_progress=False)
    return ["--config", str(recipe), "--data.source", str(texts), "--data.cache_dir", str(cache)]


@pytest.fixture(scope="session")
def command_path():
    """The installed command of the environment that runs the tests."""
    return str(Path(sys.executable).parent / "ropepp-lit")


@pytest.fixture(scope="session")
def run(command_path):
    """Runs the installed command in a fresh process and a given folder; returns the finished process."""

    def run(*arguments, cwd, returncode=0, timeout=600):
        finished = subprocess.run(
            [command_path, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout
        )
        assert finished.returncode == returncode, finished.stdout + finished.stderr
        return finished

    return run


@pytest.fixture
def start_training():
    """Starts a command that trains into the folder `run`; returns its psutil.Popen once it has saved a checkpoint.

    It prints into the files `output` and `errors`: a pipe that nobody reads would fill and hold it up. What is still
    alive at the end of the test is killed, with its children.
    """
    started = []

    def start_training(*command, cwd):
        with (cwd / "output").open("w") as output, (cwd / "errors").open("w") as errors:
            process = psutil.Popen([str(word) for word in command], cwd=cwd, stdout=output, stderr=errors)
        started.append(process)
        last, deadline = cwd / "run/checkpoints/last.ckpt", time.monotonic() + 120
        while not last.exists():
            assert time.monotonic() < deadline, "no checkpoint in two minutes"
            assert process.poll() is None, (cwd / "errors").read_text()
            time.sleep(0.02)
        return process

    yield start_training
    for process in started:
        if process.poll() is None:
            for rank in [*process.children(recursive=True), process]:
                rank.kill()
        process.wait()


@pytest.fixture
def mistake(tiny, tmp_path, monkeypatch, capsys):
    """Runs a subcommand in this process and the test's folder; returns the one line that tells the mistake."""

    def mistake(*options, subcommand="fit", base=None):
        base = base if base is not None else tiny if subcommand in ("fit", "validate", "plan") else []
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()  # what the test itself printed
        with pytest.raises(SystemExit) as stop:
            main([subcommand, *base, *map(str, options)])
        assert stop.value.code == 2
        assert sorted(tmp_path.rglob("*")) == before
        errors = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
        assert len(errors) == 1, errors
        assert errors[0].startswith("ropepp-lit: error: ")
        return errors[0]

    return mistake
