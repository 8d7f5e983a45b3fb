"""Which implementation computes attention: torch's SDPA, torch's `varlen_attn`, or the package flash-attn.

Shapes: B batch, T queries, S keys, H attention heads, K key/value heads, D head size, N and M queries and keys of all
rows together.

| implementation | plain rows          | packed documents                                   | needs              |
|----------------|---------------------|----------------------------------------------------|--------------------|
| `sdpa`         | one call            | one call per document                              | nothing            |
| `varlen`       | SDPA's flash kernel | `torch.nn.attention.varlen`                        | CUDA               |
| `flash_attn`   | `flash_attn_func`   | `flash_attn_varlen_func`                           | package flash-attn |
| `fa3`, `fa4`   | as `varlen`, by the FlashAttention 3 or 4 that torch activates           | its package, GPU   |

All are exact and causal, and none builds a tensor of T × T. Half precision is float16 or bfloat16; in float32 and
float64 every implementation is `sdpa`.
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
"""From torch 2.12 on; before, keys and values are repeated for each query head."""

_PACKAGES = {"fa3": ("flash_attn_interface", {9}), "fa4": ("flash_attn.cute", {9, 10})}
"""Module and major compute capabilities of the implementations that torch activates."""


def select_implementation(name: str | None, device: torch.device) -> str:
    """Choose the implementation for a device, and activate it in torch where that is needed.

    By default: `fa4` and `fa3` where their packages are installed and the GPU is one of theirs (Blackwell, Hopper),
    then `varlen` where torch's takes grouped heads, then `flash_attn` where it is installed, then `varlen`. Without
    CUDA: `sdpa`.

    Args:
        name: One of `IMPLEMENTATIONS`; None chooses.
        device: Where attention runs.

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
            raise UsageError(f"model.attention: {chosen} needs the module {package}, which is not installed")
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
    """What needs no activation: torch's own unless it repeats keys and values where flash-attn would not."""
    return "varlen" if VARLEN_IS_GROUPED or flash_attn_varlen_func is None else "flash_attn"


