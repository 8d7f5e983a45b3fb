"""File systems without links, locks or fsync, read-only ones, and paths that are not local."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from ropepp_lit import files
from ropepp_lit.errors import UsageError
from ropepp_lit.train import checkpoint_writer


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


def test_full_disk_for_a_copy_of_the_newest_checkpoint(tmp_path, monkeypatch, capsys):
    for module, name, number in ((os, "symlink", errno.EPERM), (os, "link", errno.EPERM)):
        refuse(monkeypatch, module, name, number)
    refuse(monkeypatch, checkpoint_writer.shutil, "copyfile", errno.ENOSPC)
    (tmp_path / ".step=1.ckpt.partial").touch()
    checkpoint_writer.CheckpointWriter(in_background=False, keep=1)._publish(tmp_path / "step=1.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert "last.ckpt cannot be written (No space left on device); use" in capsys.readouterr().err


POOR = """
import errno, fcntl, os
from lightning.pytorch import Callback

def refuse(*arguments, **keywords):
    raise OSError(errno.EPERM, "Operation not permitted")

def unknown(*arguments):
    raise OSError(errno.EINVAL, "Invalid argument")

os.symlink, os.fsync, fcntl.flock = refuse, unknown, unknown

class Poor(Callback):
    pass
"""


@pytest.mark.end_to_end
def test_run_without_symbolic_links_fsync_and_locks(run, tiny, tmp_path):
    (tmp_path / "poor.py").write_text(POOR)
    options = [*tiny, "--trainer.default_root_dir", "run", "--trainer.callbacks+", "poor.Poor"]
    options += ["--checkpoints.every_n_steps", 1, "--checkpoints.keep", 1]
    finished = run("fit", *options, "--trainer.max_steps", 2, cwd=tmp_path)
    assert "Notice: run is on a file system without locks; make sure" in finished.stderr
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


def test_failing_disk_is_not_taken_for_missing_fsync(tmp_path, monkeypatch):
    refuse(monkeypatch, os, "fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_whole(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_processes_wait_without_flock(tmp_path, number):
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


def test_read_only_complete_cache(texts, tmp_path, monkeypatch):
    from ropepp_lit.data.prepare import PrepareSettings, prepare_cached

    settings = PrepareSettings(tokenizer="bytes")
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
def test_paths_that_are_not_local(value):
    for root in ("/", "//", "/..", "/a/.."):
        with pytest.raises(UsageError, match=r"^out: .* is the root of all folders"):
            files.local_path("out", root)
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
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "URL"],
        ["chat", "URL"],
        ["evaluate", "A=URL", "--out", "out"],
        ["export", "URL", "out"],
        ["upcycle", "URL", "ec.ckpt", "--variant", "ec"],
        ["import", "URL", "a.ckpt"],
        ["fit", "--model.init_from", "URL"],
    ],
    ids=lambda words: words[0],
)
def test_no_model_is_read_from_a_url(mistake, command, url):
    words = [word.replace("URL", url) for word in command[1:]]
    assert f"{url}: a URL; copy the model to this machine first" in mistake(*words, subcommand=command[0])


@pytest.mark.parametrize(
    "words", [["--verify", "URL"], ["--merge", "a", "URL", "--out", "b"]], ids=lambda words: words[0]
)
def test_no_shards_are_verified_or_joined_at_a_url(mistake, words):
    message = mistake(*(word.replace("URL", URLS[0]) for word in words), subcommand="prepare")
    assert f"{words[0][2:]}: {URLS[0]} is a URL; name a file or folder on this machine" in message


@pytest.mark.parametrize("source", ["https://host/a.jsonl", "S3://bucket/texts", "hf://datasets/a/b"])
@pytest.mark.parametrize(
    "words", [["prepare", "SOURCE"], ["fit", "--data.source", "SOURCE"]], ids=lambda words: words[0]
)
def test_no_text_is_read_from_a_url(mistake, words, source):
    more = ["--tokenizer", "bytes", "--out", "out"] if words[0] == "prepare" else []
    message = mistake(*(word.replace("SOURCE", source) for word in words[1:]), *more, subcommand=words[0])
    assert (
        f"{source}: text can only be read from local files; copy it to this machine, or pass a dataset as hf:NAME"
        in message
    )


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


def test_folders_are_written_atomically(tmp_path):

    def fail(error):
        with files.whole_folder(tmp_path / "out") as folder:
            (folder / "a").touch(mode=0o600)
            raise error

    with pytest.raises(UsageError, match="out: cannot be written: No space left"):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(UsageError, match="out: cannot be written: No space left"):
        fail(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    with pytest.raises(UsageError, match=r"out: cannot be written: .*perhaps because the disk is full"):
        fail(OSError("1536 requested and 1016 written"))
    with pytest.raises(KeyError):
        fail(KeyError())
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "a").touch(mode=0o600)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    (tmp_path / "usual").touch()
    assert (tmp_path / "out/a").stat().st_mode == (tmp_path / "usual").stat().st_mode
    (tmp_path / "usual").unlink()
    for name in ("out", "out/a"):
        with pytest.raises(UsageError, match="name an"), files.whole_folder(tmp_path / name):
            pass
