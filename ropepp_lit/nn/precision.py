"""Which dtype a computation runs in: the one rule for activations, and the one for what needs more precision."""

from __future__ import annotations

import torch
from torch import Tensor


def activation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of `x` run: autocast's where it is enabled, else that of `x`.

    Casting to it once saves autocast a cast of the same tensor for each product that reads it.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(device)
    return x.dtype


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: for angles, softmax and sums, whatever the dtype of the activations."""
    return torch.float64 if dtype == torch.float64 else torch.float32
