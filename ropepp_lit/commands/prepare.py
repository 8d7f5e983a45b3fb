"""`ropepp-lit prepare`: tokenization of text, JSON and tables into shards for any context length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ropepp_lit.arguments import call, command

if TYPE_CHECKING:
    from pathlib import Path

    from ropepp_lit.data.manifest import Manifest
    from ropepp_lit.data.parts import Part


def prepare(
    *sources: str,
    out: str | None = None,
    tokenizer: str | None = None,
    train_tokenizer: int | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    special_tokens: bool = False,
    text_key: str = "text",
    split: str | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    validation_fraction: float = 0.0,
    limit: int | None = None,
    dedup: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    chunk_size: str = "64MB",
    format: Literal["text", "chat", "completion", "chat_pairs", "completion_pairs"] = "text",
    chat_template: str | None = None,
    train_on: Literal["assistant", "last", "all"] = "assistant",
    workers: int | None = None,
    part: str | None = None,
    merge: str | None = None,
    verify: str | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:
    r"""Tokenize documents into shards, or verify existing shards.

    After an interruption, the same command resumes. The shards depend only on the documents and the options, not on how
    the documents are stored or on the number of workers.

    Args:
        sources: Files of text, JSON (.json, .jsonl, .ndjson) and tables (.parquet, .arrow, .feather, .csv, .tsv), plain
            or compressed (.gz, .zst, .bz2, .xz); folders or globs of them, those of datasets' save_to_disk too;
            `builtin` (the source code of Python's library); or a Hugging Face dataset: hf:NAME, hf:NAME:SPLIT or
            hf:NAME:CONFIG:SPLIT, with NAME@REVISION for a specific revision.
        out: Output folder; new or empty.
        tokenizer: `bytes`, a tokenizer.json, a .ckpt file, or a Hugging Face folder or name on the Hub
            (ORGANIZATION/MODEL).
        train_tokenizer: Vocabulary size of a byte-level BPE to train on the documents, instead of `tokenizer`.
        bos_token: Token before each document, instead of the tokenizer's default ("" for none).
        eos_token: Token after each document, instead of the tokenizer's default.
        special_tokens: Encode special tokens that occur in the text as such, instead of as ordinary text.
        text_key: Key or column of the text in JSON and tables; with --format chat, of the messages, if it is not a
            standard name; with --format completion, of prompt and completion, such as question,answer; for pairs, of
            prompt, chosen and rejected answer.
        split: Separator of documents in text files, such as '\n\n' or '<|endoftext|>'; empty means one document per
            file. \n, \t, \r, \xNN, \uNNNN and \\ are escapes; \n also matches CRLF.
        min_tokens: Skip shorter documents (the paper: 512).
        max_tokens: Skip longer documents.
        validation_fraction: Fraction of the documents to hold out, selected by a hash of their text.
        limit: Maximum number of documents to read.
        dedup: Skip documents whose text equals that of an earlier one, by a 64-bit hash (about 60 bytes of memory per
            document).
        on_error: What to do with a document that cannot be read, or a conversation that the chat template rejects:
            `stop`, or `skip` and count it.
        chunk_size: Maximum size of a chunk, such as 64MB; a larger document gets a chunk of its own.
        format: Format of the sources: `text`; conversations (`chat`) in `messages` (role, content), `conversations`
            (from, value), or `prompt` and `completion` as lists of messages, with optional `tools` and `system`; or
            `prompt` and `completion` as text (`completion`). Only the assistant's turns are trained on. For preference
            tuning: `prompt`, `chosen` and `rejected` as messages (`chat_pairs`; the prompt can be the beginning of both
            answers instead) or as text (`completion_pairs`). A pair counts as one document.
        chat_template: File with a Jinja template for conversations that replaces the tokenizer's.
        train_on: Tokens of a conversation to train on: all turns of the `assistant`, its `last` turn, or `all` tokens.
        workers: Number of tokenizer threads; empty means the number of CPU cores.
        part: Prepare only part K of N, to be joined by `merge`: K/N (1/N to N/N), auto (K and N from the SLURM job
            array) or auto/N (K from the SLURM job array or the index of a Kubernetes job).
        merge: Join the folders of all parts into `out` instead of preparing: --merge DIR… --out DIR.
        verify: Re-read folders of shards and check their contents instead of preparing: --verify DIR….

    Returns:
        Result that --json prints: an object with `out` (the folder), `format_version` and `fingerprint` of the shards,
        `part` (null, or `{"number": K, "count": N}`), `splits` (by name: `documents`, `tokens`, `bytes` of text and
        `longest` document in tokens) and `skipped` (documents by reason). With `verify`, a list of such objects, one
        for each folder.
    """
    given = locals()
    import os
    from pathlib import Path

    from ropepp_lit.errors import UsageError
    from ropepp_lit.files import local_path
    from ropepp_lit.sizes import parse_bytes

    if verify is not None:
        _check_alone("verify", given)
        return [_verify(Path(local_path("verify", name))) for name in (verify, *sources)]
    if merge is not None:
        _check_alone("merge", given, "out")
        if out is None:
            raise UsageError("out: name the folder of the joined shards by --out")
        from ropepp_lit.data import parts

        merged = parts.merge([Path(local_path("merge", folder)) for folder in (merge, *sources)], out=Path(out))
        _report(Path(out), merged)
        return _result(Path(out), merged)
    for name, value, least in (
        ("min_tokens", min_tokens, 0),
        ("max_tokens", max_tokens, 1),
        ("limit", limit, 1),
        ("workers", workers, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name}: {value} must be {least} or more")
    if not sources:
        raise UsageError("sources: name at least one file, folder or glob, or builtin")
    if out is None:
        raise UsageError("out: name the folder of the shards by --out")
    if not 0 <= validation_fraction < 1:
        raise UsageError(f"validation_fraction: {validation_fraction} must be 0 or more and below 1")
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # read at the first use of tokenizers

    from ropepp_lit.data import prepare as work
    from ropepp_lit.data.parts import Part
    from ropepp_lit.data.report import skipped_lines
    from ropepp_lit.data.segment_writer import MAX_CHUNK_BYTES
    from ropepp_lit.text.chat import read_template
    from ropepp_lit.text.tokenizer import check_choice

    check_choice("", tokenizer, train_tokenizer)
    chunk_bytes = parse_bytes("chunk_size", chunk_size)
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise UsageError(f"chunk_size: {chunk_size} must be below 4GiB, which litdata's format has no room for")
    own_part = None if part is None else Part.parse(part)
    settings = work.PrepareSettings(
        tokenizer=tokenizer,
        train_tokenizer=train_tokenizer,
        bos_token=bos_token,
        eos_token=eos_token,
        special_tokens=special_tokens,
        text_key=text_key,
        split=split,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        validation_fraction=validation_fraction,
        limit=limit,
        dedup=dedup,
        on_error=on_error,
        chunk_bytes=chunk_bytes,
        format=format,
        chat_template=None if chat_template is None else read_template(chat_template),
        train_on=train_on,
    )
    folder = Path(out)
    manifest = work.prepare(list(sources), settings, out=folder, part=own_part, report=print)
    if own_part is None:
        _report(folder, manifest, has_printed_table=manifest.marks_trained_tokens)
        return _result(folder, manifest)
    documents, tokens = (sum(getattr(x, name) for x in manifest.splits.values()) for name in ("documents", "tokens"))
    if not manifest.marks_trained_tokens:  # of conversations they were printed before
        print("\n".join(skipped_lines(manifest)), end="\n" if manifest.skipped else "")
    print(f"Part {own_part.number} of {own_part.count} is in {folder}: {documents:,} documents, {tokens:,} tokens.")
    print("When all parts are finished: ropepp-lit prepare --merge DIR… --out DIR")
    return _result(folder, manifest, own_part)


def _result(folder: Path, manifest: Manifest, part: Part | None = None) -> dict[str, Any]:
    """Return the object that --json prints for a folder."""
    names = ("documents", "tokens", "bytes", "longest")
    return {
        "out": str(folder),
        "format_version": manifest.format_version,
        "fingerprint": manifest.fingerprint,
        "part": None if part is None else {"number": part.number, "count": part.count},
        "splits": {name: {key: getattr(split, key) for key in names} for name, split in manifest.splits.items()},
        "skipped": dict(manifest.skipped),
    }


def _check_alone(name: str, given: dict[str, Any], *beside: str) -> None:
    """Raise UsageError for an option that has no effect with `merge` or `verify`."""
    import inspect

    from ropepp_lit.errors import UsageError

    for option, parameter in inspect.signature(prepare).parameters.items():
        if option not in ("sources", name, *beside) and given[option] != parameter.default:
            raise UsageError(f"{option}: has no effect with --{name}; leave it out")


def _verify(folder: Path) -> dict[str, Any]:
    from ropepp_lit.data.manifest import Manifest
    from ropepp_lit.data.verify import verify as check
    from ropepp_lit.errors import UsageError

    faults = check(folder)
    if faults:
        raise UsageError("; ".join(faults))
    manifest = Manifest.read(folder)
    splits = manifest.splits.values()
    chunks, tokens = sum(len(split.chunks) for split in splits), sum(split.tokens for split in splits)
    print(f"{folder}: all {chunks:,} chunks with {tokens:,} tokens are intact.")
    return _result(folder, manifest)


def _report(folder: Path, manifest: Manifest, *, has_printed_table: bool = False) -> None:
    """Print a table of the splits and a histogram of document lengths, and write the histogram to lengths.png.

    Args:
        folder: Folder of the shards.
        manifest: Manifest of the folder.
        has_printed_table: Whether the table was printed before.
    """
    from ropepp_lit.data.report import conversation_lines, skipped_lines
    from ropepp_lit.text.tokenizer import TextTokenizer

    if not manifest.marks_trained_tokens:
        print(f"{'split':<12}{'documents':>14}{'tokens':>18}{'bytes of text':>18}{'bytes/token':>13}")
        for name, split in manifest.splits.items():
            ratio = split.bytes / split.tokens
            print(f"{name:<12}{split.documents:>14,}{split.tokens:>18,}{split.bytes:>18,}{ratio:>13.2f}")
        for line in skipped_lines(manifest):
            print(line)
        entry = {**vars(manifest), "tokenizer": manifest.read_tokenizer(folder)}
        description = TextTokenizer.from_entry(entry).description
        print(f"{description[0].upper()}{description[1:]}.")
    elif not has_printed_table:
        print("\n".join(conversation_lines(manifest, folder)))
    lengths = manifest.splits["train"].lengths
    used = [place for place, (documents, _) in enumerate(lengths) if documents]
    most = max(tokens for _, tokens in lengths)
    print(f"\n{'tokens in a document':>22}{'documents':>12}{'share of tokens':>17}")
    for place in range(used[0], used[-1] + 1):
        documents, tokens = lengths[place]
        bar = "█" * round(30 * tokens / most)
        share = tokens / manifest.splits["train"].tokens
        print(f"{2**place:>10,} – {2 ** (place + 1) - 1:>9,}{documents:>12,}{share:>16.1%}  {bar}")
    _draw(folder / "lengths.png", lengths[used[0] : used[-1] + 1], used[0])
    print(f"\nThe shards are in {folder}, the histogram of lengths in {folder / 'lengths.png'}.")
    print(f"Next: {command('ropepp-lit', 'prepare', verify=folder)}")


def _draw(path: Path, lengths: list[list[int]], first: int) -> None:
    import io

    from matplotlib.figure import Figure

    from ropepp_lit.files import write_whole

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    total = sum(tokens for _, tokens in lengths)
    axes.bar(range(len(lengths)), [100 * tokens / total for _, tokens in lengths], color="#2563eb")
    names = [f"{2**n}" if n < 10 else f"{2 ** (n - 10)}k" if n < 20 else f"{2 ** (n - 20)}M" for n in range(40)]
    axes.set_xticks(range(len(lengths)), [f"≥ {names[first + place]}" for place in range(len(lengths))], rotation=45)
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("share of all tokens (%)")
    axes.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_whole(path, drawn.getvalue())


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    call(prepare, arguments, flags=("json", "quiet"))
