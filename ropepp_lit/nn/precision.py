"""Rules for dtypes: one for activations, and one for computations that need more precision."""

from __future__ import annotations

import torch
from torch import Tensor


def activation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products of `x` run: autocast's where it is enabled, else that of `x`.

    A single cast to it avoids autocast's cast of the same tensor for each product that reads it.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(device)
    return x.dtype


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32: for angles, softmax and sums, whatever the dtype of activations."""
    return torch.float64 if dtype == torch.float64 else torch.float32
