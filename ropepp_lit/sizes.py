"""Parsing and formatting of human-readable sizes."""

from __future__ import annotations

import re
from fractions import Fraction

from ropepp_lit.errors import UsageError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}

_DIGITS = r"\d{1,18}"
"""Pattern of a number: enough digits for any file or context, and fewer than the limit of int()."""


def parse_bytes(key: str, text: str) -> int:
    """Parse a size such as 64MB (64 × 10⁶) or 80GiB (80 × 2³⁰) to bytes.

    Args:
        key: Name of the option, for the message.
        text: A number and a unit.

    Raises:
        UsageError: it is not a size of at least one byte.
    """
    match = re.fullmatch(rf"\s*({_DIGITS}(?:\.{_DIGITS})?)\s*([a-z]+)\s*", text, re.ASCII | re.IGNORECASE)
    size = int(Fraction(match[1]) * _UNITS.get(match[2].lower(), 0)) if match else 0
    if size < 1:
        raise UsageError(f"{key}: {text!r} is not a size such as 64MB or 80GiB")
    return size


def in_bytes(size: int) -> str:
    """Format a number of bytes, such as 4.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024  # type: ignore[assignment]
    return f"{size:,} bytes" if unit == "bytes" else f"{size:,.1f} {unit}"


def parse_tokens(key: str, text: str) -> list[int]:
    """Parse a list such as 512,1k,64k (k is 1,024) to numbers of tokens, ascending.

    Args:
        key: Name of the option, for the message.
        text: Comma-separated numbers.

    Raises:
        UsageError: an item is not a number of at least one token.
    """
    numbers = set()
    for word in text.split(","):
        match = re.fullmatch(rf"\s*({_DIGITS})(k?)\s*", word, re.ASCII | re.IGNORECASE)
        tokens = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if tokens < 1:
            raise UsageError(f"{key}: {word.strip()!r} is not a number of tokens such as 512 or 64k")
        numbers.add(tokens)
    return sorted(numbers)
