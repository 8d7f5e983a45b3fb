"""Speed and memory of `prepare`, compared with `litdata.optimize` with the same tokenizer on the same text.

    python tools/benchmark_prepare.py
    python tools/benchmark_prepare.py --megabytes 1000 --zst    # prepare only: memory does not grow with the input

Each method runs in a process of its own on one file of JSON lines; memory is the growth of the resident set, including
child processes. The text is the source code of Python's standard library, repeated up to the requested size.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow
import torch
from benchmarking import argument_parser, machine, run_in_process
from litdata import TokensLoader, optimize

from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.text.sources import Reader, find_files
from ropepp_lit.text.tokenizer import load_tokenizer

WORKERS = 2


def write_corpus(path: Path, num_bytes: int) -> int:
    texts = [record.text for _, record in Reader(find_files(["builtin"], key="builtin")) if record.text]
    written = 0
    opened = pyarrow.output_stream(path, compression="zstd" if path.suffix == ".zst" else None)
    with io.TextIOWrapper(opened, encoding="utf-8") as file:
        while written < num_bytes:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= num_bytes:
                    break
    return written


def by_prepare(path: Path, out: Path, tokenizer: str) -> None:
    prepare([str(path)], PrepareSettings(tokenizer=tokenizer), out=out, show_progress=False)


class Tokenize:
    """Function for litdata's workers: tokenizes every WORKERS-th line of the file, a different part for each worker."""

    def __init__(self, path: Path, tokenizer: str) -> None:
        self._path, self._name = path, tokenizer

    def __call__(self, share: int) -> Iterator[torch.Tensor]:
        tokenizer = load_tokenizer(self._name)
        with self._path.open("rb") as file:
            for number, line in enumerate(file):
                if number % WORKERS == share:
                    yield torch.from_numpy(tokenizer.encode([json.loads(line)["text"]])[0]).to(torch.uint16)


def by_litdata(path: Path, out: Path, tokenizer: str) -> None:
    optimize(
        fn=Tokenize(path, tokenizer),
        inputs=list(range(WORKERS)),
        output_dir=str(out),
        num_workers=WORKERS,
        chunk_bytes="64MB",
        item_loader=TokensLoader(),
        verbose=False,
    )


def measure(method: Callable, path: Path, out: Path, tokenizer: str) -> tuple[float, int]:
    """Return the seconds and the bytes by which memory grew."""
    process, peak, done = psutil.Process(), 0, threading.Event()

    def resident() -> int:
        total = 0
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
        return total

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, resident())

    before, start = resident(), time.perf_counter()
    threading.Thread(target=watch, daemon=True).start()
    method(path, out, tokenizer)
    seconds = time.perf_counter() - start
    done.set()
    return seconds, peak - before


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=100, help="megabytes of text")
    parser.add_argument("--vocab_size", type=int, default=4096, help="vocabulary size of the BPE")
    parser.add_argument("--zst", action="store_true", help="read .jsonl.zst, which optimize does not support")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bpe = PrepareSettings(train_tokenizer=options.vocab_size)
        prepare(["builtin"], bpe, out=folder / "builtin", show_progress=False)
        tokenizer = str(folder / "builtin" / "tokenizer.json")
        path = folder / ("corpus.jsonl.zst" if options.zst else "corpus.jsonl")
        size = write_corpus(path, options.megabytes * 10**6)
        print(
            f"{size / 1e6:.0f} MB of text, BPE of {options.vocab_size:,} tokens, {WORKERS} workers\n"
            f"{machine()}\n\n"
            "| method               | seconds | MB/s  | memory grows by |\n"
            "|----------------------|---------|-------|-----------------|"
        )
        runs = {} if options.zst else {"litdata.optimize, BPE": (by_litdata, tokenizer)}
        runs |= {
            "prepare, BPE": (by_prepare, tokenizer),
            "prepare, bytes": (by_prepare, "bytes"),
        }
        for label, (method, chosen) in runs.items():
            seconds, memory = run_in_process(measure, method, path, folder / "out", chosen)
            shutil.rmtree(folder / "out")
            rate = size / 1e6 / seconds
            print(f"| {label:<20} | {seconds:7.1f} | {rate:5.1f} | {memory / 2**20:11,.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