@cache
def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def describe(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """What computes attention, in words, such as `varlen (torch.nn.attention.varlen) in bfloat16`.

    Args:
        name: What :func:`select_implementation` returned.
        device: Where attention runs.
        dtype: Of the activations.
    """
    name = usable_implementation(name, device.type, dtype)
    what = {
        "sdpa": "scaled_dot_product_attention",
        "varlen": "torch.nn.attention.varlen",
        "flash_attn": "package flash-attn",
        "fa3": "FlashAttention 3 by torch",
        "fa4": "FlashAttention 4 by torch",
    }[name]
    return f"{name} ({what}) in {str(dtype).removeprefix('torch.')}"


def usable_implementation(name: str | None, device_type: str, dtype: torch.dtype) -> str:
    """What runs for tensors of a device and a dtype: the named implementation if it can, else `sdpa`."""
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
    """Causal attention over whole rows, inside each document, or by a mask.

    Args:
        queries: [B, T, H, D].
        keys: [B, S, K, D], of the same dtype.
        values: [B, S, K, D], of the same dtype.
        documents: Bounds of packed documents, with T = S; None means that every row is one document.
        mask: [B or 1, 1, T, S], true where a query sees a key. None means causal: the last query of a row sees all of
            its keys, the one before it all but the last, and so on; S may exceed T.
        scale: Of the scores; None means 1 / √D.
        implementation: What :func:`select_implementation` returned; None chooses without activating any.

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
        return flash_attn_func(queries, keys, values, softmax_scale=scale, causal=True, deterministic=is_deterministic)
    rows, num_queries, num_keys = queries.shape[0], queries.shape[1], keys.shape[1]
    if implementation != "sdpa" and mask is None and 1 < num_queries < num_keys:
        row = torch.arange(rows + 1, dtype=torch.int32, device=queries.device)
        segments = Segments(row * num_queries, row * num_keys, num_queries, num_keys)
        return _attend_flattened(queries, keys, values, segments, scale, implementation)
    return _sdpa(queries, keys, values, mask=mask, scale=scale)


def _attend_flattened(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, scale: float | None, implementation: str
) -> Tensor:
    """:func:`attend_packed` of all rows."""
    q, k, v = (x.flatten(0, 1) for x in (queries, keys, values))
    return attend_packed(q, k, v, segments, scale=scale, implementation=implementation).view_as(queries)


class Segments(NamedTuple):
    """Bounds of consecutive pieces of queries and keys; the queries of a segment are the last of its keys."""

    query_bounds: Tensor
    """[segments + 1] int32: where the segments start among the queries, and the end."""

    key_bounds: Tensor
    """[segments + 1] int32: the same among the keys; no segment has fewer keys than queries."""

    longest_query: int
    """Queries of the longest segment, or more."""

    longest_key: int
    """Keys of the longest segment, or more."""


def attend_packed(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    implementation: str = "sdpa",
) -> Tensor:
    """Causal attention inside each of several segments; the last query of a segment sees all of its keys.

    Args:
        queries: [N, H, D].
        keys: [M, K, D].
        values: [M, K, D].
        segments: Bounds.
        scale: See :func:`attend`.
        implementation: What :func:`usable_implementation` returned.

    Returns:
        [N, H, D].
    """
    if implementation == "sdpa":
        return _attend_segments(queries, keys, values, segments.query_bounds, segments.key_bounds, scale)
    if implementation == "flash_attn":
        assert flash_attn_varlen_func is not None
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(
            queries, keys, values, *segments, softmax_scale=scale, causal=True, deterministic=is_deterministic
        )
    grouped: dict[str, Any] = {"enable_gqa": True} if VARLEN_IS_GROUPED else {}
    if not VARLEN_IS_GROUPED:
        keys, values = (_repeat_heads(x, queries) for x in (keys, values))
    # Causal is a window without anything to its right.
    output = varlen_attn(queries, keys, values, *segments, scale=scale, window_size=(-1, 0), **grouped)
    assert isinstance(output, Tensor)
    return output


@torch.compiler.disable  # the lengths decide how many calls there are, so each batch would be a graph of its own
def _attend_segments(
    queries: Tensor, keys: Tensor, values: Tensor, query_bounds: Tensor, key_bounds: Tensor, scale: float | None
) -> Tensor:
    """:func:`attend_packed` by one call of SDPA for each segment, which skips what a mask would only hide."""
    query_lengths, key_lengths = (bounds.diff().tolist() for bounds in (query_bounds, key_bounds))
    parts = zip(queries.split(query_lengths), keys.split(key_lengths), values.split(key_lengths), strict=True)
    return torch.cat([_sdpa(q[None], k[None], v[None], mask=None, scale=scale)[0] for q, k, v in parts])


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, scale: float | None) -> Tensor:
    """Torch's `scaled_dot_product_attention` with heads behind tokens; without a mask as causal as :func:`attend`."""
    if queries.shape[1] == 1:
        # Without causality among them, the heads that share a key/value head can be its queries: no kernel then repeats
        # keys and values, and one product reads them for the whole group.
        groups = queries.reshape(queries.shape[0], keys.shape[2], -1, queries.shape[3])
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        output = F.scaled_dot_product_attention(
            groups, keys, values, mask, is_causal=False, scale=scale, enable_gqa=False
        )
        return output.reshape(queries.shape)
    if queries.device.type == "cuda" and queries.dtype == torch.float32:
        # For float32 torch's only kernel of linear memory on CUDA does not take grouped heads.
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
        # With the last query first, row i of the mask is row 0 moved by i, so one row in memory serves as all of them.
        bias = queries.new_zeros(num_queries + num_keys - 1)
        bias[num_keys:] = -torch.inf
        bias = bias.as_strided((num_queries, num_keys), (1, 1))
        output = run(queries.flip(2), keys, values, bias, is_causal=False).flip(2)
    return output.transpose(1, 2)


def _repeat_heads(x: Tensor, queries: Tensor) -> Tensor:
    """Key/value heads [..., K, D], each as often as query heads [..., H, D] read it."""
    return x.repeat_interleave(queries.shape[-2] // x.shape[-2], dim=-2)
