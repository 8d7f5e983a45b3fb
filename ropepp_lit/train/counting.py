"""Counter of dispatched operations: floating-point operations, bytes read and written, collectives and bytes sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.nn.attention import varlen  # noqa: F401  # registers its operations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Collective(NamedTuple):
    """Kind of collective operation over groups of one size."""

    kind: str
    """`all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all`, `broadcast` or `send`."""
    ranks: int
    """Size of the groups."""


_SENT: dict[str, tuple[str, Callable[[float, int], float]]] = {
    "allgather": ("all-gather", lambda size, ranks: size * (ranks - 1)),
    "reducescatter": ("reduce-scatter", lambda size, ranks: size * (ranks - 1) / ranks),
    "allreduce": ("all-reduce", lambda size, ranks: 2 * size * (ranks - 1) / ranks),
    "alltoall": ("all-to-all", lambda size, ranks: size * (ranks - 1) / ranks),
    "broadcast": ("broadcast", lambda size, ranks: size),
    "isend": ("send", lambda size, ranks: size),
    "send": ("send", lambda size, ranks: size),
}
"""Collectives by the prefix of the operation's name: kind, and function of input bytes and ranks that returns the bytes
a rank sends (ring algorithms)."""


class Count(TorchDispatchMode):
    """Counts the operations that run in its context, on real or fake tensors.

    Args:
        reads_and_writes: Count the bytes that operations read and write too.

    Attributes:
        flops: Floating-point operations of matrix products and attention, by torch's formulas; for causal attention on
            the CPU and for `varlen_attn` only pairs that are not masked are counted.
        bytes: Bytes read and written by all operations except views, each tensor once per operation.
        calls: Number of calls of each collective.
        sent: Bytes that this rank sends in each collective.
    """

    def __init__(self, *, reads_and_writes: bool = False) -> None:
        super().__init__()
        self.reads_and_writes = reads_and_writes
        self.flops, self.bytes = 0.0, 0
        self.calls: defaultdict[Collective, int] = defaultdict(int)
        self.sent: defaultdict[Collective, float] = defaultdict(float)

    def add(self, other: Count, times: int = 1) -> None:
        """Add the counts of another, multiplied by `times`."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for collective in other.calls:
            self.calls[collective] += times * other.calls[collective]
            self.sent[collective] += times * other.sent[collective]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _FLOPS:
            self.flops += _FLOPS[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif func.namespace in ("c10d", "_c10d_functional"):
            self._collective(func, args)
        if self.reads_and_writes and not func.is_view and func.namespace == "aten":
            self.bytes += sum(_nbytes(x) for x in (args, kwargs, out))
        return out

    def _collective(self, func: Any, args: Any) -> None:
        name = func._opname.replace("_", "")
        kind, sent = next((rule for start, rule in _SENT.items() if name.startswith(start)), (None, None))
        if kind is None or sent is None:  # waits and barriers
            return
        indices = {argument.name: index for index, argument in enumerate(func._schema.arguments)}
        if "process_group" in indices:
            group = dist.ProcessGroup.unbox(args[indices["process_group"]])
        else:
            group = _resolve_process_group(args[indices["group_name"]])
        # In `c10d`, operations with an input and an output have the output first.
        source = (
            args[1] if func.namespace == "c10d" and kind in ("all-gather", "reduce-scatter", "all-to-all") else args[0]
        )
        collective = Collective(kind, group.size())
        self.calls[collective] += 1
        self.sent[collective] += sent(_nbytes(source), group.size())


def _nbytes(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor))


def _causal(flops: int, query: Tensor, key: Tensor, is_causal: bool) -> float:
    queries, keys = query.shape[2], key.shape[2]
    return flops * (keys + 1) / (2 * keys) if is_causal and queries == keys else flops


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, is_causal: bool = False, **_: Any
) -> float:
    return _causal(sdpa_flop_count(query.shape, key.shape, value.shape), query, key, is_causal)


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> float:
    flops = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    is_causal = rest[3]  # after the outputs, the sums of exponentials and the dropout
    return _causal(flops, query, key, is_causal)


def _varlen_flops(query: Tensor, key: Tensor, *bounds: Any, products: int) -> float:
    """Return the FLOPs of `products` matrix products over visible pairs.

    `bounds` starts with the cumulative lengths and maximum lengths of queries and keys. Segments must have the same
    length, because the values of tensors are not read. The last query of a segment attends to all of its keys.
    """
    query_bounds, _, longest_query, longest_key = bounds[:4]
    segments = query_bounds.shape[0] - 1
    if segments * longest_query != query.shape[0] or segments * longest_key != key.shape[0]:
        raise ValueError("the operations of segments of different lengths cannot be counted")
    pairs = segments * (longest_query * longest_key - longest_query * (longest_query - 1) / 2)
    return 2 * products * query.shape[1] * query.shape[2] * pairs


def _varlen_forward(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, **_: Any) -> float:
    return _varlen_flops(query, key, *bounds, products=2)


def _varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, *bounds: Any, **_: Any
) -> float:
    return _varlen_flops(query, key, *bounds, products=5)


_FLOPS: dict[Any, Callable[..., float]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    torch.ops.torch_attn._varlen_attn: _varlen_forward,
    torch.ops.torch_attn._varlen_attn_backward: _varlen_backward,
}
"""FLOPs of the CPU's flash kernel, which torch's table lacks, and of `varlen_attn`, for which torch counts masked pairs
too."""
