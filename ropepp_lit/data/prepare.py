"""Prepare sources as token shards, resume an interrupted preparation, or reuse existing shards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ropepp_lit.data.manifest import FORMAT_VERSION, MANIFEST, Manifest
from ropepp_lit.data.parts import Part
from ropepp_lit.data.preparation import Preparation, PrepareSettings, record_error
from ropepp_lit.data.report import conversation_lines
from ropepp_lit.errors import DISK_ERRORS, UsageError
from ropepp_lit.files import check_new_folder, locked
from ropepp_lit.text.sources import Input, SourceFile, find_files, find_inputs, identify
from ropepp_lit.text.tokenizer import load_tokenizer


def _identity_of(files: list[Input], settings: PrepareSettings) -> dict[str, Any]:
    """Return values that identify the shards: contents of inputs and tokenizer, and the settings."""
    identity = {
        "format_version": FORMAT_VERSION,
        "files": identify(files),
        **dataclasses.asdict(settings),
    }
    if settings.format == "text":  # unchanged from versions that had no other formats
        for name in ("format", "chat_template", "train_on"):
            del identity[name]
    if settings.tokenizer is not None:  # its content, not only its name
        tokenizer = load_tokenizer(settings.tokenizer, bos_token=settings.bos_token, eos_token=settings.eos_token)
        identity["tokenizer"] = tokenizer.fingerprint
        identity.update(settings.encoder(tokenizer).identity)
    return identity


def fingerprint_of(files: list[Input], settings: PrepareSettings) -> str:
    """Return a hash of the inputs' contents, the settings and the tokenizer.

    Raises:
        UsageError: The tokenizer cannot be loaded, or a file or dataset cannot be read.
    """
    return _fingerprint(_identity_of(files, settings))


def _fingerprint(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def prepare_cached(source: str, settings: PrepareSettings, *, cache_dir: Path, show_progress: bool = True) -> Path:
    """Prepare the token shards of a source in a cache folder, or reuse them if they exist.

    Args:
        source: See :func:`~ropepp_lit.text.sources.find_files`.
        settings: Options that affect the shards.
        cache_dir: Folder with one subfolder per source and settings.
        show_progress: Whether to show progress bars.

    Returns:
        The folder of the shards.
    """
    out = cached_folder(source, settings, cache_dir=cache_dir)
    prepare([source], settings, out=out, key="data.source", show_progress=show_progress)
    return out


def cached_folder(source: str, settings: PrepareSettings, *, cache_dir: Path) -> Path:
    """Return the folder in which :func:`prepare_cached` stores the shards of a source."""
    name = "builtin" if source == "builtin" else Path(source).resolve().name
    return cache_dir / f"{name}-{fingerprint_of(find_files([source], key='data.source'), settings)}"


def prepare(
    sources: list[str],
    settings: PrepareSettings,
    *,
    out: Path,
    key: str = "SOURCE",
    part: Part | None = None,
    show_progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> Manifest:
    """Prepare sources as token shards, resume an interrupted preparation, or reuse finished shards.

    Args:
        sources: See :func:`~ropepp_lit.text.sources.find_inputs`.
        settings: Options that affect the shards.
        out: Folder of the shards: a new or empty folder, or one with shards of the same inputs and settings.
        key: Name of the option with the sources, for messages.
        part: Prepare only this part of the shards, to be joined with the others by
            :func:`~ropepp_lit.data.parts.merge`.
        show_progress: Whether to show progress bars.
        report: Called with information about conversations, for printing, before `out` exists.

    Returns:
        The manifest of the shards.

    Raises:
        UsageError: There is nothing to read, a document is damaged (unless `on_error` is skip), the disk is full, `out`
            has other content, or an option requires all documents in one process.
    """
    inputs = find_inputs(sources, key=key)
    _check(inputs.files, settings, key, part)
    identity = _identity_of(inputs.files, settings)
    fingerprint = _fingerprint(identity)
    if part is not None:
        fingerprint = part.fingerprint(fingerprint)
    if not (out / MANIFEST).is_file():
        check_new_folder(out)  # before the lock file is created next to it
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock")):
        if (out / MANIFEST).is_file():
            manifest = Manifest.read(out)
            if manifest.fingerprint != fingerprint:
                raise UsageError(f"out: {out} contains shards of other sources or settings; pass another folder")
            if manifest.marks_trained_tokens and report is not None:
                report("\n".join(conversation_lines(manifest, out)))
            return manifest
        check_new_folder(out)
        try:
            preparation = Preparation(
                sources, inputs, settings, identity, fingerprint, out, key, part, show_progress, report
            )
            return preparation.run()
        except OSError as error:
            remedy = DISK_ERRORS.get(error.errno or 0)
            if remedy is None:
                raise
            raise UsageError(
                f"out: {out}: {error.strerror}; {remedy} and run the same command again: finished segments are kept"
            ) from error


def _check(files: list[Input], settings: PrepareSettings, key: str, part: Part | None) -> None:
    """Check the settings and files, as far as possible before anything is written."""
    if part is not None:
        for name, value, remedy in (
            ("dedup", settings.dedup, "remove duplicates before, or prepare in one run"),
            ("limit", settings.limit, "pass fewer files, or prepare in one run"),
            ("train_tokenizer", settings.train_tokenizer, "train it in a separate run and pass it by --tokenizer"),
        ):
            if value:
                raise UsageError(
                    f"{name}: requires all documents in one process and cannot be used with --part; {remedy}"
                )
    if settings.format != "text" and settings.train_tokenizer is not None:
        raise UsageError(
            f"train_tokenizer: cannot be used with --format {settings.format}; pass the tokenizer of the model to "
            "fine-tune by --tokenizer"
        )
    own = files if part is None else files[slice(*part.range_of([file.num_bytes for file in files]))]
    if settings.split is not None and not any(isinstance(file, SourceFile) and file.kind == "text" for file in files):
        raise UsageError(f"split: {key} has no text files to split; remove it")
    if settings.on_error == "stop":
        for file in own:
            if isinstance(file, SourceFile) and (problem := file.problem) is not None:
                raise record_error(problem, key)
