"""A preparation by several processes: each makes one share of the shards, and the shares are joined.

A share is a contiguous range of the sources' files, moved to the next places where the documents say that a part ends
(:mod:`.prepare`), so shares joined in their order are what one process writes, byte for byte.
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

from ropepp_lit.data.part_writer import SPLITS, write_index
from ropepp_lit.data.shards import MANIFEST, TOKENIZER, Chunk, Manifest, TokenSet, TokenShards
from ropepp_lit.errors import UsageError
from ropepp_lit.files import locked, whole_folder, write_whole
from ropepp_lit.json_files import read_json, sealed, unsealed

SHARE = "part.json"
"""In the folder of a share: which one it is, and what joining needs."""


@dataclass(frozen=True)
class Share:
    """One of `count` shares, the first one being number 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Share:
        """Read `K/N`, `auto`, or `auto/N`.

        Args:
            text: `auto` takes K and N from SLURM's job array; `auto/N` takes K from SLURM's or from the index of a
                Kubernetes job.
            environment: Variables of these.

        Raises:
            UsageError: it has another form, a number is out of range, or the variables are not set.
        """
        match = re.fullmatch(r"(?:(\d+)|auto)/(\d+)|auto", text, re.ASCII)
        if match is None:
            raise UsageError(f"part: {text!r} is not K/N such as 2/8, auto (SLURM's job array) or auto/N")
        number, count = match[1], match[2]
        try:
            if number is None:
                if "SLURM_ARRAY_TASK_ID" in environment:
                    least, step = (
                        int(environment.get(f"SLURM_ARRAY_TASK_{x}", d)) for x, d in (("MIN", 0), ("STEP", 1))
                    )
                    number = (int(environment["SLURM_ARRAY_TASK_ID"]) - least) // step + 1
                    count = count or environment["SLURM_ARRAY_TASK_COUNT"]
                else:
                    number = int(environment["JOB_COMPLETION_INDEX"]) + 1
            share = cls(int(number), int(count))
        except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            raise UsageError(
                f"part: {text}: neither SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT nor JOB_COMPLETION_INDEX (which "
                "needs auto/N) are set as numbers; write K/N"
            ) from error
        if not 1 <= share.number <= share.count:
            raise UsageError(f"part: {share.number}/{share.count}: parts are numbered from 1 to {share.count}")
        return share

    def range_of(self, sizes: Sequence[int]) -> tuple[int, int]:
        """The share's files by place: from the first to before the second of two numbers.

        Args:
            sizes: Bytes of all files, in order.
        """
        before, owners, total = 0, [], sum(sizes) or 1
        for size in sizes:
            owners.append(min((2 * before + size) * self.count // (2 * total), self.count - 1) + 1)
            before += size
        first = sum(owner < self.number for owner in owners)
        return first, first + owners.count(self.number)

    def fingerprint(self, whole: str) -> str:
        """The fingerprint of this share's shards.

        Args:
            whole: That of all shares together.
        """
        return f"{whole}-{self.number}-of-{self.count}"


def write_share(
    folder: Path, share: Share, identity: dict[str, Any], *, parts: int, index_config: dict[str, Any]
) -> None:
    """Write what joining needs into the folder of a share."""
    values = {**asdict(share), "identity": identity, "parts": parts, "index_config": index_config}
    write_whole(folder / SHARE, json.dumps(sealed(values)))


def merge(folders: Sequence[Path], *, out: Path) -> Manifest:
    """Join all shares of a preparation into one folder: the same bytes as of one process.

    Chunks are hard links where the file system has them, else copies; the shares stay as they are.

    Args:
        folders: Of the shares, in any order.
        out: A new or empty folder, or one that these shares were joined into before.

    Raises:
        UsageError: a folder has no share, a share is missing or there twice, they are of different preparations, a
            chunk is missing or has another size, or `out` has something else in it.
    """
    shares = sorted((_read(folder) for folder in folders), key=lambda item: item[1]["number"])
    count, identity = shares[0][1]["count"], shares[0][1]["identity"]
    for folder, values, _ in shares:
        if values["count"] != count or values["identity"] != identity:
            names = [name for name in identity if values["identity"].get(name) != identity[name]] or ["number of parts"]
            raise UsageError(f"merge: {folder} and {shares[0][0]} differ in {', '.join(names)}; prepare one again")
    numbers = [values["number"] for _, values, _ in shares]
    if numbers != list(range(1, count + 1)):
        missing = [f"{n}/{count}" for n in range(1, count + 1) if n not in numbers]
        twice = sorted({f"{n}/{count}" for n in numbers if numbers.count(n) > 1})
        problem = f"parts {', '.join(missing)} are missing" if missing else f"parts {', '.join(twice)} are there twice"
        raise UsageError(f"merge: {problem}; name each of the {count} parts once")
    manifests = [manifest for _, _, manifest in shares]
    fingerprint = manifests[0].fingerprint.split("-")[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock")):
        if (out / MANIFEST).is_file() and Manifest.read(out).fingerprint == fingerprint:
            return Manifest.read(out)
        partial = out.with_name(f".{out.name}.partial")
        if (partial / "parts").exists():
            raise UsageError(f"out: {partial} is an unfinished preparation; go on with it, or remove that folder")
        with whole_folder(out) as folder:
            for name in SPLITS:
                (folder / name).mkdir()
            return _join(shares, folder, fingerprint)


def _read(folder: Path) -> tuple[Path, dict[str, Any], Manifest]:
    try:
        return folder, unsealed(read_json(folder / SHARE), required=True), Manifest.read(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"merge: {folder} has no finished part; make it by `ropepp-lit prepare --part K/N`") from error


def _join(shares: list[tuple[Path, dict[str, Any], Manifest]], out: Path, fingerprint: str) -> Manifest:
    before, moved = 0, []
    for folder, values, manifest in shares:
        splits = {}
        for name in manifest.splits.keys() & SPLITS:
            tokens = manifest.splits[name]
            TokenShards(folder, manifest, name)  # checks that the files are there, with their sizes
            splits[name] = TokenSet(**{**vars(tokens), "chunks": []})
            for chunk in tokens.chunks:
                match = re.fullmatch(r"chunk-(\d+)-(\d+)\.bin", chunk.filename)
                if match is None:
                    raise UsageError(f"{folder / MANIFEST}: no chunk of a part is called {chunk.filename!r}")
                target = f"chunk-{before + int(match[1]):06}-{match[2]}.bin"
                _link(folder / name / chunk.filename, out / name / target)
                splits[name].chunks.append(Chunk(**{**vars(chunk), "filename": target}))
        moved.append(splits)
        before += values["parts"]
    first = shares[0][2]
    joined = Manifest(
        **{
            **vars(first),
            "fingerprint": fingerprint,
            "skipped": {},
            "notices": {},
            "examples": [example for _, _, manifest in shares for example in manifest.examples][:20],
            "splits": {name: TokenSet.sum([splits[name] for splits in moved if name in splits]) for name in SPLITS},
        }
    )
    add_counts(joined.skipped, (manifest.skipped for _, _, manifest in shares))
    add_counts(joined.notices, (manifest.notices for _, _, manifest in shares))
    check_splits(
        joined, shares[0][1]["identity"]["validation_fraction"], "merge", len(shares[0][1]["identity"]["files"])
    )
    config = next(values["index_config"] for _, values, _ in shares if values["index_config"])
    for name in SPLITS:
        if joined.splits[name].documents:
            write_index(out / name, joined.splits[name], config)
        else:
            del joined.splits[name]
    shutil.copyfile(shares[0][0] / TOKENIZER, out / TOKENIZER)
    joined.write(out)
    return joined


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        try:
            shutil.copyfile(source, target)
        except FileNotFoundError as error:
            raise UsageError(f"{source}: missing; the part is damaged: prepare it again") from error


def add_counts(total: dict[str, int], counts: Iterable[dict[str, int]]) -> None:
    """Add counts by reason to a total."""
    for count_of in counts:
        for reason, count in count_of.items():
            total[reason] = total.get(reason, 0) + count


def check_splits(manifest: Manifest, validation_fraction: float, key: str, num_files: int) -> None:
    """Raise UsageError, naming `key`, where a split that there should be has no documents."""
    for name in SPLITS if validation_fraction > 0 else SPLITS[:1]:
        if not manifest.splits[name].documents:
            remedy = "give more text, or change the share that is held out"
            if manifest.marks_trained_tokens:
                remedy = "check the roles of messages and train_on, give more of them, or change the share held out"
            reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
            raise UsageError(
                f"{key}: no documents for {name} in {num_files} files{f' ({reasons})' if reasons else ''}; {remedy}"
            )
