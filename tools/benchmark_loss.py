"""Peak memory, time and value of the chunked loss, compared with full logits and cross-entropy.

    python tools/benchmark_loss.py

Each method runs forward and backward in a process of its own on the same inputs; the reported memory is the peak of the
process minus its memory before. The full logits need about 14 GB at the default size.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
import torch.nn.functional as F
from benchmarking import argument_parser, machine, run_in_process
from torch import Tensor

from ropepp_lit.nn.loss import linear_cross_entropy


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


METHODS = {"logits, then cross-entropy": plain, "in chunks": linear_cross_entropy}


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(
    method: str, tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype
) -> tuple[int, float, float]:
    """Return the bytes at the peak, the seconds and the loss."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size) * 0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,))
    before = peak_bytes()
    start = time.perf_counter()
    loss = METHODS[method](hidden, weight, labels) / tokens
    loss.backward()
    return peak_bytes() - before, time.perf_counter() - start, loss.item()


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab_size", type=int, default=128_256)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()

    arguments = (options.tokens, options.vocab_size, options.hidden_size, getattr(torch, options.dtype))
    results = {method: run_in_process(measure, method, *arguments) for method in METHODS}

    print(
        f"forward + backward of the loss, {options.tokens:,} tokens × {options.vocab_size:,} vocabulary entries, "
        f"hidden size {options.hidden_size:,}, {options.dtype}\n"
        f"{machine()}\n"
    )
    print("| method                     | peak GiB | ratio | seconds | loss      |")
    print("|----------------------------|----------|-------|---------|-----------|")
    reference = results["logits, then cross-entropy"][0]
    for method, (peak, seconds, loss) in results.items():
        print(f"| {method:<26} | {peak / 2**30:8.2f} | {peak / reference:5.2f} | {seconds:7.1f} | {loss:.7f} |")


if __name__ == "__main__":
    main()
