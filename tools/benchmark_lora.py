"""Size of checkpoint and optimizer state, and time of a step, with LoRA and with full fine-tuning.

    python tools/benchmark_lora.py [--recipe recipes/quickstart.yaml] [--rank 16,256] [--tokens 256]

Each method runs two steps of AdamW in float32 from the same random base and writes its checkpoint; the second step is
timed.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarking import argument_parser, machine
from torch import nn

from ropepp_lit.checkpoint import describe_architecture, make_checkpoint, save_file, write_checkpoint
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPEPP
from ropepp_lit.nn.lora import LoRA
from ropepp_lit.train.build import build_decoder
from ropepp_lit.train.lora import trained_weights
from ropepp_lit.train.optimizer import AdamW


def make(recipe: str) -> Decoder:
    geometry = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))["model"]["decoder"]
    return Decoder(DecoderConfig(**geometry), RoPEPP(variant="ec"), Frequencies())


def measure(factory: Any, base: Path, lora: LoRA | None, tokens: int, folder: Path) -> dict[str, float]:
    module = nn.Module()
    decoder = module.decoder = build_decoder(factory, device=torch.device("cpu"), init_from=str(base), lora=lora)
    optimizer = AdamW(lr=1e-4).build(decoder)
    ids = torch.randint(decoder.config.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        decoder.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
    state = optimizer.state_dict()
    weights = module.state_dict() if lora is None else trained_weights(module, module.state_dict())
    file = folder / "step=2.ckpt"
    save_file({"state_dict": weights, "optimizer_states": [state]}, file)
    return {
        "checkpoint": file.stat().st_size,
        "optimizer": sum(x.nbytes for values in state["state"].values() for x in values.values()),
        "trained": sum(x.numel() for x in decoder.parameters() if x.requires_grad),
        "seconds": seconds,
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--recipe", default="recipes/quickstart.yaml", help="recipe with the geometry, which is trained as EC"
    )
    parser.add_argument("--rank", default="16,256", help="comma-separated ranks")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in the row")
    options = parser.parse_args()
    factory = partial(make, options.recipe)
    methods: dict[str, LoRA | None] = {"full": None}
    for rank in map(int, options.rank.split(",")):
        methods[f"LoRA, rank {rank}"] = LoRA(rank=rank)
        methods[f"LoRA, rank {rank}, imaginary columns"] = LoRA(rank=rank, train_fully=["imaginary"])
    with tempfile.TemporaryDirectory() as name:
        folder, decoder = Path(name), factory()
        architecture = describe_architecture(decoder.config, decoder.scheme, decoder.frequencies)
        write_checkpoint(folder / "base.ckpt", make_checkpoint(decoder.state_dict(), architecture=architecture))
        print(f"{decoder.num_parameters:,} parameters, {options.tokens:,} tokens; {machine()}")
        del decoder
        print("| method | trained | checkpoint | of full | optimizer state | of full | seconds per step |")
        print("|--------|---------|------------|---------|-----------------|---------|------------------|")
        full: dict[str, float] = {}
        for method, lora in methods.items():
            result = measure(factory, folder / "base.ckpt", lora, options.tokens, folder)
            full = full or result
            cells = [f"{result['trained']:,}"]
            for key in ("checkpoint", "optimizer"):
                cells += [f"{result[key] / 2**20:,.1f} MiB", f"{result[key] / full[key]:.2%}"]
            print(f"| {method} | {' | '.join(cells)} | {result['seconds']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
