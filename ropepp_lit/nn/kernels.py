"""Implementations of softmax attention: torch's SDPA, torch's `varlen_attn`, and the package flash-attn.

Shapes: B batch, T queries, S keys, H attention heads, K key/value heads, D head size, N queries and M keys of all rows.

| implementation | plain rows          | packed documents                                   | needs              |
|----------------|---------------------|----------------------------------------------------|--------------------|
| `sdpa`         | one call            | one call per document                              | nothing            |
| `varlen`       | SDPA's flash kernel | `torch.nn.attention.varlen`                        | CUDA               |
| `flash_attn`   | `flash_attn_func`   | `flash_attn_varlen_func`                           | package flash-attn |
| `fa3`, `fa4`   | as `varlen`, with FlashAttention 3 or 4 activated in torch               | its package, GPU   |

All are exact and causal, and none builds a T × T tensor. `sdpa` is used for float32 and float64 in any case; the others
support float16 and bfloat16 only.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from ropepp_lit.errors import UsageError, did_you_mean
from ropepp_lit.nn.documents import Documents

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:  # an extra, for CUDA only
    flash_attn_func = flash_attn_varlen_func = None

IMPLEMENTATIONS = ("sdpa", "varlen", "flash_attn", "fa3", "fa4")

VARLEN_IS_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether `varlen_attn` supports grouped heads (torch 2.12 and later); otherwise keys and values are repeated."""

_PACKAGES = {"fa3": ("flash_attn_interface", {9}), "fa4": ("flash_attn.cute", {9, 10})}
"""Module and supported major compute capabilities of the implementations that torch can activate."""


def select_implementation(name: str | None, device: torch.device) -> str:
    """Choose the implementation for a device, and activate it in torch where needed.

    The default is the first available of: `fa4` and `fa3` if their packages are installed and the GPU is Blackwell or
    Hopper respectively; `varlen` if torch's supports grouped heads; `flash_attn` if it is installed; `varlen`. Without
    CUDA it is `sdpa`.

    Args:
        name: One of `IMPLEMENTATIONS`; None chooses the default.
        device: Device of the computation.

    Raises:
        UsageError: no such implementation, or it cannot run here.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        near = did_you_mean(name, IMPLEMENTATIONS)
        known = ", ".join(IMPLEMENTATIONS)
        raise UsageError(f"model.attention: no implementation {name!r}; choose one of {known}{near}")
    if device.type != "cuda":
        if name not in (None, "sdpa"):
            raise UsageError(f"model.attention: {name} needs a CUDA device; leave it empty or choose sdpa")
        return "sdpa"
    chosen = name or _best(device)
    if chosen == "flash_attn" and flash_attn_varlen_func is None:
        raise UsageError("model.attention: flash_attn is not installed; pip install flash-attn --no-build-isolation")
    if chosen in _PACKAGES:
        package, capabilities = _PACKAGES[chosen]
        if not _is_installed(package):
            raise UsageError(f"model.attention: {chosen} needs the module {package}; it is not installed")
        if torch.cuda.get_device_capability(device)[0] not in capabilities:
            raise UsageError(f"model.attention: {chosen} does not run on {torch.cuda.get_device_name(device)}")
        try:
            activate_flash_attention_impl(chosen.upper())
        except (ImportError, RuntimeError) as error:  # built for another torch or CUDA, without these kernels
            reason = " ".join(str(error).split())
            raise UsageError(f"model.attention: {package} cannot be used ({reason}); choose varlen") from error
    elif current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    return chosen


def _best(device: torch.device) -> str:
    for name, capability in (("fa4", 10), ("fa3", 9)):
        if _is_installed(_PACKAGES[name][0]) and torch.cuda.get_device_capability(device)[0] == capability:
            return name
    return _built_in()


def _built_in() -> str:
    """Return the default without activation: `varlen`, unless it would repeat keys and values and flash-attn not."""
    return "varlen" if VARLEN_IS_GROUPED or flash_attn_varlen_func is None else "flash_attn"


@cache
def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def describe(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Return a description of the implementation, such as `varlen (torch.nn.attention.varlen) in bfloat16`.

    Args:
        name: Result of :func:`select_implementation`.
        device: Device of the computation.
        dtype: Dtype of the activations.
    """
    name = usable_implementation(name, device.type, dtype)
    provider = {
        "sdpa": "scaled_dot_product_attention",
        "varlen": "torch.nn.attention.varlen",
        "flash_attn": "package flash-attn",
        "fa3": "FlashAttention 3 by torch",
        "fa4": "FlashAttention 4 by torch",
    }[name]
    return f"{name} ({provider}) in {str(dtype).removeprefix('torch.')}"


