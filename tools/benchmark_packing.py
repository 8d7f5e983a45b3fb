"""Tokens per second of training on conversations: packed into rows, compared with one conversation per row.

    python tools/benchmark_packing.py

Each method reads the same conversations; padding is computed but not counted as tokens. Prints a table of tokens per
second (median of interleaved rounds), the fraction of positions that are padding, and the ratio to packed rows.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from benchmarking import argument_parser, machine
from torch import Tensor
from tqdm import tqdm

from ropepp_lit.data.batch import Batch
from ropepp_lit.data.packing import PADDING_LENGTH, best_fit_decreasing
from ropepp_lit.nn import Decoder, DecoderConfig, Documents, Frequencies, RoPEPP
from ropepp_lit.nn.loss import IGNORE_INDEX


def make_batch(rows: list[list[Tensor]], context_length: int, trained_share: float) -> Batch:
    """Return a batch of conversations, the last part of each of which is trained on."""
    tokens = torch.zeros(len(rows), context_length + 1, dtype=torch.int64)
    starts, is_trained = (torch.zeros_like(tokens, dtype=torch.bool) for _ in range(2))
    for row, conversations in enumerate(rows):
        end = 0
        for ids in conversations:
            tokens[row, end : end + len(ids)] = ids
            starts[row, end] = True
            is_trained[row, end + round((1 - trained_share) * len(ids)) : end + len(ids)] = True
            end += len(ids)
        starts[row, end::PADDING_LENGTH] = True
    labels = tokens[:, 1:].masked_fill(starts[:, 1:] | ~is_trained[:, 1:], IGNORE_INDEX)
    return Batch.create(tokens[:, :-1], labels, Documents.from_starts(starts[:, :-1]))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after a warm-up round")
    parser.add_argument("--conversations", type=int, default=64, help="number of conversations; lengths are log-normal")
    parser.add_argument("--median_length", type=int, default=120, help="median length in tokens")
    parser.add_argument("--context_length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--batch_size", type=int, default=4, help="rows per batch")
    parser.add_argument(
        "--trained_share", type=float, default=0.4, help="fraction of the tokens of a conversation to train on"
    )
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    places = options.context_length + 1
    lengths = rng.lognormal(np.log(options.median_length), 0.8, options.conversations).astype(int).clip(8, places)
    conversations = [torch.from_numpy(rng.integers(0, 8192, length)) for length in lengths]
    falling = np.argsort(-lengths, kind="stable")
    packed: list[list[Tensor]] = []
    for number, row in zip(falling, best_fit_decreasing(lengths[falling], places), strict=True):
        packed += [[] for _ in range(row + 1 - len(packed))]
        packed[row].append(conversations[number])
    alone = [[conversation] for conversation in conversations]

    ways: dict[str, list[Batch]] = {}
    for name, rows in (
        ("packed", packed),
        ("one per row, to the longest of a batch", alone),
        ("one per row, to the context", alone),
    ):
        batches = [rows[first : first + options.batch_size] for first in range(0, len(rows), options.batch_size)]
        ways[name] = [
            make_batch(
                batch,
                max(len(ids) for row in batch for ids in row) - 1 if "longest" in name else options.context_length,
                options.trained_share,
            )
            for batch in batches
        ]
    config = DecoderConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    decoder = Decoder(config, RoPEPP(), Frequencies())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(options.rounds + 1), unit="round", leave=False):
        for name, batches in ways.items():
            started = time.perf_counter()
            for batch in batches:
                decoder.loss(
                    batch.input_ids,
                    batch.labels,
                    documents=batch.documents,
                    label_indices=batch.places,
                    reduction="sum",
                ).backward()
            if number:
                seconds[name].append(time.perf_counter() - started)
    rates = {name: lengths.sum() / statistics.median(times) for name, times in seconds.items()}
    print(
        f"{machine()}; "
        f"{decoder.num_parameters:,} parameters; {options.conversations} conversations, {lengths.sum():,} tokens"
    )
    print(f"| {'rows':<38} | {'padding':>7} | {'tokens/s':>9} | {'of packed':>9} |")
    print(f"|{'-' * 40}|{'-' * 9}|{'-' * 11}|{'-' * 11}|")
    for name, batches in ways.items():
        padding = 1 - lengths.sum() / sum(batch.num_tokens for batch in batches)
        print(
            f"| {name:<38} | {max(0, padding):>7.1%} | {rates[name]:>9,.0f} | {rates[name] / rates['packed']:>9.2f} |"
        )


if __name__ == "__main__":
    main()
