"""Sizes as people write them."""

from __future__ import annotations

import re

from ropepp_lit.errors import UsageError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(key: str, text: str) -> int:
    """Bytes of a size such as 64MB (64 × 10⁶) or 80GiB (80 × 2³⁰).

    Args:
        key: Names the size in the message.
        text: A number and a unit.

    Raises:
        UsageError: it is no size of a byte or more.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.ASCII | re.IGNORECASE)
    size = int(float(match[1]) * _UNITS.get(match[2].lower(), 0)) if match else 0
    if size < 1:
        raise UsageError(f"{key}: {text!r} is no size such as 64MB or 80GiB")
    return size