def usable_implementation(name: str | None, device_type: str, dtype: torch.dtype) -> str:
    """Return the implementation for tensors of a device and a dtype: the given one if it supports them, else `sdpa`."""
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    return name or _built_in()


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    documents: Documents | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute causal attention over full rows or inside each document, or attention with a mask.

    Args:
        queries: [B, T, H, D].
        keys: [B, S, K, D], of the same dtype.
        values: [B, S, K, D], of the same dtype.
        documents: Bounds of packed documents, with T = S; None means that every row is one document.
        mask: [B or 1, 1, T, S], true where a query attends to a key. None means causal, aligned to the end: the last
            query of a row attends to all of its keys, the one before it to all but the last, and so on; S may exceed T.
        scale: Factor of the scores; None means 1 / √D.
        implementation: Result of :func:`select_implementation`; None chooses one that needs no activation.

    Returns:
        [B, T, H, D].
    """
    implementation = usable_implementation(implementation, queries.device.type, queries.dtype)
    if documents is not None and mask is None:
        bounds, longest = documents.cu_seqlens, documents.longest
        return _attend_flattened(
            queries, keys, values, Segments(bounds, bounds, longest, longest), scale, implementation
        )
    if implementation == "flash_attn" and mask is None:
        assert flash_attn_func is not None
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        output: Tensor = flash_attn_func(
            queries, keys, values, softmax_scale=scale, causal=True, deterministic=is_deterministic
        )
        return output
    rows, num_queries, num_keys = queries.shape[0], queries.shape[1], keys.shape[1]
    if implementation != "sdpa" and mask is None and 1 < num_queries < num_keys:
        row = torch.arange(rows + 1, dtype=torch.int32, device=queries.device)
        segments = Segments(row * num_queries, row * num_keys, num_queries, num_keys)
        return _attend_flattened(queries, keys, values, segments, scale, implementation)
    return _sdpa(queries, keys, values, mask=mask, scale=scale)


def _attend_flattened(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, scale: float | None, implementation: str
) -> Tensor:
    """Call :func:`attend_packed` with the tokens of all rows."""
    q, k, v = (x.flatten(0, 1) for x in (queries, keys, values))
    return attend_packed(q, k, v, segments, scale=scale, implementation=implementation).view_as(queries)


class Segments(NamedTuple):
    """Bounds of consecutive segments of queries and keys; the queries of a segment are aligned to its last keys."""

    query_bounds: Tensor
    """[segments + 1] int32: starts of the segments in the queries, and the end."""

    key_bounds: Tensor
    """[segments + 1] int32: the same for the keys; no segment has fewer keys than queries."""

    longest_query: int
    """Upper bound of the number of queries in a segment."""

    longest_key: int
    """Upper bound of the number of keys in a segment."""


def attend_packed(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    implementation: str = "sdpa",
) -> Tensor:
    """Compute causal attention inside each segment; the last query of a segment attends to all of its keys.

    Args:
        queries: [N, H, D].
        keys: [M, K, D].
        values: [M, K, D].
        segments: Bounds.
        scale: See :func:`attend`.
        implementation: Result of :func:`usable_implementation`.

    Returns:
        [N, H, D].
    """
    output: Tensor
    if implementation == "sdpa":
        output = _attend_segments(queries, keys, values, segments.query_bounds, segments.key_bounds, scale)
        return output
    if implementation == "flash_attn":
        assert flash_attn_varlen_func is not None
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        output = flash_attn_varlen_func(
            queries, keys, values, *segments, softmax_scale=scale, causal=True, deterministic=is_deterministic
        )
        return output
    grouped: dict[str, Any] = {"enable_gqa": True} if VARLEN_IS_GROUPED else {}
    if not VARLEN_IS_GROUPED:
        keys, values = (_repeat_heads(x, queries) for x in (keys, values))
    # Causal attention is a window that ends at the query.
    result = varlen_attn(queries, keys, values, *segments, scale=scale, window_size=(-1, 0), **grouped)
    assert isinstance(result, Tensor)
    return result


@torch.compiler.disable  # the number of calls depends on the lengths, so each batch would compile another graph
def _attend_segments(
    queries: Tensor, keys: Tensor, values: Tensor, query_bounds: Tensor, key_bounds: Tensor, scale: float | None
) -> Tensor:
    """Compute :func:`attend_packed` by one call of SDPA per segment, which skips the scores that a mask would hide."""
    query_lengths, key_lengths = (bounds.diff().tolist() for bounds in (query_bounds, key_bounds))
    parts = zip(queries.split(query_lengths), keys.split(key_lengths), values.split(key_lengths), strict=True)
    return torch.cat([_sdpa(q[None], k[None], v[None], mask=None, scale=scale)[0] for q, k, v in parts])


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, scale: float | None) -> Tensor:
    """Call torch's `scaled_dot_product_attention` for [B, T, H, D]; without a mask causal as in :func:`attend`."""
    if queries.shape[1] == 1:
        # With one token, the heads that share a key/value head can be passed as its queries: no kernel then repeats
        # keys and values, and one product reads them for the whole group.
        groups = queries.reshape(queries.shape[0], keys.shape[2], -1, queries.shape[3])
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        output = F.scaled_dot_product_attention(
            groups, keys, values, mask, is_causal=False, scale=scale, enable_gqa=False
        )
        return output.reshape(queries.shape)
    if queries.device.type == "cuda" and queries.dtype == torch.float32:
        # For float32, torch's only memory-efficient kernel on CUDA does not support grouped heads.
        keys, values = (_repeat_heads(x, queries) for x in (keys, values))
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    run = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=queries.shape[1] != keys.shape[1])
    if mask is not None:
        output = run(queries, keys, values, mask, is_causal=False)
    elif num_queries == num_keys:
        output = run(queries, keys, values, None, is_causal=True)
    elif queries.is_cuda:
        output = run(queries, keys, values, causal_lower_right(num_queries, num_keys), is_causal=False)
    else:
        # With the last query first, row i of the mask is row 0 shifted by i, so all rows are views of one in memory.
        bias = queries.new_zeros(num_queries + num_keys - 1)
        bias[num_keys:] = -torch.inf
        bias = bias.as_strided((num_queries, num_keys), (1, 1))
        output = run(queries.flip(2), keys, values, bias, is_causal=False).flip(2)
    return output.transpose(1, 2)


def _repeat_heads(x: Tensor, queries: Tensor) -> Tensor:
    """Repeat key/value heads [..., K, D] to the number of query heads [..., H, D]."""
    return x.repeat_interleave(queries.shape[-2] // x.shape[-2], dim=-2)
