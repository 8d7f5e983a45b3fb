"""Peak memory of a training step at a long context, for each memory option, compared with the estimate of `plan`.

    python tools/benchmark_memory.py

Each case runs in a process of its own: forward and backward pass of one row in float32, after a short row that
allocates the gradients. The reported memory is the growth of the resident set during the long row.
"""

from __future__ import annotations

import os
import resource
import time

import torch
from benchmarking import argument_parser, machine, run_in_process

from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPE, RoPEPP
from ropepp_lit.train.memory import StepMemory
from ropepp_lit.train.step_setup import Setup

GEOMETRIES = {
    "EC, 4 layers of 256, vocabulary 4,096": (
        RoPEPP(variant="ec"),
        {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "RoPE, 6 layers of 256, vocabulary 32,000": (
        RoPE(),
        {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
         "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "EH, 2 layers of 512, vocabulary 4,096": (
        RoPEPP(variant="eh"),
        {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2,
         "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}  # fmt: skip
OPTIONS: dict[str, dict[str, int]] = {
    "none": {},
    "activation_checkpointing 2": {"checkpoint_every": 2},
    "activation_checkpointing 1": {"checkpoint_every": 1},
    "mlp_chunk_tokens 1024": {"mlp_chunk_tokens": 1024},
    "activation_checkpointing 1, mlp_chunk_tokens 1024": {"checkpoint_every": 1, "mlp_chunk_tokens": 1024},
    "attention_head_groups 2": {"attention_head_groups": 2},
    "attention_head_groups 2, mlp_chunk_tokens 1024": {"attention_head_groups": 2, "mlp_chunk_tokens": 1024},
    "activation_checkpointing 1, mlp_chunk_tokens 1024, attention_head_groups 2": {
        "checkpoint_every": 1,
        "mlp_chunk_tokens": 1024,
        "attention_head_groups": 2,
    },
}


def step(decoder: Decoder, tokens: int) -> None:
    input_ids = torch.randint(decoder.config.vocab_size, (1, tokens + 1))
    decoder.loss(input_ids[:, :-1], input_ids[:, 1:]).backward()


def measure(name: str, memory_options: dict[str, int], tokens: int) -> tuple[int, float]:
    """Return the bytes at the peak and the seconds."""
    torch.manual_seed(0)
    scheme, geometry = GEOMETRIES[name]
    decoder = Decoder(DecoderConfig(**geometry), scheme, Frequencies())
    decoder.save_memory(**memory_options)
    step(decoder, 16)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    step(decoder, tokens)
    seconds = time.perf_counter() - start
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, seconds


def estimate(name: str, memory_options: dict[str, int], tokens: int) -> float:
    scheme, geometry = GEOMETRIES[name]
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(**geometry), scheme, Frequencies())
    setup = Setup(
        rows=1,
        context_length=tokens,
        accumulate_grad_batches=2,  # gradients are allocated before
        activation_checkpointing=memory_options.get("checkpoint_every", 0),
        mlp_chunk_tokens=memory_options.get("mlp_chunk_tokens"),
    )
    memory = StepMemory(
        decoder.config, decoder.head_layout, setup, num_parameters=decoder.num_parameters, device_type="cpu"
    )
    return memory.peak().parts["activations"]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc returns freed memory, so that the peak is that of tensors
    print(f"{options.tokens:,} tokens in one row, float32; {machine()}")
    for name in GEOMETRIES:
        print(f"\n**{name}**\n\n| memory options | peak | ratio | seconds | estimate / peak |\n|---|---|---|---|---|")
        plain = 0.0
        for label, memory_options in OPTIONS.items():
            peak, seconds = run_in_process(measure, name, memory_options, options.tokens)
            plain = plain or peak
            ratio = estimate(name, memory_options, options.tokens) / peak
            print(
                f"| {label} | {peak / 2**30:.2f} GiB | {peak / plain:.2f} | {seconds:.0f} | {ratio:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
