"""Simulation of an optimizer step of one rank of a cluster, on fake tensors and torch's fake process group.

Nothing is computed, and no GPU is required. Decoder, FSDP2 or DDP, optimizer and clipping are those of training, and
every operation runs on tensors without data, so shapes, dtypes, lifetimes and collectives are those of training too.
Tensors are on the CPU, because the backward pass of fake CUDA tensors requires a driver; :func:`_cuda_kernels`
replaces CPU kernels that differ from those of CUDA. Blocks are not compiled.

Not included: memory inside kernels (the backward pass of FlashAttention 2 allocates a float32 copy of the gradient of
the queries), NCCL buffers, the CUDA context, and fragmentation of the allocator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _UpdateType
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, PositionScheme
from ropepp_lit.nn import block as nn_block
from ropepp_lit.nn import kernels as nn_kernels
from ropepp_lit.nn import loss as nn_loss
from ropepp_lit.nn.loss import linear_cross_entropy, rows_per_chunk
from ropepp_lit.train.counting import Count
from ropepp_lit.train.lora import fake_with_adapters
from ropepp_lit.train.memory import PARTS
from ropepp_lit.train.optimizer import OptimizerConfig
from ropepp_lit.train.parallel import ParallelDims, set_gradient_reduction, shard_decoder
from ropepp_lit.train.step_setup import Setup

_PARTS_BY_TYPE = {
    "Parameter": "parameters",
    "Sharded Param": "parameters",
    "Unsharded Param": "parameters",
    "Buffer": "parameters",
    "All Gather": "parameters",
    "Gradient": "gradients",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Reduce Scatter": "gradients",
    "Optstate": "optimizer",
    "OptState": "optimizer",
    "Activation": "activations",
    "Temp": "activations",
}
"""Parts of memory by the reference types of torch's trackers; other types are `other`."""


class LossCost(NamedTuple):
    """Cost of the output layer and the cross-entropy of a micro-batch."""

    memory: int
    """Peak bytes, without hidden states and weights."""
    bytes: int
    """Bytes that its operations read and write."""
    flops: float


class Simulation(NamedTuple):
    """Result of the simulation of one rank in one optimizer step."""

    memory: dict[str, int]
    """Bytes at the peak, by part."""
    counts: Count
    """Operations and collectives of all micro-batches, including recomputation."""
    loss: LossCost
    micro_batches: int
    """Number of simulated micro-batches; `counts` are scaled to all of them."""


def simulate(
    setup: Setup,
    *,
    config: DecoderConfig,
    scheme: PositionScheme,
    frequencies: Frequencies,
    optimizer: OptimizerConfig,
) -> Simulation:
    """Simulate one optimizer step of rank 0 of a cluster, with plain rows.

    FlashAttention saves the same tensors for packed documents as for plain rows (queries, keys, values, outputs and one
    float32 per query and head), so packed documents take the same memory. Context parallelism by gathering saves a
    second copy of the outputs for plain rows only, so packed documents take slightly less.

    Args:
        setup: Batch, devices, precision and memory options.
        config: Geometry.
        scheme: Position scheme.
        frequencies: Base and scaling.
        optimizer: Settings of the optimizer.
    """
    # All micro-batches but the last are alike, unless the first one gathers parameters for all of them.
    simulated = min(setup.accumulate_grad_batches, 2 if setup.reshard_after_forward else 3)
    with _fake_cluster(setup) as dims, FakeTensorMode(allow_non_fake_inputs=True), _cuda_kernels():
        decoder = _build(setup, dims, config, scheme, frequencies)
        stepper = optimizer.build(decoder)
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        _optimizer_step(stepper, setup)  # creates the optimizer states before the simulated step
        ids = torch.zeros(setup.rows, setup.tokens_per_row, dtype=torch.int64)
        tracker = _tracker(decoder, stepper, ids)
        module = _wrap(decoder, tracker) if setup.strategy == "ddp" else _Loss(decoder)
        total = Count()
        with tracker:
            for number in range(simulated):
                is_last = number == simulated - 1
                with Count() as count:
                    _micro_batch(module, decoder, ids, setup, is_last=is_last)
                is_repeated = number == simulated - 2
                total.add(count, setup.accumulate_grad_batches - simulated + 1 if is_repeated else 1)
                _mark_gradients(tracker)
            with Count() as count:
                _optimizer_step(stepper, setup)
            total.add(count)
        loss = _loss_cost(setup, config, trains_output=decoder.lm_head.weight.requires_grad)
    return Simulation(_peak(tracker), total, loss, simulated)


