"""Time for which saving a checkpoint blocks training: synchronously, and in the background.

    python tools/benchmark_checkpoint.py

Saves weights and the state of AdamW in float32 as a run does, in one file from one process, and in shards from two
processes (gloo). "blocked" is the time until training can continue, on the slowest rank; "written" is the time until
the checkpoint has its final name. Training steps would slow both down, so nothing else runs. Prints medians.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from benchmarking import argument_parser, machine
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ropepp_lit.train.checkpoint_writer import CheckpointWriter


def make_state(parameters: int, is_sharded: bool) -> tuple[dict, list[torch.Tensor]]:
    """Return a checkpoint with the given number of parameters after a step, and its tensors that training modifies."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(parameters // 2**20)))
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(1, 1024)).sum().backward()
    optimizer.step()
    live = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    live = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in live]
    if is_sharded:
        weights, state = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    else:
        weights, state = model.state_dict(), optimizer.state_dict()
    return {"state_dict": weights, "optimizer_states": [state]}, live


def measure(rank: int, world_size: int, port: int, parameters: int, saves: int, folder: str) -> None:
    is_sharded = world_size > 1
    if is_sharded:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    checkpoint, live = make_state(parameters, is_sharded)
    for in_background in (False, True):
        writer = CheckpointWriter(in_background=in_background, keep=1)
        writer.open()
        times = []
        for number in range(saves + 1):
            path = Path(folder) / f"background {in_background}" / f"step={number}.ckpt"
            if is_sharded:
                dist.barrier()
            start = time.perf_counter()
            writer.save(dict(checkpoint), path, is_sharded=is_sharded, live=live)
            blocked = time.perf_counter() - start
            writer.wait()
            times.append((blocked, time.perf_counter() - start))
        writer.close()
        result = torch.tensor([statistics.median(column) for column in zip(*times[1:], strict=True)])
        if is_sharded:
            dist.all_reduce(result, op=dist.ReduceOp.MAX)
        if rank == 0:
            where = f"{world_size} processes, shards" if is_sharded else "1 process, one file"
            how = "async_save: true" if in_background else "async_save: false"
            print(f"| {where} | {how} | {result[0]:.2f} s | {result[1]:.2f} s |", flush=True)
    if is_sharded:
        dist.destroy_process_group()


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", help="folder to write to; default: the system's temporary folder")
    options = parser.parse_args()
    print(
        f"{options.parameters:,} parameters, {12 * options.parameters / 2**30:.2f} GiB; {machine()}\n\n"
        "| processes | option | blocked | written |\n|---|---|---|---|"
    )
    for world_size in (1, 2):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            arguments = (world_size, port, options.parameters, options.saves, folder)
            torch.multiprocessing.spawn(measure, arguments, nprocs=world_size)


if __name__ == "__main__":
    main()
