"""Unusual environments: encodings, closed pipes, files named like libraries, full disks, missing Unix functions."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ropepp_lit

ROOT = Path(ropepp_lit.__file__).parents[1]


def start(*command, cwd, environment=None, **options):
    """Run a new process; `environment` overrides variables of this one."""
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, timeout=300, check=False,
        env={**os.environ, **(environment or {})}, **options,
    )  # fmt: skip


HOSTILE = (
    "yaml", "torch", "json", "numpy", "lightning", "typing", "re", "pickle", "socket", "matplotlib", "tqdm",
    "flash_attn", "backports", "zstandard", "librosa",
)  # fmt: skip
"""Names of libraries; the last ones are submodules, or optional dependencies that are not installed."""


@pytest.fixture
def hostile(tmp_path):
    """Folder of files named like libraries, each of which creates a file when it is imported."""
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r} + '-{name}', 'w')\n")
    return tmp_path


SCHEME = """
from ropepp_lit.nn import RoPE
import offsets

class Shifted(RoPE):
    def __init__(self, *, offset: int = offsets.FIVE) -> None:
        self.offset = offset

    def tables(self, positions, frequencies, *, head_dim, dtype):
        return super().tables(positions + self.offset, frequencies, head_dim=head_dim, dtype=dtype)
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "start_by", ["module", *(pytest.param(way, marks=pytest.mark.slow) for way in ("command", "PYTHONPATH"))]
)
def test_the_current_folder_never_shadows_a_library(hostile, command_path, tiny, free_port, start_by):
    """Also in processes started by Lightning and by the data loader; the user's scheme is still found."""
    (hostile / "schemes.py").write_text(SCHEME)
    (hostile / "offsets.py").write_text("FIVE = 5")
    command = [sys.executable, "-m", "ropepp_lit"] if start_by == "module" else [command_path]
    path = os.environ.get("PYTHONPATH", "")
    environment = {"MASTER_PORT": str(free_port())}
    if start_by == "PYTHONPATH":
        for name in ("re", "typing"):  # Python imports these before our code
            (hostile / f"{name}.py").unlink()
        # Result of `export PYTHONPATH=$PYTHONPATH:FOLDER` with empty parts.
        environment["PYTHONPATH"] = f"{path or ROOT}:"
    options = ["--trainer.max_steps", 1, "--model.positions", "schemes.Shifted", "--data.num_workers", 1]
    if start_by != "PYTHONPATH":
        options += ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    finished = start(*command, "fit", *tiny, *options, cwd=hostile, environment=environment)
    assert finished.returncode == 0, finished.stderr.decode()
    assert not list(hostile.glob("RAN*"))


@pytest.mark.end_to_end
def test_user_modules_are_found_after_libraries(hostile, command_path):
    code = "import sys; from ropepp_lit import cli; cli._run(['--version']); cli._run(['trian'])"
    finished = start(sys.executable, "-P", "-c", code, cwd=hostile)
    assert b"no subcommand" in finished.stderr
    assert not list(hostile.glob("RAN*"))


@pytest.fixture(scope="module")
def odd_texts(tmp_path_factory):
    """Folder with a document, and a binary file whose name is not UTF-8."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "a.txt").write_text("text " * 1000)
    (folder / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"\xff broken")
    return folder


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "encoding",
    ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cp1252", "latin-1:strict", "utf-8"))],
)
def test_reports_in_any_encoding(command_path, tmp_path, odd_texts, encoding):
    """Report with bars, arrows and the name of a binary file."""
    options = ["--tokenizer", "bytes", "--on_error", "skip", "--out", "shards"]
    finished = start(
        command_path, "prepare", odd_texts, *options, cwd=tmp_path, environment={"PYTHONIOENCODING": encoding}
    )
    assert finished.returncode == 0, finished.stderr.decode(errors="replace")
    assert b"Next: ropepp-lit prepare --verify shards" in finished.stdout
    assert b"caf\\xe9.txt: not UTF-8" in finished.stdout
    bar = "█".encode() if encoding == "utf-8" else b"#"
    assert bar * 5 in finished.stdout
    # error messages too
    finished = start(
        command_path, "generate", os.fsdecode(b"caf\xe9.txt"), cwd=odd_texts, environment={"PYTHONIOENCODING": encoding}
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(b"ropepp-lit: error: caf\\xe9.txt: not a readable checkpoint")


def piped(command, reader, cwd, variables=""):
    """Run a command piped to a reader; returns its exit code, the reader's output and the errors."""
    line = " ".join(f"'{word}'" for word in command)
    finished = start("bash", "-c", f"{variables} {line} 2>errors | {reader}; echo ${{PIPESTATUS[0]}} >code", cwd=cwd)
    return int((cwd / "code").read_text()), finished.stdout.decode(), (cwd / "errors").read_text()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("ends", [False, True])
