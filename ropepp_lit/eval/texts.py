"""Documents of an evaluation: their selection, and notices about models that may have been trained on them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ropepp_lit.data.manifest import MANIFEST, Manifest
from ropepp_lit.data.run_data import data_of_run
from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model
from ropepp_lit.text.sources import Reader, find_files

MAX_DOCUMENTS, MAX_BYTES = 10_000, 2**28
"""Documents and bytes at the start of a source, from which documents are selected."""

Texts = dict[str, list[str]]
"""Documents by set."""


def read_texts(
    model: Model, text: str | None, reading: dict[str, Any], *, min_tokens: int, limit: int
) -> tuple[Texts, list[str]]:
    """Read documents of each source of text, or of each set that a run held out; they are selected by their hash.

    Args:
        model: First model of the evaluation, whose run held documents out and whose tokenizer counts tokens.
        text: Sources, separated by commas, see :func:`~ropepp_lit.text.sources.find_files`; None means the held-out
            documents.
        reading: Options of :class:`~ropepp_lit.text.sources.Reader` for the sources.
        min_tokens: Minimum number of tokens; shorter documents are skipped.
        limit: Maximum number of documents of each source or set.

    Returns:
        The documents, and notices to print.

    Raises:
        UsageError: A source cannot be read, no document remains, or the run's held-out documents are not available.
    """
    notices: list[str] = []
    if text is None:
        data = data_of_run(model.path, model.entry)
        notices = data.notices
        texts = data.held_out_texts(limit, min_tokens=min_tokens)
    else:
        texts = {source: _choose(model, source, reading, min_tokens, limit) for source in text.split(",")}
    suffix = f" of {min_tokens:,} tokens or more" if min_tokens else ""
    for name in [name for name, documents in texts.items() if not documents]:
        if text is not None:
            raise UsageError(f"text: {name} has no document{suffix}; name other text, or lower min_tokens")
        del texts[name]
        notices.append(f"text: the held-out set {name} has no document{suffix} and is skipped")
    if not texts:
        raise UsageError(f"text: the held-out text has no document{suffix}; name other text by --text")
    return texts, notices


def _choose(model: Model, source: str, reading: dict[str, Any], min_tokens: int, limit: int) -> list[str]:
    documents = sorted(_documents(source, reading), key=lambda text: hashlib.sha256(text.encode()).digest())
    long_enough = (text for text in documents if not min_tokens or len(model.encode(text)) >= min_tokens)
    return list(itertools.islice(long_enough, limit))


def _documents(source: str, reading: dict[str, Any]) -> Iterator[str]:
    """Yield the first documents of a source."""
    documents = num_bytes = 0
    for _, record in Reader(find_files([source], key="text"), **reading):
        if record.text is None:
            if record.problem == "empty":  # skipped, as in `prepare`
                continue
            raise UsageError(f"text: {record.where}: {record.problem}; {record.remedy}, or leave the file out")
        if not record.text.strip():
            continue
        yield record.text
        documents, num_bytes = documents + 1, num_bytes + len(record.text)
        if documents >= MAX_DOCUMENTS or num_bytes >= MAX_BYTES:
            return


def notices_of(name: str, entry: dict[str, Any], first: dict[str, Any], text: str | None) -> Iterator[str]:
    """Yield notices that explain why a model may have been trained on the documents.

    Args:
        name: Name of the model.
        entry: Metadata of its checkpoint, see :mod:`ropepp_lit.checkpoint`.
        first: Metadata of the first model's checkpoint, whose run held the documents out.
        text: Sources given by the user instead of held-out documents.
    """
    recipe = entry.get("recipe")
    if recipe is None:
        yield f"{name} does not store its training data, which may include these documents."
    elif text is not None:
        trained = list(_sources(recipe["data"].get("source", "builtin")))
        for source in text.split(","):
            for other in dict.fromkeys(other for other in trained if _overlap(source, other)):
                yield (
                    f"{name} was trained on {other}, so its training data includes documents of {source}. Without "
                    "--text, the evaluation uses the documents that the first model's run held out."
                )
    elif entry is not first:
        first_held_out, own_held_out = (stored.get("held_out") or {} for stored in (first, entry))
        if not first_held_out or not set(first_held_out.values()) <= set(own_held_out.values()):
            yield (
                f"{name} was not trained on the first model's data and held out other documents, so its training data "
                "may include these documents."
            )


def _sources(source: dict[str, float] | str) -> Iterator[str]:
    """Yield the sources of the training data, including those from which folders of token shards were prepared."""
    for name in [source] if isinstance(source, str) else source:
        yield name
        if (Path(name).expanduser() / MANIFEST).is_file():
            yield from Manifest.read(Path(name).expanduser()).sources


def _overlap(one: str, other: str) -> bool:
    """Return whether two sources are the same, or one is inside the other."""
    if one == other:
        return True
    paths = [Path(name).expanduser().resolve() for name in (one, other)]
    return all(path.exists() for path in paths) and (paths[0] in paths[1].parents or paths[1] in paths[0].parents
                                                      or paths[0] == paths[1])  # fmt: skip


def by_set(num_documents: dict[str, int]) -> Iterator[tuple[str, slice]]:
    """Yield the range of documents of each set, in a list of the documents of all sets."""
    start = 0
    for name, count in num_documents.items():
        yield name, slice(start, start + count)
        start += count


def seed_of(entry: dict[str, Any]) -> Sequence[int] | None:
    """Return the seeds of a run, those of its weights and of the order of its data; None if unknown."""
    recipe = entry.get("recipe") or {}
    seed = recipe.get("seed_everything")
    if isinstance(seed, bool) or not isinstance(seed, int):
        return None
    return seed, recipe["data"].get("seed", 0)
