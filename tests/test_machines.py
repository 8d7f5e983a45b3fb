"""Machines as people have them: any encoding, closed pipes, hostile folders, full disks, poor file systems."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ropepp_lit
from ropepp_lit import files
from ropepp_lit.errors import UsageError
from ropepp_lit.train import checkpoint_writer

ROOT = Path(ropepp_lit.__file__).parents[1]


def start(*command, cwd, environment=None, **options):
    """A fresh process; with `environment` in place of variables of this one."""
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, timeout=300, check=False,
        env={**os.environ, **(environment or {})}, **options,
    )  # fmt: skip


HOSTILE = ("yaml", "torch", "json", "numpy", "lightning", "typing", "re", "pickle", "socket", "matplotlib", "tqdm")


@pytest.fixture
def hostile(tmp_path):
    """A folder with files that have the names of libraries, and each leave a mark where it is imported."""
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r} + '-{name}', 'w')\n")
    return tmp_path


SCHEME = """
from ropepp_lit.nn import RoPE

class Shifted(RoPE):
    def __init__(self, *, offset: int = 5) -> None:
        self.offset = offset

    def tables(self, positions, frequencies, *, head_dim, dtype):
        return super().tables(positions + self.offset, frequencies, head_dim=head_dim, dtype=dtype)
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize("start_by", ["command", "module", "PYTHONPATH"])
def test_the_current_folder_never_comes_before_a_library(hostile, command_path, tiny, free_port, start_by):
    """Also in the processes that Lightning and the data loader start; the user's own scheme is found."""
    (hostile / "schemes.py").write_text(SCHEME)
    command = [sys.executable, "-m", "ropepp_lit"] if start_by == "module" else [command_path]
    path = os.environ.get("PYTHONPATH", "")
    environment = {"MASTER_PORT": str(free_port())}
    if start_by == "PYTHONPATH":
        for name in ("re", "typing"):  # Python imports these before any line of ours
            (hostile / f"{name}.py").unlink()
        # What `export PYTHONPATH=$PYTHONPATH:FOLDER` leaves where it was empty.
        environment["PYTHONPATH"] = f"{path or ROOT}:"
    options = ["--trainer.max_steps", 1, "--model.positions", "schemes.Shifted", "--data.num_workers", 1]
    if start_by != "PYTHONPATH":
        options += ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    finished = start(*command, "fit", *tiny, *options, cwd=hostile, environment=environment)
    assert finished.returncode == 0, finished.stderr.decode()
    assert not list(hostile.glob("RAN*"))


@pytest.mark.end_to_end
def test_plain_names_of_the_users_own_modules_are_found_last(hostile, command_path):
    code = "import sys; from ropepp_lit import cli; cli._run(['--version']); cli._run(['trian'])"
    finished = start(sys.executable, "-P", "-c", code, cwd=hostile)
    assert b"no subcommand" in finished.stderr
    assert not list(hostile.glob("RAN*"))


@pytest.fixture(scope="module")
def odd_texts(tmp_path_factory):
    """A document, and one that is no text and whose name is not UTF-8."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "a.txt").write_text("text " * 1000)
    (folder / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"\xff broken")
    return folder


@pytest.mark.end_to_end
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1:strict", "utf-8"])
def test_reports_in_any_encoding(command_path, tmp_path, odd_texts, encoding):
    """A report with bars, arrows and the name of a file that is no text."""
    options = ["--tokenizer", "bytes", "--on_error", "skip", "--out", "shards"]
    finished = start(
        command_path, "prepare", odd_texts, *options, cwd=tmp_path, environment={"PYTHONIOENCODING": encoding}
    )
    assert finished.returncode == 0, finished.stderr.decode(errors="replace")
    assert b"Next: ropepp-lit prepare --verify shards" in finished.stdout
    assert b"caf\\xe9.txt: not UTF-8" in finished.stdout
    bar = "█".encode() if encoding == "utf-8" else b"#"
    assert bar * 5 in finished.stdout
    # an error's line too
    finished = start(
        command_path, "generate", os.fsdecode(b"caf\xe9.txt"), cwd=odd_texts, environment={"PYTHONIOENCODING": encoding}
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(b"ropepp-lit: error: caf\\xe9.txt: not a readable checkpoint")


def piped(command, reader, cwd, variables=""):
    """Exit code of a command whose output goes to another, and what that printed."""
    line = " ".join(f"'{word}'" for word in command)
    finished = start("bash", "-c", f"{variables} {line} 2>errors | {reader}; echo ${{PIPESTATUS[0]}} >code", cwd=cwd)
    return int((cwd / "code").read_text()), finished.stdout.decode(), (cwd / "errors").read_text()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("ends", [False, True])
def test_printing_without_a_reader(tmp_path, ends, unbuffered):
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
def test_training_goes_on_without_a_reader(command_path, tiny, tmp_path):
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
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(command_path, texts, tmp_path, closed):
    line = f"'{command_path}' prepare '{texts}' --tokenizer bytes --out shards {closed}"
    finished = start("bash", "-c", line, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr.decode()
    assert (tmp_path / "shards/manifest.json").is_file()


def refuse(monkeypatch, module, name, number):
    def refused(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, refused)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("kind", ["links", "hard links alone", "no links"])
def test_the_newest_checkpoint_without_links(tmp_path, monkeypatch, capsys, kind, is_sharded):
    if kind != "links":
        refuse(monkeypatch, os, "symlink", errno.EPERM)
    if kind == "no links":
        refuse(monkeypatch, os, "link", errno.EPERM)
    writer = checkpoint_writer.CheckpointWriter(in_background=False, keep=1)
    last = tmp_path / "last.ckpt"
    for step in (1, 2, 3):
        partial = tmp_path / f".step={step}.ckpt.partial"
        if is_sharded:
            partial.mkdir()
            (partial / "meta.pt").write_text(str(step))
        else:
            partial.write_text(str(step))
        writer._publish(tmp_path / f"step={step}.ckpt")
        assert (last / "meta.pt" if is_sharded else last).read_text() == str(step)
        assert last.is_symlink() == (kind == "links")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=3.ckpt"]
    assert capsys.readouterr().err.count("is a copy of the newest checkpoint") == (kind == "no links")


def test_no_room_for_a_copy_of_the_newest_checkpoint(tmp_path, monkeypatch, capsys):
    for module, name, number in ((os, "symlink", errno.EPERM), (os, "link", errno.EPERM)):
        refuse(monkeypatch, module, name, number)
    refuse(monkeypatch, checkpoint_writer.shutil, "copyfile", errno.ENOSPC)
    (tmp_path / ".step=1.ckpt.partial").touch()
    checkpoint_writer.CheckpointWriter(in_background=False, keep=1)._publish(tmp_path / "step=1.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert "last.ckpt is not there (No space left on device); name" in capsys.readouterr().err


POOR = """
import errno, os
from lightning.pytorch import Callback