def _peak(tracker: MemTracker) -> dict[str, int]:
    memory = dict.fromkeys(PARTS, 0)
    for reference, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items():
        if reference != "Total":
            memory[_PARTS_BY_TYPE.get(getattr(reference, "value", ""), "other")] += size
    return memory


@contextmanager
def _fake_cluster(setup: Setup) -> Iterator[ParallelDims | None]:
    """Initialize a fake process group as rank 0 of a cluster; yields the dimensions of FSDP2, if used."""
    if setup.strategy == "one":
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setup.devices)
    try:
        dims = None
        if setup.strategy == "fsdp2":  # before the fake tensor mode: a mesh contains a tensor with values
            sizes = {"context_parallel_size": setup.context_parallel_size, "replicate_size": setup.replicate_size}
            dims = ParallelDims.create("cpu", **sizes)
        yield dims
    finally:
        dist.destroy_process_group()


def _build(
    setup: Setup, dims: ParallelDims | None, config: DecoderConfig, scheme: PositionScheme, frequencies: Frequencies
) -> Decoder:
    """Build the decoder like :func:`~ropepp_lit.train.build.build_decoder`, whose meta tensors cannot be fake."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(setup.weight_dtype)
    try:
        decoder = (
            Decoder(config, scheme, frequencies)
            if setup.lora is None
            else fake_with_adapters(config, scheme, frequencies, setup.lora)
        )
    finally:
        torch.set_default_dtype(before)
    decoder.save_memory(
        checkpoint_every=setup.checkpoint_every,
        keep_attention=setup.keeps_attention,
        offload=setup.offload_activations,
        mlp_chunk_tokens=setup.mlp_chunk_tokens,
        attention_head_groups=setup.attention_head_groups,
    )
    if dims is not None:
        mixed_dtype = setup.compute_dtype if setup.is_mixed else None
        shard_decoder(
            decoder,
            dims,
            mixed_dtype=mixed_dtype,
            reshard_after_forward=setup.reshard_after_forward,
            context_mode=setup.context_parallel_mode,
        )
    decoder._check_ids = lambda input_ids: None  # type: ignore[method-assign]  # fake tensors have no values
    return decoder


class _Loss(nn.Module):
    """Module that DDP wraps: computes the loss of a micro-batch."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> Tensor:
        """Return the loss of a micro-batch."""
        return self.decoder.loss(ids, ids, reduction="sum") / ids.numel()


def _all_reduce(state, bucket):  # DDP reads annotations, which are strings here
    """Average a bucket in pieces: DDP's first backward pass has one bucket, later ones have buckets of 25 MiB."""
    buffer, gradients = bucket.buffer(), bucket.gradients()
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]
    groups, _ = dist._compute_bucket_assignment_by_size(gradients, limits)
    for piece in buffer.split([sum(gradients[index].numel() for index in group) for group in groups]):
        dist.all_reduce(piece)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future


def _optimizer_step(optimizer: torch.optim.Optimizer, setup: Setup) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, setup.gradient_clip_val or math.inf)
    optimizer.step()
    optimizer.zero_grad()


def _tracker(decoder: Decoder, optimizer: torch.optim.Optimizer, ids: Tensor) -> MemTracker:
    tracker: MemTracker
    if isinstance(decoder, FSDPModule):
        for part in (decoder, decoder.lm_head):
            if isinstance(part, FSDPModule):  # this tracker hooks calls of modules, but not methods
                part.forward = MethodType(type(part).loss, part)  # type: ignore[method-assign]
                part.loss = part.__call__  # type: ignore[method-assign]
        tracker = FSDPMemTracker(decoder, optimizer)
        tracker.track_inputs((ids,))
    else:
        tracker = MemTracker()
        tracker.track_external(decoder, optimizer, ids)
        trained = nn.ParameterList(x for x in decoder.parameters() if x.requires_grad)
        tracker._track_module_params_and_buffers(trained)  # and their gradients
    tracker._mod_tracker = _NoModules()  # type: ignore[assignment]
    tracker._update_peak_stats = partial(_update_peak, tracker)  # type: ignore[method-assign]
    return tracker


class _NoModules:
    """Replacement of torch's `ModTracker`, whose hooks fail inside autograd functions; tracks no modules."""

    parents: frozenset[str] = frozenset()

    @property
    def is_bw(self) -> bool:
        """Whether the backward pass is running."""
        return torch._C._current_graph_task_id() != -1

    def get_known_fqn(self, module: nn.Module) -> str:
        """Return the same name for every module."""
        return ""

    def register_user_hooks(self, *hooks: Any) -> None:
        """Ignore the hooks."""

    def clear_user_hooks(self) -> None:
        """Do nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _update_peak(tracker: MemTracker, _: Any) -> None:
    """Record only the peak of the step; the tracker's method also records that of each module, which is slow."""
    for device, parts in tracker._curr_mem_snap.items():
        if parts["Total"] > tracker._peak_mem.get(device, 0):
            tracker._peak_mem[device], tracker._peak_mem_snap[device] = parts["Total"], dict(parts)


