"""Check and benchmark the decoder on a GPU in less than eight minutes; prints tables and writes JSON.

    python tools/check_gpu.py --out check_gpu.json
    python tools/check_gpu.py --tiny               # smoke test: a tiny model on a CPU, in seconds

Agreement: every attention implementation with float64, the loss in bfloat16 with float32, FSDP2 with one device.
Memory: the peak of a training step, compared with `ropepp-lit plan` and its simulation. Speed: tokens per second and
model FLOPs utilization of a step (forward, backward, AdamW; bf16-mixed, packed documents), the time of a step of RoPE++
compared with RoPE, and decoding. A row that fails contains the reason; a row without enough time, "not measured".
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ropepp_lit.data.batch import Batch
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder, DecoderConfig, Documents, Frequencies, PositionScheme, Probe, RoPE, RoPEPP, layout_of
from ropepp_lit.nn.generation import generate
from ropepp_lit.nn.kernels import IMPLEMENTATIONS, attend, describe, select_implementation
from ropepp_lit.train.build import build_decoder
from ropepp_lit.train.costs import training_flops
from ropepp_lit.train.devices import device_name, find_device
from ropepp_lit.train.memory import StepMemory
from ropepp_lit.train.optimizer import AdamW
from ropepp_lit.train.parallel import ParallelDims, shard_decoder
from ropepp_lit.train.simulate import simulate
from ropepp_lit.train.step_setup import Setup

SCHEMES: dict[str, PositionScheme] = {"RoPE": RoPE(), "EH": RoPEPP(variant="eh"), "EC": RoPEPP(variant="ec")}
GIB = 2**30
NOT_MEASURED = "not measured"
TINY = DecoderConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip

Row = dict[str, Any]


class Machine:
    """Device, models to run on it, and time limit.

    Args:
        is_tiny: Whether to run a tiny model on a CPU.
        minutes: Time after which no new row starts.
    """

    def __init__(self, *, is_tiny: bool, minutes: float) -> None:
        self.is_tiny = is_tiny
        self.device = torch.device("cpu" if is_tiny else "cuda")
        self.end = time.monotonic() + 60 * minutes
        self.implementations = [name for name in IMPLEMENTATIONS if self._runs(name)]
        short = DecoderConfig(size="376m"), Setup(rows=8, context_length=4096, precision="bf16-mixed")
        long = (
            DecoderConfig(size="1.5b"),
            Setup(rows=1, context_length=32_768, precision="bf16-mixed", activation_checkpointing=1),
        )
        tiny = TINY, Setup(rows=2, context_length=128, precision="bf16-mixed")
        self.models = {"tiny at 128": tiny} if is_tiny else {"376M at 4k": short, "1.5B at 32k": long}

    def _runs(self, name: str) -> bool:
        try:
            select_implementation(name, self.device)
        except UsageError:
            return False
        return True

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> torch.autocast:
        """What `bf16-mixed` is on one device."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def rows(self, title: str, measure: Callable[..., Row], cases: list[Row]) -> list[Row]:
        """Return a row of a table for each case: its settings, and the result of `measure` or why it failed."""
        rows = []
        for case in cases:
            words = {name: value for name, value in case.items() if isinstance(value, str | int | bool)}
            print(f"{title}: {', '.join(f'{k} {v}' for k, v in words.items())}", file=sys.stderr, flush=True)
            if time.monotonic() > self.end:
                rows.append(words | {"note": f"{NOT_MEASURED}: out of time"})
                continue
            try:
                rows.append(words | measure(self, **case))
            except Exception as error:  # a row that fails must not discard the others
                rows.append(words | {"note": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"})
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return rows


def pack(machine: Machine, config: DecoderConfig, setup: Setup) -> tuple[torch.Tensor, torch.Tensor, Documents, float]:
    """Return random tokens in packed documents, labels, bounds of documents, and the number of attended pairs."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, config.vocab_size, (setup.rows, setup.context_length + 1), generator=generator)
    lengths = [setup.context_length // 4, setup.context_length // 8, setup.context_length // 2]
    lengths.append(setup.context_length - sum(lengths))
    ids = torch.arange(4).repeat_interleave(torch.tensor(lengths)).expand(setup.rows, -1)
    documents = Documents.from_ids(ids)
    pairs = Batch.create(ids, ids, documents).visible_pairs
    moved = Documents(*(x.to(machine.device) if isinstance(x, torch.Tensor) else x for x in documents))
    tokens = tokens.to(machine.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), moved, pairs


def check_attention(machine: Machine, *, implementation: str, rows: str, heads: str) -> Row:
    """Compare output and gradients with float64: largest error, relative to the largest value."""
    num_heads, num_kv = (int(part) for part in heads.split("/"))
    tokens, dim = (96, 16) if machine.is_tiny else (1024, 128)
    name = select_implementation(implementation, machine.device)
    torch.manual_seed(0)
    exact = [
        torch.randn(2, tokens, count, dim, device=machine.device, dtype=torch.float64)
        for count in (num_heads, num_kv, num_kv, num_heads)
    ]
    exact = [x.bfloat16().double() for x in exact]
    ids = (torch.arange(tokens, device=machine.device) * 7 // tokens).expand(2, -1)
    documents = Documents.from_ids(ids) if rows == "packed" else None

    def run(dtype: torch.dtype, function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in exact[:3]]
        output = function(*inputs, documents=documents, scale=dim**-0.5)
        return [output.detach(), *torch.autograd.grad(output, inputs, exact[3].to(dtype))]

    wanted = run(torch.float64, lambda *args, **settings: Probe().attend(0, *args, **settings))
    found = run(torch.bfloat16, lambda *args, **settings: attend(*args, implementation=name, **settings))
    errors = [
        float((one.double() - other).abs().max() / other.abs().max()) for one, other in zip(found, wanted, strict=True)
    ]
    names = ("output", "dq", "dk", "dv")
    return {f"error of {name}": f"{error:.1e}" for name, error in zip(names, errors, strict=True)} | {
        "agrees": max(errors) < 0.02
    }


def check_loss(machine: Machine, *, scheme: str) -> Row:
    """Compare the loss and its gradients in bfloat16, with autocast and with FSDP2, with float32."""
    config = TINY if machine.is_tiny else replace_layers(DecoderConfig(size="376m"), 2)
    setup = Setup(rows=2, context_length=128 if machine.is_tiny else 2048)
    input_ids, labels, documents, _ = pack(machine, config, setup)

    def make() -> Decoder:
        torch.manual_seed(0)
        return Decoder(config, SCHEMES[scheme], Frequencies())

    def run(decoder: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
        loss = decoder.loss(input_ids, labels, documents=documents)
        loss.backward()
        return loss.item(), {name: full_tensor(p.grad) for name, p in decoder.named_parameters() if p.grad is not None}

    precise = run(make().to(machine.device))
    with machine.autocast():
        mixed = run(make().to(machine.device))
    with one_rank(machine) as dims:
        decoder = make().to(machine.device)
        shard_decoder(decoder, dims, mixed_dtype=torch.bfloat16)
        sharded = run(decoder)
    row: Row = {"loss in float32": f"{precise[0]:.5f}"}
    for name, (loss, gradients) in (("autocast", mixed), ("fsdp2", sharded)):
        difference = torch.stack([(gradients[key] - value).norm() for key, value in precise[1].items()]).norm()
        size = torch.stack([value.norm() for value in precise[1].values()]).norm()
        row[f"{name}: loss off by"] = f"{loss - precise[0]:+.1e}"
        row[f"{name}: gradient off by"] = f"{float(difference / size):.1%}"
        row["agrees"] = row.get("agrees", True) and abs(loss - precise[0]) < 0.02 and difference < 0.1 * size
    row["agrees"] = bool(row["agrees"])
    return row


def replace_layers(config: DecoderConfig, layers: int) -> DecoderConfig:
    """Return the same geometry with another number of blocks."""
    return replace(config, num_hidden_layers=layers)


def full_tensor(gradient: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of a gradient that can be sharded."""
    return gradient.full_tensor() if isinstance(gradient, dist.tensor.DTensor) else gradient


@contextmanager
def one_rank(machine: Machine) -> Iterator[ParallelDims]:
    """Context manager of a process group with only this process."""
    backend = "gloo" if machine.device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield ParallelDims.create(machine.device.type)
    finally:
        dist.destroy_process_group()


def train(
    machine: Machine, *, model: str, scheme: str, implementation: str | None = None, compile: bool = True
) -> tuple[list[float], int, float]:
    """Return the seconds of the steps after warm-up, the bytes at the peak, and the attended pairs of a step."""
    config, setup = machine.models[model]
    torch.compiler.reset()  # graphs of other rows count towards the recompilation limit
    decoder = build_decoder(
        lambda: Decoder(config, SCHEMES[scheme], Frequencies(rope_theta=500_000)),
        device=machine.device,
        activation_checkpointing=setup.activation_checkpointing,
        attention=implementation,
        compile=compile,
    ).to(machine.device)
    optimizer = AdamW().build(decoder)
    input_ids, labels, documents, pairs = pack(machine, config, setup)
    seconds = []
    for step in range(3 if machine.is_tiny else 8):
        if step == 2 and machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        machine.synchronize()
        started = time.perf_counter()
        with machine.autocast():
            loss = decoder.loss(input_ids, labels, documents=documents, reduction="sum") / labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        machine.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if machine.device.type == "cuda" else 0
    return seconds[2:], peak, pairs


def measure_step(machine: Machine, **case: Any) -> Row:
    """Measure tokens per second and model FLOPs utilization."""
    config, setup = machine.models[case["model"]]
    seconds, peak, pairs = train(machine, **case)
    step, tokens = statistics.median(seconds), setup.rows * setup.context_length
    scheme = SCHEMES[case["scheme"]]
    layout = layout_of(config, scheme)
    flops = training_flops(config, layout, tokens=tokens, pairs=pairs)
    device = find_device(device_name() or "")
    utilization = NOT_MEASURED if device is None else f"{flops / step / (1e12 * device.tflops):.1%}"
    memory = f"{peak / GIB:.1f}" if peak else NOT_MEASURED
    return {"step, s": f"{step:.3f}", "tokens/s": round(tokens / step), "utilization": utilization, "peak, GiB": memory}


def measure_memory(machine: Machine, *, model: str, scheme: str) -> Row:
    """Measure the peak memory of a step without compilation; returns it with the estimate and the simulation."""
    config, setup = machine.models[model]
    setup = replace(setup, gradient_clip_val=1.0)
    with torch.device("meta"):
        decoder = Decoder(config, SCHEMES[scheme], Frequencies())
    estimate = StepMemory(config, decoder.head_layout, setup, num_parameters=decoder.num_parameters).peak().total
    simulation = simulate(setup, config=config, scheme=SCHEMES[scheme], frequencies=Frequencies(), optimizer=AdamW())
    simulated = sum(simulation.memory.values())
    row = {"plan, GiB": f"{estimate / GIB:.2f}", "simulation, GiB": f"{simulated / GIB:.2f}"}
    if machine.device.type != "cuda":
        return row | {"peak, GiB": NOT_MEASURED}
    _, peak, _ = train(machine, model=model, scheme=scheme, compile=False)
    return row | {"peak, GiB": f"{peak / GIB:.2f}", "plan / peak": f"{estimate / peak:.2f}"}


@torch.inference_mode()
def measure_decoding(machine: Machine, *, model: str, scheme: str) -> Row:
    """Measure tokens per second with a full context in the cache, in bfloat16."""
    config, setup = machine.models[model]
    torch.manual_seed(0)
    with machine.device:
        decoder = Decoder(config, SCHEMES[scheme], Frequencies()).to(torch.bfloat16).eval()
    prompt = torch.randint(2, config.vocab_size, (1, setup.context_length), device=machine.device)
    tokens = generate(decoder, prompt, max_new_tokens=34)
    machine.synchronize()
    started = time.perf_counter()
    next(tokens)
    machine.synchronize()
    prefill = time.perf_counter() - started
    next(tokens)
    machine.synchronize()
    started = time.perf_counter()
    count = sum(1 for _ in tokens)
    machine.synchronize()
    cache = decoder.allocate_cache(batch_size=1, max_tokens=setup.context_length + 34).nbytes
    return {
        "prefill, s": f"{prefill:.3f}",
        "tokens/s": f"{count / (time.perf_counter() - started):.1f}",
        "KV cache, GiB": f"{cache / GIB:.3f}",
    }


def environment(machine: Machine) -> Row:
    """Return device, driver, versions and commit."""

    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    is_cuda = machine.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU ({platform.machine()})",
        "driver": run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else "none",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "Python": platform.python_version(),
        "attention": describe(select_implementation(None, machine.device), machine.device, torch.bfloat16),
        "commit": run("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }


def tables(machine: Machine) -> dict[str, list[Row]]:
    """Return all tables by title, the most important first."""
    models, schemes = list(machine.models), list(SCHEMES)
    steps = [{"model": model, "scheme": scheme, "compile": True} for model in models for scheme in schemes]
    eager = [{"model": model, "scheme": scheme, "compile": False} for model in models for scheme in schemes]
    kernels = [
        {"model": models[0], "scheme": "EC", "compile": True, "implementation": name}
        for name in machine.implementations
    ]
    found = {
        "Attention against float64": machine.rows(
            "attention",
            check_attention,
            [
                {"implementation": name, "rows": rows, "heads": heads}
                for name in machine.implementations
                for rows in ("plain", "packed")
                for heads in ("8/4", "16/4")
            ],
        ),
        "Loss and gradients in bfloat16 against float32": machine.rows(
            "loss", check_loss, [{"scheme": scheme} for scheme in schemes]
        ),
        "Training": machine.rows("training", measure_step, steps),
        "Peak memory": machine.rows(
            "memory",
            measure_memory,
            [{"model": model, "scheme": scheme} for model in models for scheme in ("RoPE", "EC")],
        ),
        "Decoding": machine.rows("decoding", measure_decoding, [{"model": models[-1], "scheme": s} for s in schemes]),
    }
    found["Training"] += machine.rows("training", measure_step, [*eager, *kernels])
    seconds = {row["scheme"]: float(row["step, s"]) for row in found["Training"][: len(steps)][-3:] if "step, s" in row}
    if {"RoPE", "EC", "EH"} <= seconds.keys():
        ratios = {f"{name} / RoPE": f"{seconds[name] / seconds['RoPE']:.2f}" for name in ("EH", "EC")}
        found["Seconds of a step against RoPE"] = [{"model": models[-1], **ratios}]
    return found


def markdown(rows: list[Row]) -> str:
    """Format rows as a Markdown table with the columns of all rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="run a tiny model on a CPU")
    parser.add_argument("--minutes", type=float, default=8, help="time after which no new row starts")
    parser.add_argument("--out", type=Path, default=Path("check_gpu.json"), help="output file (JSON)")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny runs a tiny model on the CPU")
    machine = Machine(is_tiny=options.tiny, minutes=options.minutes)
    started = time.monotonic()
    found = {"Environment": [environment(machine)], **tables(machine)}
    for title, rows in found.items():
        print(f"\n## {title}\n\n{markdown(rows)}")
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    bad = [
        row for rows in found.values() for row in rows if row.get("agrees") is False or "failed" in row.get("note", "")
    ]
    print(f"\n{time.monotonic() - started:.0f} s; written to {options.out}; {len(bad)} rows disagree or failed.")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
