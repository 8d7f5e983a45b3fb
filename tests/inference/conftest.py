import os
import signal
import subprocess
from types import SimpleNamespace

import psutil
import pytest
from others import make_folder


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """Checkpoint of a model with a chat template and a context of 512 tokens."""
    return make_folder("chat", tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Checkpoint of a model without a chat template, with byte fallback in its tokenizer."""
    return make_folder("llama2", tmp_path_factory.mktemp("models") / "llama2", max_position_embeddings=96)


@pytest.fixture(scope="module")
def start_server(command_path, free_port, tmp_path_factory):
    """Function that starts a server and returns process, port and output; all processes are terminated."""
    started = []

    def start_server(*words, env=None):
        port, folder = free_port(), tmp_path_factory.mktemp("serve")
        with (folder / "errors").open("w") as errors:
            process = psutil.Popen(
                [command_path, "serve", *map(str, words), "--port", str(port)], cwd=folder, text=True,
                stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **(env or {})},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip
        lines = [process.stdout.readline(), process.stdout.readline()]
        family = [process, *process.children(recursive=True)]
        started.append(family)
        return SimpleNamespace(port=port, process=process, lines=lines, family=family, folder=folder)

    yield start_server
    for family in started:
        for process in family:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
        family[0].wait()