def _wrap(decoder: Decoder, tracker: MemTracker) -> nn.Module:
    """Wrap the decoder in DDP, whose buckets are tracked."""
    with tracker:
        module = DistributedDataParallel(_Loss(decoder), gradient_as_bucket_view=True, init_sync=False)
        module.register_comm_hook(None, _all_reduce)  # the default needs a result of the process group
    _mark_gradients(tracker)
    return module


def _micro_batch(module: nn.Module, decoder: Decoder, ids: Tensor, setup: Setup, *, is_last: bool) -> None:
    """Run a forward and a backward pass, with gradients reduced as in the strategy."""
    no_sync: AbstractContextManager = nullcontext()
    if isinstance(module, DistributedDataParallel) and not is_last:
        no_sync = module.no_sync()
    with no_sync:
        with torch.autocast("cpu", setup.compute_dtype, enabled=setup.uses_autocast):
            loss = module(ids) / setup.accumulate_grad_batches
        if isinstance(decoder, FSDPModule):
            set_gradient_reduction(
                decoder,
                is_last=is_last,
                reduce_each_micro_batch=setup.reduce_each_micro_batch,
                reshard_after_forward=setup.reshard_after_forward,
            )
        loss.backward()


def _mark_gradients(tracker: MemTracker) -> None:
    """Mark the remaining tensors of a backward pass as gradients; the trackers classify some as activations."""
    gradient = _FSDPRefType.UNSHARDED_GRAD if isinstance(tracker, FSDPMemTracker) else _MemRefType.GRAD
    for info, _ in list(tracker._WINFO.values()):
        if info.reftype.value in ("Temp", "Activation"):
            before, info.reftype = info.reftype, gradient
            tracker._update_snap(_UpdateType.REF, info, old_reftype=before)


@contextmanager
def _cuda_kernels() -> Iterator[None]:
    """Replace CPU kernels by ones with the memory of CUDA's (backward passes require CPU tensors)."""
    with (
        patch.object(F, "rms_norm", _rms_norm),
        # Used only if there are more keys than queries; otherwise SDPA's flash kernel runs. The operation has no CPU
        # kernel, but supports fake tensors, including the backward pass.
        patch.object(nn_kernels, "usable_implementation", lambda *_: "varlen"),
        patch.object(nn_block, "save_on_cpu", _Offload),
        patch.object(nn_loss, "rows_per_chunk", lambda vocab_size, _: rows_per_chunk(vocab_size, "cuda")),
        patch.object(nn_loss, "_logits", _logits),
        patch.object(nn_loss, "_add_product", _add_product),
    ):
        yield


class _Offload(torch.autograd.graph.saved_tensors_hooks):
    """Replacement of `save_on_cpu` that stores only shapes, since offloaded tensors take no device memory."""

    def __init__(self, pin_memory: bool) -> None:
        super().__init__(
            lambda x: (x.shape, x.stride(), x.dtype),
            lambda packed: torch.empty_strided(packed[0], packed[1], dtype=packed[2]),
        )


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    if hidden.dtype not in (torch.float16, torch.bfloat16):
        return hidden @ weight.T
    return torch.mm(hidden, weight.T, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype not in (torch.float16, torch.bfloat16):
        total += left @ right
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x, weight = x.float(), weight.float()  # as autocast does on CUDA
    return _RMSNorm.apply(x, weight)


class _RMSNorm(torch.autograd.Function):
    """Shapes, dtypes and saved tensors of `aten::_fused_rms_norm`, which the CPU lacks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _loss_cost(setup: Setup, config: DecoderConfig, *, trains_output: bool) -> LossCost:
    """Return the cost of the loss of a micro-batch, forward and backward."""
    dtype = setup.weight_dtype if setup.uses_autocast else setup.compute_dtype
    hidden = torch.zeros(setup.tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.zeros(config.vocab_size, config.hidden_size, dtype=dtype, requires_grad=trains_output)
    labels = torch.zeros(setup.tokens, dtype=torch.int64)
    tracker = MemTracker()
    tracker.track_external(hidden, weight, labels)
    with (
        tracker,
        Count(reads_and_writes=True) as count,
        torch.autocast("cpu", setup.compute_dtype, enabled=setup.uses_autocast),
    ):
        linear_cross_entropy(hidden, weight, labels).backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    memory = peak["Total"] - sum(x.nbytes for x in (hidden, weight, labels))
    return LossCost(memory, count.bytes, count.flops)
