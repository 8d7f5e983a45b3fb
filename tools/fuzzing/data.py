"""Targets of token shards, conversations and text files: valid inputs, and readers as in `prepare` and `fit`."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzzing.judges import hash_of
from fuzzing.models import TEMPLATE, TEXTS
from ropepp_lit.commands import prepare as prepare_command
from ropepp_lit.data.encoders import make_encoder
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.text.identity import tokenizer_digest
from ropepp_lit.text.sources import Reader, find_files
from ropepp_lit.text.tokenizer import byte_tokenizer


def make_shards(folder: Path) -> None:
    """Create folders of token shards: text, conversations and pairs of answers."""
    source = folder / "source"
    source.mkdir(parents=True)
    text = source / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [{**turns[0], "content": text[:30]}, {**turns[1], "content": text[30:90]}]} for text in TEXTS]
    (source / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": text[:20], "chosen": text[20:50], "rejected": f"no {n}"} for n, text in enumerate(TEXTS)]
    (source / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for name, options in (
        ("text", {}),
        ("chat", {"format": "chat", "chat_template": TEMPLATE}),
        ("pairs", {"format": "completion_pairs"}),
    ):
        settings = PrepareSettings(tokenizer="bytes", validation_fraction=0.3, chunk_bytes=2048, **options)
        prepare([str(source / f"{name}.jsonl")], settings, out=folder / name, show_progress=False)
        (folder / f".{name}.lock").unlink(missing_ok=True)
    shutil.rmtree(source)


def read_shards(folder: Path, changed: Path) -> Any:
    """Read the shards with `prepare --verify`, or with the checks of `fit`, which return documents and a batch."""
    shards = folder / changed.relative_to(folder).parts[0]
    if hash_of(changed) % 2:
        prepare_command.prepare(verify=str(shards))
    data = TokenData(source=str(shards), context_length=128, batch_size=2, cache_dir=str(folder / "cache"))
    data.trainer = SimpleNamespace(max_steps=4, accumulate_grad_batches=1, distributed_sampler_kwargs=None)  # type: ignore[assignment]
    data.check()
    data.prepare_data()
    data.setup("fit")
    batch = data.first_batch()
    manifest = data.manifest
    return {
        "batch": None if batch is None else [batch.input_ids.tolist(), batch.labels.tolist()],
        "held out": [document.tolist() for name in data.validation_sets for document in data.held_out_documents(name)],
        **{
            name: getattr(manifest, name)
            for name in ("vocab_size", "bos_token_id", "eos_token_id", "opening", "end_of_turn")
        },
        "marks": (manifest.marks_trained_tokens, manifest.holds_pairs),
        "tokens": {name: tokens.digest for name, tokens in manifest.splits.items()},
        "predicted": {name: tokens.predicted(documents_apart=True) for name, tokens in manifest.splits.items()},
        "entry": {name: value for name, value in data.entry.items() if name not in ("recipe", "tokenizer")},
        "tokenizer": tokenizer_digest(data.entry["tokenizer"]),
        "bytes per token": data.bytes_per_token(),
    }


def make_rows(folder: Path) -> None:
    """Create rows of conversations, prompts and completions, pairs of answers, and texts."""
    folder.mkdir(parents=True)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    rows = {
        "chat": {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "How much is 1 + 1?"}]},
                {"role": "assistant", "content": "2", "tool_calls": [call]},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "sharegpt": {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}], "system": "c"},
        "completion": {"prompt": "a b", "completion": " c d"},
        "chat_pairs": {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
                       "rejected": "c"},
        "completion_pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "text": {"text": "a text", "id": 1},
    }  # fmt: skip
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))


@cache
def encoder(kind: str) -> Any:
    """Return the encoder of a format."""
    template = TEMPLATE.replace("message['content']", "(message['content'] if message['content'] is string else 'x')")
    return make_encoder(
        kind, byte_tokenizer(), text_key="text", special_tokens=False, template=template if "chat" in kind else None,
        train_on="assistant",
    )  # type: ignore[arg-type]  # fmt: skip


def read_rows(folder: Path, changed: Path) -> Any:
    """Read, render and encode each row as `prepare --format` does."""
    kind = "chat" if changed.stem == "sharegpt" else changed.stem
    made, found = encoder(kind), []
    for _, read in Reader(find_files([str(changed)], key="SOURCE"), columns=made.columns):
        record = made.render(read)
        if record.text is None:
            found.append(f"{record.problem}; {record.remedy}")
        else:
            found.append(made.encode([record])[0].tolist())
    if found and all(isinstance(item, str) for item in found):
        raise UsageError("; ".join(found))
    return found


def judge_rows(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Require the rows that were not modified."""
    if change.startswith("line ") and sum(item == whole[0] for item in found) < 2:
        return f"a row that was not modified is missing: {str(found)[:100]}"
    return None


def make_tables(folder: Path) -> None:
    """Create texts in every file format."""
    import bz2
    import gzip
    import lzma

    import pyarrow
    import pyarrow.csv
    import pyarrow.feather
    import pyarrow.parquet
    from backports import zstd

    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]).encode()
    table = pyarrow.table({"text": TEXTS[:4], "id": list(range(4))})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    pyarrow.feather.write_feather(table, folder / "a.feather", compression="uncompressed")
    with pyarrow.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    pyarrow.csv.write_csv(table, folder / "a.csv")
    for ending, compress in (
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", zstd.compress),
    ):
        (folder / f"a.jsonl.{ending}").write_bytes(compress(lines))
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS[:4]], indent=1))
    (folder / "a.txt").write_text(TEXTS[0])


def read_tables(folder: Path, changed: Path) -> Any:
    """Read each document as `prepare` and `evaluate --text` do."""
    found = []
    for _, record in Reader(find_files([str(changed)], key="SOURCE"), text_key="text"):
        if record.text is None:
            raise UsageError(f"{record.where}: {record.problem}; {record.remedy}")
        record.text.encode()
        found.append(hashlib.sha256(record.text.encode()).hexdigest())
    return found
