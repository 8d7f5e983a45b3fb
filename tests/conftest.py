import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import hypothesis
import psutil
import pytest

from ropepp_lit.cli import main

# Of tests of properties: the same examples each time; as many others as find rare faults by --hypothesis-profile=long.
SHARED = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("suite", max_examples=200, derandomize=True, **SHARED)
hypothesis.settings.register_profile("long", max_examples=10_000, print_blob=True, **SHARED)
hypothesis.settings.load_profile("suite")

# For PyTorch, which nothing has imported yet, here and in the processes that tests start: the models are tiny, and the
# tests run in parallel.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_xdist_auto_num_workers(config):
    """Processes that run the tests: one per core, four at most; none beside pytest's own for a single file."""
    if len(config.args) == 1 and Path(config.args[0].split("::")[0]).is_file():
        return 0
    return min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(items):
    """Files that start processes come first, so that no long one begins when the others are done."""
    long = {item.path for item in items if item.get_closest_marker("end_to_end")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def environment():
    """Each test leaves the environment as it was: Lightning sets LOCAL_RANK and others where it starts ranks.

    `fit` has the CPU take numbers near 1e-40 for 0, which hypothesis refuses to work with.
    """
    with mock.patch.dict(os.environ):
        yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


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
    from ropepp_lit.data.prepare import PrepareSettings, prepare_cached  # imports PyTorch

    recipe = Path(__file__).parent / "train" / "tiny.yaml"
    cache = tmp_path_factory.mktemp("cache")
    settings = PrepareSettings(tokenizer="bytes", validation_fraction=0.2)  # those of tiny.yaml
    prepare_cached(str(texts), settings, cache_dir=cache, show_progress=False)
    return ["--config", str(recipe), "--data.source", str(texts), "--data.cache_dir", str(cache)]


@pytest.fixture(scope="session")
def command_path():
    """The installed command of the environment that runs the tests."""
    return str(Path(sys.executable).parent / "ropepp-lit")


@pytest.fixture(scope="session")
def free_port():
    """Returns a free TCP port for the processes of a distributed run to meet at.

    The same UDP port stays bound until the tests end: it keeps every other test process on this machine from choosing
    the port before the run listens on it.
    """
    guards = []

    def free_port():
        while True:
            port = random.SystemRandom().randrange(10_000, 32_000)  # below the ports that systems assign
            guard = socket.socket(type=socket.SOCK_DGRAM)
            with socket.socket() as client, contextlib.suppress(OSError):  # the guard of another process
                guard.bind(("127.0.0.1", port))
                guards.append(guard)
                if client.connect_ex(("127.0.0.1", port)) != 0:
                    return port

    yield free_port
    for guard in guards:
        guard.close()


@pytest.fixture(scope="session")
def command_server():
    """The process of tools/command_server.py."""
    command = [sys.executable, Path(__file__).parents[1] / "tools" / "command_server.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server


@pytest.fixture(scope="session")
def run_file(command_server, free_port, tmp_path_factory):
    """Runs a Python file in a process of its own and a given folder; returns the finished process."""
    output, errors = (tmp_path_factory.mktemp("run") / name for name in ("output", "errors"))

    def run_file(*command, cwd, returncode=0, timeout=600):
        command = [str(word) for word in command]
        environment = {**os.environ, "MASTER_PORT": str(free_port())}
        job = {"command": command, "cwd": str(cwd), "environment": environment}
        print(json.dumps({**job, "output": str(output), "errors": str(errors)}), file=command_server.stdin, flush=True)
        timer = threading.Timer(timeout, os.kill, [int(command_server.stdout.readline()), signal.SIGKILL])
        timer.start()
        code = int(command_server.stdout.readline())
        timer.cancel()
        finished = subprocess.CompletedProcess(command, code, output.read_text(), errors.read_text())
        assert finished.returncode == returncode, finished.stdout + finished.stderr
        return finished

    return run_file


@pytest.fixture(scope="session")
def run(run_file, command_path):
    """Runs the installed command in a process of its own and a given folder; returns the finished process."""
    return functools.partial(run_file, command_path)


@pytest.fixture
def start_training(free_port):
    """Starts a command that trains into the folder `run`; returns its psutil.Popen once it has saved a checkpoint.

    It prints into the files `output` and `errors`: a pipe that nobody reads would fill and hold it up. What is still
    alive at the end of the test is killed, with its children.
    """
    started = []

    def start_training(*command, cwd):
        with (cwd / "output").open("w") as output, (cwd / "errors").open("w") as errors:
            process = psutil.Popen(
                [str(word) for word in command], cwd=cwd, stdout=output, stderr=errors,
                env={**os.environ, "MASTER_PORT": str(free_port())},
            )  # fmt: skip
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
