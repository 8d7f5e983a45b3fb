"""Peak memory, time and value of the chunked loss against plain logits and cross-entropy, in one run.

    python tools/benchmark_loss.py

Each way runs forward and backward in a process of its own on the same inputs; its peak memory is that of the process
less what the process held with its inputs ready. Needs about 14 GB for the plain way at the default size.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import sys
import time
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp_lit.nn.loss import linear_cross_entropy


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


WAYS = {"logits, then cross-entropy": plain, "in chunks": linear_cross_entropy}


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(way: str, tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, result: Connection) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size) * 0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,))
    before = peak_bytes()
    start = time.perf_counter()
    loss = WAYS[way](hidden, weight, labels) / tokens
    loss.backward()
    result.send((peak_bytes() - before, time.perf_counter() - start, loss.item()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab_size", type=int, default=128_256)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    results = {}
    for way in WAYS:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (options.tokens, options.vocab_size, options.hidden_size, getattr(torch, options.dtype), sender)
        process = context.Process(target=measure, args=(way, *arguments))
        process.start()
        sender.close()
        results[way] = receiver.recv()
        process.join()

    print(
        f"forward + backward of the loss, {options.tokens:,} tokens × {options.vocab_size:,} words, "
        f"hidden size {options.hidden_size:,}, {options.dtype}\n"
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    print("| way                        | peak GiB | ratio | seconds | loss      |")
    print("|----------------------------|----------|-------|---------|-----------|")
    reference = results["logits, then cross-entropy"][0]
    for way, (peak, seconds, loss) in results.items():
        print(f"| {way:<26} | {peak / 2**30:8.2f} | {peak / reference:5.2f} | {seconds:7.1f} | {loss:.7f} |")


if __name__ == "__main__":
    main()
