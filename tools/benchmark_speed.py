"""Time of forward and backward pass, compared with the Llama of transformers with the same geometry.

    python tools/benchmark_speed.py

Prints a table of seconds (median of interleaved rounds) and the ratio to transformers; above 1 means faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import transformers
from benchmarking import argument_parser, machine
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from ropepp_lit.nn import Decoder, DecoderConfig, Documents, Frequencies, RoPE, RoPEPP


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds, after a warm-up round")
    parser.add_argument("--batch_size", type=int, default=2, help="rows per batch")
    parser.add_argument("--context_length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="vocabulary size")
    options = parser.parse_args()

    config = DecoderConfig(
        vocab_size=options.vocab_size,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.context_length + 1)
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
    input_ids, labels = tokens[:, :-1], tokens[:, 1:]
    documents = Documents.from_ids((torch.arange(options.context_length) // 256).expand_as(input_ids))

    runs: dict[str, Callable[[], torch.Tensor]] = {
        "transformers Llama, SDPA": lambda: llama(input_ids=input_ids, labels=input_ids).loss
    }
    for name, scheme in (("RoPE", RoPE()), ("EH", RoPEPP(variant="eh")), ("EC", RoPEPP(variant="ec"))):
        decoder = Decoder(config, scheme, Frequencies())
        runs[name] = lambda decoder=decoder: decoder.loss(input_ids, labels)
        runs[f"{name}, documents of 256 tokens"] = lambda decoder=decoder: decoder.loss(
            input_ids, labels, documents=documents
        )

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in tqdm(range(options.rounds + 1), "Rounds"):
        for name, run in runs.items():
            start = time.perf_counter()
            run().backward()
            if round_:
                seconds[name].append(time.perf_counter() - start)

    reference = statistics.median(next(iter(seconds.values())))
    print(
        f"\nforward + backward, {options.batch_size} × {options.context_length:,} tokens, float32, "
        f"{config.hidden_size} wide, {config.num_hidden_layers} layers, {config.num_attention_heads}/"
        f"{config.num_key_value_heads} heads, vocabulary {config.vocab_size:,}\n"
        f"{machine()}, transformers {transformers.__version__}\n"
    )
    print(f"| {'model':<29} | seconds | ratio |\n|{'-' * 31}|---------|-------|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name:<29} | {median:7.3f} | {reference / median:5.2f} |")


if __name__ == "__main__":
    main()
