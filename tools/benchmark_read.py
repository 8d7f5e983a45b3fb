"""Speed of reading batches, compared with a plain loop over a numpy.memmap, and the cost of planning a billion tokens.

    python tools/benchmark_read.py

Tokens are random; both methods read blocks of 4,097 tokens in batches of 8 and convert them to int64 tensors.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import torch
from benchmarking import argument_parser, machine

from ropepp_lit.data.manifest import Chunk, Manifest, TokenSet
from ropepp_lit.data.plan import BlockPlan
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.token_data import TokenData

CONTEXT_LENGTH, BATCH_SIZE = 4096, 8


def write_text(path: Path, num_bytes: int) -> None:
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(num_bytes // 20_000):
            letters = generator.integers(ord("a"), ord("z") + 1, 20_000, dtype=np.uint8).tobytes().decode()
            file.write(json.dumps({"text": letters}) + "\n")


def read_by_memmap(folder: Path, batches: int) -> float:
    """Return the seconds for batches of blocks from random positions of the first chunk, without any other work."""
    chunk = max((folder / "train").glob("*.bin"), key=lambda path: path.stat().st_size)
    tokens = np.memmap(chunk, dtype=np.uint16, mode="r")
    generator = np.random.default_rng(0)
    start = time.perf_counter()
    for _ in range(batches):
        places = generator.integers(0, len(tokens) - CONTEXT_LENGTH - 1, BATCH_SIZE)
        rows = [torch.from_numpy(tokens[place : place + CONTEXT_LENGTH + 1].astype(np.int64)) for place in places]
        block = torch.stack(rows)
        _ = block[:, :-1], block[:, 1:]
    return time.perf_counter() - start


def read_by_token_data(folder: Path, batches: int, **settings: bool | int) -> float:
    data = TokenData(source=str(folder), context_length=CONTEXT_LENGTH, batch_size=BATCH_SIZE, **settings)
    data.trainer = SimpleNamespace(max_steps=batches + 50, accumulate_grad_batches=1, distributed_sampler_kwargs=None)
    data.prepare_data()
    data.setup("fit")
    loader = iter(data.train_dataloader())
    for _ in range(50):  # checksums of the chunks, and the start of a worker
        next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return time.perf_counter() - start


def plan_a_billion() -> None:
    """Read a manifest of a billion tokens, and locate samples all over the run."""
    with tempfile.TemporaryDirectory() as name:
        folder, tokens = Path(name), 32 * 2**20
        chunks = [
            Chunk(filename=f"chunk-{n:06}-0000.bin", documents=30_000, tokens=tokens, sha256="0" * 64)
            for n in range(10**9 // tokens)
        ]
        manifest = Manifest(
            format_version=1,
            fingerprint="",
            sources=[],
            vocab_size=65536,
            bos_token_id=0,
            eos_token_id=1,
            opening=[],
            dtype="uint16",
            skipped={},
            examples=[],
            splits={},
        )
        manifest.splits["train"] = TokenSet(chunks=chunks, tokens=tokens * len(chunks))
        manifest.write(folder)
        memory, start = psutil.Process().memory_info().rss, time.perf_counter()
        read = Manifest.read(folder)
        sizes = [chunk.tokens for chunk in read.splits["train"].chunks]
        plan = BlockPlan(sizes, context_length=CONTEXT_LENGTH, seed=0)
        first = time.perf_counter() - start
        for sample in range(0, 3 * plan.samples_per_pass, plan.samples_per_pass // 50):
            plan.locate(sample)
        seconds = time.perf_counter() - start
        grown = psutil.Process().memory_info().rss - memory
        print(
            f"\n1,000,000,000 tokens in {len(chunks)} chunks: manifest and plan {first * 1e3:.1f} ms, then 150 samples "
            f"all over three passes {(seconds - first) * 1e3:.0f} ms; memory grows by {grown / 2**20:.1f} MiB"
        )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=100, help="megabytes of text; one token per byte")
    parser.add_argument("--batches", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.jsonl", options.megabytes * 10**6)
        settings = PrepareSettings(tokenizer="bytes", validation_fraction=0.01)
        prepare([str(folder / "text.jsonl")], settings, out=folder / "shards", show_progress=False)
        tokens = options.batches * BATCH_SIZE * CONTEXT_LENGTH
        print(
            f"context {CONTEXT_LENGTH:,}, {BATCH_SIZE} rows, {options.batches:,} batches; {machine()}\n\n"
            "| method                            | million tokens/s | ratio |\n"
            "|-----------------------------------|------------------|-------|"
        )
        bare = read_by_memmap(folder / "shards", options.batches)
        methods = {
            "TokenData, plain rows": {"intra_document_masking": False},
            "TokenData, bounds of documents": {"intra_document_masking": True},
            "TokenData, bounds, one worker": {"intra_document_masking": True, "num_workers": 1},
        }
        print(f"| {'numpy.memmap loop':<33} | {tokens / bare / 1e6:16.0f} |  1.00 |")
        for label, chosen in methods.items():
            seconds = read_by_token_data(folder / "shards", options.batches, **chosen)
            print(f"| {label:<33} | {tokens / seconds / 1e6:16.0f} | {bare / seconds:5.2f} |", flush=True)
    plan_a_billion()


if __name__ == "__main__":
    main()
