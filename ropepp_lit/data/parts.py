"""Prepare shards by multiple processes, each one part (`--part K/N`), and merge the parts.

A part is a contiguous range of the input files. Its boundaries are moved to the next cut by hash (:mod:`.preparation`),
so that the merged parts are byte for byte what one process writes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropepp_lit.data.manifest import MANIFEST, TOKENIZER, Chunk, Manifest, TokenSet
from ropepp_lit.data.segment_writer import SPLITS, write_index
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.errors import UsageError
from ropepp_lit.files import locked, whole_folder, write_whole
from ropepp_lit.json_files import read_json, sealed, unsealed

PART = "part.json"
"""File in the folder of a part, with its number and the values that merging requires."""


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` of a preparation, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Part:
        """Parse `K/N`, `auto`, or `auto/N`.

        Args:
            text: `auto` takes K and N from SLURM's job array; `auto/N` takes K from SLURM's job array or the index of a
                Kubernetes job.
            environment: Environment variables.

        Raises:
            UsageError: The text has another form, a number is out of range, or the variables are not set.
        """
        match = re.fullmatch(r"(?:(\d+)|auto)/(\d+)|auto", text, re.ASCII)
        if match is None:
            raise UsageError(f"part: {text!r} is not K/N such as 2/8, auto (SLURM's job array) or auto/N")
        number, count = match[1], match[2]
        try:
            if number is None:
                if "SLURM_ARRAY_TASK_ID" in environment:
                    first, step = (
                        int(environment.get(f"SLURM_ARRAY_TASK_{x}", d)) for x, d in (("MIN", 0), ("STEP", 1))
                    )
                    number = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step + 1
                    count = count or environment["SLURM_ARRAY_TASK_COUNT"]
                else:
                    number = int(environment["JOB_COMPLETION_INDEX"]) + 1
            part = cls(int(number), int(count))
        except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            raise UsageError(
                f"part: {text}: neither SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT nor JOB_COMPLETION_INDEX (which "
                "requires auto/N) are set to numbers; write K/N"
            ) from error
        if not 1 <= part.number <= part.count:
            raise UsageError(f"part: {part.number}/{part.count}: parts are numbered from 1 to {part.count}")
        return part

    def range_of(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Return the range of the part's files: the first index and the exclusive end.

        Args:
            sizes: Size of each file in bytes, in order.
        """
        before, owners, total = 0, [], sum(sizes) or 1
        for size in sizes:
            owners.append(min((2 * before + size) * self.count // (2 * total), self.count - 1) + 1)
            before += size
        first = sum(owner < self.number for owner in owners)
        return first, first + owners.count(self.number)

    def fingerprint(self, complete: str) -> str:
        """Return the fingerprint of this part's shards.

        Args:
            complete: Fingerprint of all parts together.
        """
        return f"{complete}-{self.number}-of-{self.count}"


def write_part(
    folder: Path, part: Part, identity: dict[str, Any], *, num_segments: int, index_config: dict[str, Any]
) -> None:
    """Write the values that merging requires into the folder of a part."""
    values = {**asdict(part), "identity": identity, "parts": num_segments, "index_config": index_config}
    write_whole(folder / PART, json.dumps(sealed(values)))


def merge(folders: Sequence[Path], *, out: Path) -> Manifest:
    """Merge all parts of a preparation into one folder, with the same bytes that one process writes.

    Chunks are hard-linked if the file system supports it, and copied otherwise; the parts are not changed.

    Args:
        folders: Folders of the parts, in any order.
        out: New or empty folder, or one into which these parts have been merged before.

    Returns:
        The manifest of the merged shards.

    Raises:
        UsageError: A folder has no finished part, a part is missing or repeated, the parts belong to different
            preparations, a chunk is missing or has another size, or `out` has other content.
    """
    parts = sorted((_read(folder) for folder in folders), key=lambda item: item[1]["number"])
    count, identity = parts[0][1]["count"], parts[0][1]["identity"]
    for folder, values, _ in parts:
        if values["count"] != count or values["identity"] != identity:
            names = [name for name in identity if values["identity"].get(name) != identity[name]] or ["number of parts"]
            raise UsageError(
                f"merge: {folder} and {parts[0][0]} differ in {', '.join(names)}; prepare one of them again"
            )
    numbers = [values["number"] for _, values, _ in parts]
    if numbers != list(range(1, count + 1)):
        missing = [f"{n}/{count}" for n in range(1, count + 1) if n not in numbers]
        repeated = sorted({f"{n}/{count}" for n in numbers if numbers.count(n) > 1})
        problem = f"parts {', '.join(missing)} are missing" if missing else f"parts {', '.join(repeated)} are repeated"
        raise UsageError(f"merge: {problem}; pass each of the {count} parts once")
    manifests = [manifest for _, _, manifest in parts]
    fingerprint = manifests[0].fingerprint.split("-")[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock")):
        if (out / MANIFEST).is_file() and Manifest.read(out).fingerprint == fingerprint:
            return Manifest.read(out)
        partial = out.with_name(f".{out.name}.partial")
        if (partial / "parts").exists():
            raise UsageError(f"out: {partial} is an unfinished preparation; continue it, or remove that folder")
        with whole_folder(out) as folder:
            for name in SPLITS:
                (folder / name).mkdir()
            return _join(parts, folder, fingerprint)


def _read(folder: Path) -> tuple[Path, dict[str, Any], Manifest]:
    try:
        return folder, unsealed(read_json(folder / PART), required=True), Manifest.read(folder)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"merge: {folder} has no finished part; prepare it by `ropepp-lit prepare --part K/N`"
        ) from error


def _join(parts: list[tuple[Path, dict[str, Any], Manifest]], out: Path, fingerprint: str) -> Manifest:
    num_segments, renamed = 0, []
    for folder, values, manifest in parts:
        splits = {}
        for name in manifest.splits.keys() & SPLITS:
            tokens = manifest.splits[name]
            TokenShards(folder, manifest, name)  # raises where a chunk is missing or has another size
            splits[name] = TokenSet(**{**vars(tokens), "chunks": []})
            for chunk in tokens.chunks:
                match = re.fullmatch(r"chunk-(\d+)-(\d+)\.bin", chunk.filename)
                if match is None:
                    raise UsageError(
                        f"{folder / MANIFEST}: unexpected chunk name {chunk.filename!r}; prepare the part again"
                    )
                target = f"chunk-{num_segments + int(match[1]):06}-{match[2]}.bin"
                _link(folder / name / chunk.filename, out / name / target)
                splits[name].chunks.append(Chunk(**{**vars(chunk), "filename": target}))
        renamed.append(splits)
        num_segments += values["parts"]
    first = parts[0][2]
    merged = Manifest(
        **{
            **vars(first),
            "fingerprint": fingerprint,
            "skipped": {},
            "notices": {},
            "examples": [example for _, _, manifest in parts for example in manifest.examples][:20],
            "splits": {name: TokenSet.sum([splits[name] for splits in renamed if name in splits]) for name in SPLITS},
        }
    )
    add_counts(merged.skipped, (manifest.skipped for _, _, manifest in parts))
    add_counts(merged.notices, (manifest.notices for _, _, manifest in parts))
    check_splits(merged, parts[0][1]["identity"]["validation_fraction"], "merge", len(parts[0][1]["identity"]["files"]))
    config = next(values["index_config"] for _, values, _ in parts if values["index_config"])
    for name in SPLITS:
        if merged.splits[name].documents:
            write_index(out / name, merged.splits[name], config)
        else:
            del merged.splits[name]
    shutil.copyfile(parts[0][0] / TOKENIZER, out / TOKENIZER)
    merged.write(out)
    return merged


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system, or hard links are not supported
        try:
            shutil.copyfile(source, target)
        except FileNotFoundError as error:
            raise UsageError(f"{source}: missing; the part is damaged: prepare it again") from error


def add_counts(total: dict[str, int], counts: Iterable[dict[str, int]]) -> None:
    """Add counts by reason to `total`."""
    for count_of in counts:
        for reason, count in count_of.items():
            total[reason] = total.get(reason, 0) + count


def check_splits(manifest: Manifest, validation_fraction: float, key: str, num_files: int) -> None:
    """Raise UsageError, beginning with `key`, if a split that should exist has no documents."""
    for name in SPLITS if validation_fraction > 0 else SPLITS[:1]:
        if not manifest.splits[name].documents:
            remedy = "provide more text, or change validation_fraction"
            if manifest.marks_trained_tokens:
                remedy = "check the roles of messages and train_on, provide more of them, or change validation_fraction"
            reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
            raise UsageError(
                f"{key}: no documents for {name} in {num_files} files{f' ({reasons})' if reasons else ''}; {remedy}"
            )