def refuse(*arguments, **keywords):
    raise OSError(errno.EPERM, "Operation not permitted")

def no_fsync(descriptor):
    raise OSError(errno.EINVAL, "Invalid argument")

os.symlink, os.fsync = refuse, no_fsync

class Poor(Callback):
    pass
"""


@pytest.mark.end_to_end
def test_a_run_where_there_are_no_symbolic_links_and_no_fsync(run, tiny, tmp_path):
    (tmp_path / "poor.py").write_text(POOR)
    options = [*tiny, "--trainer.default_root_dir", "run", "--trainer.callbacks+", "poor.Poor"]
    options += ["--checkpoints.every_n_steps", 1, "--checkpoints.keep", 1]
    run("fit", *options, "--trainer.max_steps", 2, cwd=tmp_path)
    run("fit", *options, "--trainer.max_steps", 3, "--ckpt_path", "auto", cwd=tmp_path)
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert not last.is_symlink()
    assert last.samefile(last.with_name("step=3.ckpt"))
    run("generate", last, "--max_new_tokens", 2, cwd=tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_files_are_written_without_fsync(tmp_path, monkeypatch, number):
    refuse(monkeypatch, os, "fsync", number)
    files.write_whole(tmp_path / "file", "text")
    with files.whole_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "file", "folder"]


def test_a_disk_that_fails_is_no_disk_without_fsync(tmp_path, monkeypatch):
    refuse(monkeypatch, os, "fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_whole(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_where_there_is_no_flock_processes_wait_for_each_other_all_the_same(tmp_path, number):
    code = f"""
        import errno, fcntl, os, sys, time
        def flock(descriptor, operation):
            raise OSError({number}, os.strerror({number}))
        fcntl.flock = flock
        from pathlib import Path
        from ropepp_lit.files import locked
        with locked(Path("lock")):
            before = Path("log").read_text() if Path("log").exists() else ""
            time.sleep(0.1)
            Path("log").write_text(before + "x")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    processes = [subprocess.Popen(command, cwd=tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "xxx"


def test_a_complete_cache_that_is_read_only(texts, tmp_path, monkeypatch):
    from ropepp_lit.data.prepare import Settings, prepare_cached

    settings = Settings(tokenizer="bytes")
    folder = prepare_cached(str(texts), settings, cache_dir=tmp_path / "cache", show_progress=False)
    plain_open = os.open

    def read_only(path, flags, *arguments, **keywords):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return plain_open(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", read_only)
    assert prepare_cached(str(texts), settings, cache_dir=tmp_path / "cache", show_progress=False) == folder


@pytest.mark.parametrize(
    "value",
    ["s3://a/run", "gs://a/run", "file:///tmp/run", "hf://a/run", "hf:a/run", "https://a/b", "S3://a", "", "a\0b"],
)
def test_paths_that_are_none_of_this_machine(value):
    with pytest.raises(UsageError, match=r"^out: .*name a file or folder"):
        files.local_path("out", value)
    for path in ("run", "a:b", "/tmp/run", "a//b", "..a"):
        assert files.local_path("out", path) == path


URLS = ("s3://bucket/run", "file:///tmp/run")


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("command", ["prepare", "import", "upcycle", "export", "evaluate", "figures"])
def test_no_command_writes_to_a_url(mistake, command, url):
    arguments = {
        "prepare": ["builtin", "--tokenizer", "bytes", "--out", url],
        "import": ["folder", url],
        "upcycle": ["a.ckpt", url, "--variant", "ec"],
        "export": ["a.ckpt", url],
        "evaluate": ["a.ckpt", "--out", url],
        "figures": ["--out", url],
    }[command]
    assert f"out: {url} is a URL; name a file or folder on this machine" in mistake(*arguments, subcommand=command)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("subcommand", ["fit", "validate", "plan"])
@pytest.mark.parametrize("key", ["trainer.default_root_dir", "data.cache_dir"])
def test_no_run_writes_to_a_url(mistake, subcommand, key, url):
    expected = f"{key}: {url} is a URL; name a file or folder on this machine"
    assert expected in mistake(f"--{key}", url, subcommand=subcommand)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["prepare", "TEXTS", "--tokenizer", "bytes", "--out", "."], "is the current folder; name a folder inside it"),
        (["import", "HF", "."], "name a file that ends with .ckpt"),
        (["figures", "--out", ".", "--context_length", "64"], None),
    ],
)
def test_the_current_folder_as_out(run, texts, tmp_path, command, expected):
    words = [str(texts) if word == "TEXTS" else word for word in command]
    finished = run(*words, cwd=tmp_path, returncode=0 if expected is None else 2)
    assert expected is None or expected in finished.stderr
    assert len(finished.stderr.splitlines()) <= 1 or expected is None
    assert bool(list(tmp_path.iterdir())) == (expected is None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("file", True), ("folder/file", True), ("a..b", True), ("..", False), ("../file", False),
        ("folder/../../file", False), ("/etc/passwd", False), ("", False), (".", False), ("C:file", False),
        ("C:\\file", False), ("..\\file", False), ("\\\\server\\file", False), ("a\0b", False), (None, False),
        (3, False),
    ],
)  # fmt: skip
def test_names_that_stay_inside(tmp_path, name, expected):
    if expected:
        assert files.inside(tmp_path, name, for_writing=True) == tmp_path / name
        return
    with pytest.raises(UsageError, match="is not a file name inside its folder"):
        files.inside(tmp_path, name)


