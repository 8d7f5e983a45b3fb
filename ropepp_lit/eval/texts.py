"""The documents of an evaluation: which are read, and which of the models may have been trained on them."""

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

MOST_DOCUMENTS, MOST_BYTES = 10_000, 2**28
"""Of a source of text: documents are chosen from so many at its beginning."""

Texts = dict[str, list[str]]
"""Documents by the set that they are of."""


def read_texts(
    model: Model, text: str | None, reading: dict[str, Any], *, min_tokens: int, limit: int
) -> tuple[Texts, list[str]]:
    """Documents of each source of text, or of each set that a run held out, chosen by a hash.

    Args:
        model: The first of the evaluation: its run's held-out documents are read, its tokenizer counts.
        text: Sources with commas, see :func:`~ropepp_lit.text.sources.find_files`; None means the held-out documents.
        reading: Options of :class:`~ropepp_lit.text.sources.Reader` for the sources.
        min_tokens: Leave out documents of fewer tokens.
        limit: Documents of each source or set.

    Returns:
        The documents, and lines to print.

    Raises:
        UsageError: a source cannot be read, nothing is left, or the run's held-out documents are not to be had here.
    """
    notices: list[str] = []
    if text is None:
        data = data_of_run(model.path, model.entry)
        notices = data.notices
        texts = data.held_out_texts(limit, min_tokens=min_tokens)
    else:
        texts = {source: _choose(model, source, reading, min_tokens, limit) for source in text.split(",")}
    least = f" of {min_tokens:,} tokens or more" if min_tokens else ""
    for name in [name for name, documents in texts.items() if not documents]:
        if text is not None:
            raise UsageError(f"text: {name} holds no document{least}")
        del texts[name]
        notices.append(f"text: of the held-out sets {name} holds no document{least} and is left out")
    if not texts:
        raise UsageError(f"text: the held-out text holds no document{least}; name other text by --text")
    return texts, notices


def _choose(model: Model, source: str, reading: dict[str, Any], min_tokens: int, limit: int) -> list[str]:
    documents = sorted(_documents(source, reading), key=lambda text: hashlib.sha256(text.encode()).digest())
    long_enough = (text for text in documents if not min_tokens or len(model.encode(text)) >= min_tokens)
    return list(itertools.islice(long_enough, limit))


def _documents(source: str, reading: dict[str, Any]) -> Iterator[str]:
    """The first documents of a source."""
    documents = num_bytes = 0
    for _, record in Reader(find_files([source], key="text"), **reading):
        if record.text is None:
            if record.problem == "empty":  # left out, as `prepare` does
                continue
            raise UsageError(f"text: {record.where}: {record.problem}; {record.remedy}, or leave the file out")
        if not record.text.strip():
            continue
        yield record.text
        documents, num_bytes = documents + 1, num_bytes + len(record.text)
        if documents >= MOST_DOCUMENTS or num_bytes >= MOST_BYTES:
            return


def notices_of(name: str, entry: dict[str, Any], first: dict[str, Any], text: str | None) -> Iterator[str]:
    """Lines that say why a model may have been trained on the documents that are read.

    Args:
        name: Of the model.
        entry: What its checkpoint stores, see :mod:`ropepp_lit.checkpoint`.
        first: What the first model's does, whose run held the documents out.
        text: Sources that were given instead.
    """
    recipe = entry.get("recipe")
    if recipe is None:
        yield f"{name} does not store what it was trained on; these documents may have been among it."
    elif text is not None:
        trained = list(_sources(recipe["data"].get("source", "builtin")))
        for source in text.split(","):
            for other in dict.fromkeys(other for other in trained if _overlap(source, other)):
                yield (
                    f"{name} was trained on {other}: documents of {source} were in its training data. Without --text, "
                    "the documents that the first model's run held out are read."
                )
    elif entry is not first:
        ours, theirs = (stored.get("held_out") or {} for stored in (first, entry))
        if not ours or not set(ours.values()) <= set(theirs.values()):
            yield (
                f"{name} was not trained on the first model's data: other documents were held out, and these may have "
                "been in its training data."
            )


def _sources(source: dict[str, float] | str) -> Iterator[str]:
    """Sources of training: text, and what folders of token shards were made from."""
    for name in [source] if isinstance(source, str) else source:
        yield name
        if (Path(name).expanduser() / MANIFEST).is_file():
            yield from Manifest.read(Path(name).expanduser()).sources


def _overlap(one: str, other: str) -> bool:
    """Whether sources are the same, or one is a file or folder inside of the other."""
    if one == other:
        return True
    paths = [Path(name).expanduser().resolve() for name in (one, other)]
    return all(path.exists() for path in paths) and (paths[0] in paths[1].parents or paths[1] in paths[0].parents
                                                      or paths[0] == paths[1])  # fmt: skip


def by_set(num_documents: dict[str, int]) -> Iterator[tuple[str, slice]]:
    """Which of the documents, one set behind the other, are of each set."""
    start = 0
    for name, count in num_documents.items():
        yield name, slice(start, start + count)
        start += count


def seed_of(entry: dict[str, Any]) -> Sequence[int] | None:
    """What a run's randomness came from: the seeds of its weights and of its data's order; None if not known."""
    recipe = entry.get("recipe") or {}
    seed = recipe.get("seed_everything")
    if isinstance(seed, bool) or not isinstance(seed, int):
        return None
    return seed, recipe["data"].get("seed", 0)
