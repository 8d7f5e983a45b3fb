"""Token shards of sources: prepared now, continued, or found; by one process, or a share of them by each of several."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ropepp_lit.data.preparation import Preparation, Settings, stop
from ropepp_lit.data.report import conversation_lines
from ropepp_lit.data.shards import FORMAT_VERSION, MANIFEST, Manifest
from ropepp_lit.data.shares import Share
from ropepp_lit.errors import DISK_ERRORS, UsageError
from ropepp_lit.files import check_new_folder, locked
from ropepp_lit.text.sources import Input, SourceFile, find_files, find_inputs, identify
from ropepp_lit.text.tokenizer import load_tokenizer


def _identity_of(files: list[Input], settings: Settings) -> dict[str, Any]:
    """What the shards are made from: the contents of files and tokenizer, and the settings."""
    identity = {
        "format_version": FORMAT_VERSION,
        "files": identify(files),
        **dataclasses.asdict(settings),
    }
    if settings.format == "text":  # as those that were prepared before there were other formats
        for name in ("format", "chat_template", "train_on"):
            del identity[name]
    if settings.tokenizer is not None:  # what the file contains, and not only its name
        tokenizer = load_tokenizer(settings.tokenizer, bos_token=settings.bos_token, eos_token=settings.eos_token)
        identity["tokenizer"] = tokenizer.fingerprint
        identity.update(settings.encoder(tokenizer).identity)
    return identity


def fingerprint_of(files: list[Input], settings: Settings) -> str:
    """A name for sources and settings: other contents, another setting or tokenizer give another one.

    Raises:
        UsageError: the tokenizer cannot be loaded, a file or dataset cannot be read.
    """
    return _fingerprint(_identity_of(files, settings))


def _fingerprint(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def prepare_cached(source: str, settings: Settings, *, cache_dir: Path, show_progress: bool = True) -> Path:
    """Token shards of a source in a cache folder: made now, or found if they were made before.

    Args:
        source: See :func:`~ropepp_lit.text.sources.find_files`.
        settings: What the shards depend on.
        cache_dir: Holds one folder for each source and setting.
        show_progress: Draw progress bars.

    Returns:
        The folder.
    """
    out = cached_folder(source, settings, cache_dir=cache_dir)
    prepare([source], settings, out=out, key="data.source", show_progress=show_progress)
    return out


def cached_folder(source: str, settings: Settings, *, cache_dir: Path) -> Path:
    """Where :func:`prepare_cached` puts the shards of a source, or has put them."""
    name = "builtin" if source == "builtin" else Path(source).resolve().name
    return cache_dir / f"{name}-{fingerprint_of(find_files([source], key='data.source'), settings)}"


def prepare(
    sources: list[str],
    settings: Settings,
    *,
    out: Path,
    key: str = "SOURCE",
    share: Share | None = None,
    show_progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Manifest:
    """Token shards of sources, in a folder: made now, continued, or found whole.

    Args:
        sources: See :func:`~ropepp_lit.text.sources.find_inputs`.
        settings: What the shards depend on.
        out: The folder; must not exist, be empty, or contain these very shards.
        key: What the user calls the sources, for messages.
        share: Make only this share of the shards, to be joined with the others by
            :func:`~ropepp_lit.data.shares.merge`.
        show_progress: Draw progress bars.
        tell: Gets what people should see of conversations, before `out` appears.

    Raises:
        UsageError: nothing to read, a damaged document (unless `on_error` is skip), no space, a folder with something
            else in it, a setting that needs all documents in one process.
    """
    found = find_inputs(sources, key=key)
    _check(found.files, settings, key, share)
    identity = _identity_of(found.files, settings)
    fingerprint = _fingerprint(identity)
    if share is not None:
        fingerprint = share.fingerprint(fingerprint)
    if not (out / MANIFEST).is_file():
        check_new_folder(out)  # before a lock lies beside it
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock")):
        if (out / MANIFEST).is_file():
            manifest = Manifest.read(out)
            if manifest.fingerprint != fingerprint:
                raise UsageError(f"out: {out} holds shards of other sources or settings; name another folder")
            if manifest.marks_trained_tokens and tell is not None:
                tell("\n".join(conversation_lines(manifest, out)))
            return manifest
        check_new_folder(out)
        try:
            work = sources, found, settings, identity, fingerprint, out, key, share, show_progress, tell
            return Preparation(*work).run()
        except OSError as error:
            remedy = DISK_ERRORS.get(error.errno or 0)
            if remedy is None:
                raise
            raise UsageError(
                f"out: {out}: {error.strerror}; {remedy} and run the same command again: finished parts are kept"
            ) from error


def _check(files: list[Input], settings: Settings, key: str, share: Share | None) -> None:
    """Raise what is known to be wrong before anything is written."""
    if share is not None:
        for name, value, remedy in (
            ("dedup", settings.dedup, "leave repeats out before, or prepare in one run"),
            ("limit", settings.limit, "name fewer files, or prepare in one run"),
            ("train_tokenizer", settings.train_tokenizer, "train it by a run of its own and name it by --tokenizer"),
        ):
            if value:
                raise UsageError(f"{name}: needs all documents in one process, not a part of them; {remedy}")
    if settings.format != "text" and settings.train_tokenizer is not None:
        raise UsageError(
            f"train_tokenizer: not with --format {settings.format}; name the tokenizer of the model to fine-tune by "
            "--tokenizer"
        )
    own = files if share is None else files[slice(*share.range_of([file.num_bytes for file in files]))]
    if settings.split is not None and not any(isinstance(file, SourceFile) and file.kind == "text" for file in files):
        raise UsageError(f"split: {key} has no text files that could be split; leave it out")
    if settings.on_error == "stop":
        for file in own:
            if isinstance(file, SourceFile) and (problem := file.problem) is not None:
                raise stop(problem, key)