def test_links_that_lead_out_are_not_written_through(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train").symlink_to(tmp_path)
    (tmp_path / "folder" / "same").symlink_to("other")
    assert files.inside(tmp_path / "folder", "train/file")
    assert files.inside(tmp_path / "folder", "same/file", for_writing=True)
    with pytest.raises(UsageError, match="a symbolic link leads out"):
        files.inside(tmp_path / "folder", "train/file", for_writing=True)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):

    def fail(error):
        with files.whole_folder(tmp_path / "out") as folder:
            (folder / "a").touch()
            raise error

    with pytest.raises(UsageError, match="out: cannot be written: No space left"):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(UsageError, match="out: cannot be written: No space left"):
        fail(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    with pytest.raises(KeyError):
        fail(KeyError())
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    for name in ("out", "out/a"):
        with pytest.raises(UsageError, match="name an"), files.whole_folder(tmp_path / name):
            pass


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
def test_modules_are_imported_without_what_windows_lacks(run_file, tmp_path):
    (tmp_path / "missing.py").write_text(MISSING)
    assert run_file(tmp_path / "missing.py", cwd=tmp_path).stdout == "imported\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny, run):
    """A folder with a trained checkpoint, a file of weights with plain RoPE, and an export."""
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
    """Files beyond a size cannot be written: one line, and no file that is not whole."""
    places = {"TINY": tiny, "TEXTS": [str(texts)]}
    words = [word for name in command for word in places.get(name, [name.replace("MODELS", str(models))])]
    line = " ".join(f"'{word}'" for word in (command_path, *words))
    finished = start("bash", "-c", f"ulimit -f {kilobytes}; exec {line}", cwd=tmp_path)
    errors = [text for text in finished.stderr.decode().splitlines() if "Seed set" not in text]
    assert finished.returncode == 2, errors
    assert errors[-1].split("\r")[-1].strip().startswith("ropepp-lit: error: "), errors
    assert "File too large" in errors[-1]
    assert not any("Traceback" in text for text in errors)
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    if command[0] not in ("prepare", "fit"):  # those keep their finished parts, their recipe and curves
        assert not kept
    assert not {name for name in kept if name.endswith((".ckpt", ".safetensors", ".png"))}


def test_text_files_are_read_and_written_as_utf_8_whatever_the_locale():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--preview", "--select", "PLW1514"]
    finished = subprocess.run([*command, ROOT / "ropepp_lit"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