def test_printing_to_a_closed_pipe(tmp_path, ends, unbuffered):
    code = f"""
        import sys, time
        from ropepp_lit.terminal import prepare_streams
        prepare_streams(ends_with_reader={ends})
        for number in range(20):
            print(number, flush=True)
            time.sleep(0.05)
        open("done", "w")
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    variables = f"PYTHONPATH='{ROOT}' PYTHONUNBUFFERED={unbuffered}"
    code, printed, errors = piped([sys.executable, str(script)], "head -1", tmp_path, variables)
    assert (code, printed, errors) == (141 if ends else 0, "0\n", "")
    assert (tmp_path / "done").exists() != ends


@pytest.mark.end_to_end
def test_training_continues_after_the_pipe_is_closed(command_path, tiny, tmp_path):
    command = [command_path, "fit", *tiny, "--trainer.max_steps", "6", "--trainer.default_root_dir", "run"]
    code, printed, errors = piped(command, "head -1", tmp_path)
    assert code == 0, errors
    assert len(printed.splitlines()) == 1
    assert (tmp_path / "run/checkpoints/step=6.ckpt").exists()
    assert "Traceback" not in errors
    generate = [command_path, "generate", "run/checkpoints/last.ckpt", "--max_new_tokens", "100000"]
    generate += ["--context_length", "100000"]
    code, _, errors = piped(generate, "head -c 1", tmp_path)
    assert (code, errors) == (141, "")
    code, _, errors = piped([command_path, "--help"], "true", tmp_path)
    assert (code in (0, 141), errors) == (True, "")


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("<&-", ">&-", "2>&-")), "<&- >&- 2>&-"]
)
def test_closed_streams(command_path, texts, tmp_path, closed):
    line = f"'{command_path}' prepare '{texts}' --tokenizer bytes --out shards {closed}"
    finished = start("bash", "-c", line, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr.decode()
    assert (tmp_path / "shards/manifest.json").is_file()


def test_a_current_folder_that_was_deleted(command_path, tmp_path):
    finished = start("bash", "-c", f"mkdir gone && cd gone && rmdir ../gone && '{command_path}' --help", cwd=tmp_path)
    assert finished.returncode == 2
    line = finished.stderr.decode().strip().splitlines()[-1]
    assert line == "ropepp-lit: error: the current folder does not exist any more; change to another one"


MISSING = """
import importlib, os, pkgutil, signal, sys
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
    delattr(signal, name)
for name in ("sysconf", "fork", "getuid"):
    delattr(os, name)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "pwd", "grp", "termios"):
            raise ImportError(name)

import lightning.pytorch.cli, litdata, transformers, torch.utils.tensorboard, datasets, filelock, tqdm
for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Finder())
import ropepp_lit
for module in pkgutil.walk_packages(ropepp_lit.__path__, "ropepp_lit."):
    if module.name not in ("ropepp_lit.__main__", "ropepp_lit.eval.harness", "ropepp_lit.hf.modeling_ropepp"):
        importlib.import_module(module.name)
from ropepp_lit.train.signals import SIGNALS
assert SIGNALS == (signal.SIGTERM, signal.SIGINT), SIGNALS
print("imported")
"""


@pytest.mark.end_to_end
def test_modules_are_imported_without_unix_functions(run_file, tmp_path):
    (tmp_path / "missing.py").write_text(MISSING)
    assert run_file(tmp_path / "missing.py", cwd=tmp_path).stdout == "imported\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny, run):
    """Folder with a trained checkpoint with plain RoPE, and its export."""
    folder = tmp_path_factory.mktemp("models")
    options = [*tiny, "--model.positions", "RoPE", "--trainer.max_steps", 1, "--trainer.default_root_dir", "run"]
    run("fit", *options, cwd=folder)
    run("export", "run/checkpoints/last.ckpt", "hf", "--check", "false", cwd=folder)
    return folder


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("kilobytes", "command"),
    [
        (8, ["import", "MODELS/hf", "new.ckpt"]),
        (8, ["upcycle", "MODELS/run/checkpoints/last.ckpt", "new.ckpt", "--variant", "ec"]),
        (8, ["export", "MODELS/run/checkpoints/last.ckpt", "new", "--check", "false"]),
        (8, ["figures", "--out", "new", "--context_length", "64"]),
        (1, ["prepare", "TEXTS", "--tokenizer", "bytes", "--out", "new"]),
        (8, ["fit", "TINY", "--trainer.max_steps", "2", "--trainer.default_root_dir", "new"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_full_disk(command_path, models, texts, tiny, tmp_path, kilobytes, command):
    """Writes beyond a file size fail: a one-line error, and no incomplete file remains."""
    arguments = {"TINY": tiny, "TEXTS": [str(texts)]}
    expanded = [word for name in command for word in arguments.get(name, [name.replace("MODELS", str(models))])]
    line = " ".join(f"'{word}'" for word in (command_path, *expanded))
    finished = start("bash", "-c", f"ulimit -f {kilobytes}; exec {line}", cwd=tmp_path)
    errors = [text for text in finished.stderr.decode().splitlines() if "Seed set" not in text]
    assert finished.returncode == 2, errors
    assert errors[-1].split("\r")[-1].strip().startswith("ropepp-lit: error: "), errors
    assert "File too large" in errors[-1]
    assert not any("Traceback" in text for text in errors)
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    if command[0] not in ("prepare", "fit"):  # these keep finished parts, or recipe and logs
        assert not kept
    assert not {name for name in kept if name.endswith((".ckpt", ".safetensors", ".png"))}


def test_text_files_are_utf_8_in_any_locale():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--preview", "--select", "PLW1514"]
    finished = subprocess.run([*command, ROOT / "ropepp_lit"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
