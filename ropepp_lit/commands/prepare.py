"""`ropepp-lit prepare`: text, JSON and tables to token shards that serve any context length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ropepp_lit.arguments import call, command

if TYPE_CHECKING:
    from pathlib import Path

    from ropepp_lit.data.shards import Manifest
    from ropepp_lit.data.shares import Share


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
    r"""Turn text into token shards, or check finished ones.

    Interrupted, the same command goes on where it was stopped. The shards depend on the documents and the options
    alone, not on how the documents are stored or on the number of workers.

    Args:
        sources: Files of text, JSON (.json, .jsonl, .ndjson) and tables (.parquet, .arrow, .feather, .csv, .tsv), plain
            or compressed (.gz, .zst, .bz2, .xz); folders or globs of them, those of datasets' save_to_disk too;
            `builtin`; or a Hugging Face dataset: hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, with NAME@REVISION for
            a certain revision.
        out: Folder of the shards: a new or empty one.
        tokenizer: `bytes`, a tokenizer.json, a .ckpt file, or a Hugging Face folder or name on the Hub
            (ORGANIZATION/MODEL).
        train_tokenizer: Instead of `tokenizer`: train a byte-level BPE with so many tokens on the documents.
        bos_token: What stands before documents, instead of what the tokenizer itself puts there ("" for nothing).
        eos_token: What ends documents, instead of what the tokenizer's folder says.
        special_tokens: Whether special tokens spelt in a text are tokens; otherwise they are text like any other.
        text_key: Key or column of the text in JSON and tables; with --format chat of the messages, where they have
            another name; with --format completion both names, of prompt and completion, as in question,answer; for
            pairs three names, of prompt, chosen and rejected answer.
        split: What separates documents in text files, such as '\n\n' or '<|endoftext|>'; empty means that each text
            file is one document. \n, \t, \r, \xNN, \uNNNN and \\ are escapes; a line end may be CRLF in the file.
        min_tokens: Leave shorter documents out (the paper: 512).
        max_tokens: Leave longer documents out.
        validation_fraction: Share of the documents that is held out, chosen by a hash of their text.
        limit: Stop after so many documents of the sources.
        dedup: Leave a document out whose text is exactly that of an earlier one, found by a hash of 64 bits (takes some
            60 bytes of memory for each document).
        on_error: What a document that cannot be read, or a conversation that the chat template refuses, does: `stop`,
            or `skip` it and count it.
        chunk_size: Bytes of a chunk at most, such as 64MB; a document that is larger has a chunk of its own.
        format: What the sources have: `text`; conversations (`chat`) in `messages` (role, content), `conversations`
            (from, value), or `prompt` and `completion` as lists of messages, with `tools` and `system` where they are
            there; or `prompt` and `completion` as texts (`completion`). Only what the assistant writes is trained. For
            preference tuning: `prompt`, `chosen` and `rejected` as messages (`chat_pairs`; the prompt may stand at the
            beginning of both answers instead) or as texts (`completion_pairs`). A pair counts as one document.
        chat_template: A file with a Jinja template by which conversations become text, instead of the tokenizer's own.
        train_on: What is trained of a conversation: every turn of the `assistant`, the `last` one, or `all` tokens.
        workers: Threads that tokenize; empty means as many as there are cores.
        part: Make only part K of N of the shards, to be joined by `merge`: K/N (from 1/N to N/N), auto (K and N from
            SLURM's job array) or auto/N (K from SLURM's job array or a Kubernetes job's index).
        merge: Instead of preparing, join the folders of all parts into `out`: --merge DIR… --out DIR.
        verify: Instead of preparing, re-read folders of shards and check everything: --verify DIR….

    Returns:
        What --json prints: an object with `out` (the folder), `format_version` and `fingerprint` of the shards, `part`
        (null, or `{"number": K, "count": N}`), `splits` (by name, `documents`, `tokens`, `bytes` of text and `longest`
        document in tokens) and `skipped` (documents by reason). With `verify`, a list of such objects, one for each
        folder.
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
        from ropepp_lit.data import shares

        merged = shares.merge([Path(local_path("merge", folder)) for folder in (merge, *sources)], out=Path(out))
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
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # read when tokenizers is first used

    from ropepp_lit.data import prepare as work
    from ropepp_lit.data.part_writer import MAX_CHUNK_BYTES
    from ropepp_lit.data.report import left_out_lines
    from ropepp_lit.data.shares import Share
    from ropepp_lit.text.chat import read_template
    from ropepp_lit.text.tokenizer import check_choice

    check_choice("", tokenizer, train_tokenizer)
    chunk_bytes = parse_bytes("chunk_size", chunk_size)
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise UsageError(f"chunk_size: {chunk_size} must be below 4GiB, which litdata's format has no room for")
    share = None if part is None else Share.parse(part)
    settings = work.Settings(
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
    manifest = work.prepare(list(sources), settings, out=folder, share=share, tell=print)
    if share is None:
        _report(folder, manifest, has_told=manifest.marks_trained_tokens)
        return _result(folder, manifest)
    documents, tokens = (sum(getattr(x, name) for x in manifest.splits.values()) for name in ("documents", "tokens"))
    if not manifest.marks_trained_tokens:  # conversations have been told of
        print("\n".join(left_out_lines(manifest)), end="\n" if manifest.skipped else "")
    print(f"Part {share.number} of {share.count} is in {folder}: {documents:,} documents, {tokens:,} tokens.")
    print("When all parts are there: ropepp-lit prepare --merge DIR… --out DIR")
    return _result(folder, manifest, share)


def _result(folder: Path, manifest: Manifest, share: Share | None = None) -> dict[str, Any]:
    """What --json prints of a folder."""
    names = ("documents", "tokens", "bytes", "longest")
    return {
        "out": str(folder),
        "format_version": manifest.format_version,
        "fingerprint": manifest.fingerprint,
        "part": None if share is None else {"number": share.number, "count": share.count},
        "splits": {name: {key: getattr(split, key) for key in names} for name, split in manifest.splits.items()},
        "skipped": dict(manifest.skipped),
    }


def _check_alone(name: str, given: dict[str, Any], *beside: str) -> None:
    """Raise UsageError where an option has no effect beside one that does something else than to prepare."""
    import inspect

    from ropepp_lit.errors import UsageError

    for option, parameter in inspect.signature(prepare).parameters.items():
        if option not in ("sources", name, *beside) and given[option] != parameter.default:
            raise UsageError(f"{option}: has no effect with --{name}; leave it out")


def _verify(folder: Path) -> dict[str, Any]:
    from ropepp_lit.data.shards import Manifest
    from ropepp_lit.data.verify import verify as check
    from ropepp_lit.errors import UsageError

    faults = check(folder)
    if faults:
        raise UsageError("; ".join(faults))
    manifest = Manifest.read(folder)
    splits = manifest.splits.values()
    chunks, tokens = sum(len(split.chunks) for split in splits), sum(split.tokens for split in splits)
    print(f"{folder}: all {chunks:,} chunks with {tokens:,} tokens are as they were written.")
    return _result(folder, manifest)


def _report(folder: Path, manifest: Manifest, *, has_told: bool = False) -> None:
    """A table of the splits, and how long the documents are: in the terminal and as lengths.png.

    Args:
        folder: Of the shards.
        manifest: What they are.
        has_told: Whether the table stands in the terminal already.
    """
    from ropepp_lit.data.report import conversation_lines, left_out_lines
    from ropepp_lit.text.tokenizer import TextTokenizer

    if not manifest.marks_trained_tokens:
        print(f"{'split':<12}{'documents':>14}{'tokens':>18}{'bytes of text':>18}{'bytes/token':>13}")
        for name, split in manifest.splits.items():
            ratio = split.bytes / split.tokens
            print(f"{name:<12}{split.documents:>14,}{split.tokens:>18,}{split.bytes:>18,}{ratio:>13.2f}")
        for line in left_out_lines(manifest):
            print(line)
        entry = {**vars(manifest), "tokenizer": manifest.read_tokenizer(folder)}
        description = TextTokenizer.from_entry(entry).description
        print(f"{description[0].upper()}{description[1:]}.")
    elif not has_told:
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
    print(f"\nThe shards are in {folder}, the lengths drawn in {folder / 'lengths.png'}.")
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
