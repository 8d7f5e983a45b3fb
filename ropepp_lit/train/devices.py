"""Table of GPUs: peak throughput and memory, from the vendors' data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """Specification of a GPU."""

    tflops: float
    """Dense bfloat16 peak with float32 accumulation, in 10¹² operations per second."""
    memory: int
    """Memory in GiB."""


DEVICES = {
    "GB200": Device(2500, 186),
    "B200": Device(2250, 180),
    "H200 SXM": Device(989, 141),
    "H200 NVL": Device(835, 141),
    "H100 SXM": Device(989, 80),
    "H100 PCIe": Device(756, 80),
    "H100 NVL": Device(835, 94),
    "H20": Device(148, 96),
    "GH200": Device(989, 96),
    "A100 80GB": Device(312, 80),
    "A100 40GB": Device(312, 40),
    "A40": Device(150, 48),
    "A30": Device(165, 24),
    "A10": Device(125, 24),
    "A10G": Device(70, 24),
    "L40S": Device(362, 48),
    "L40": Device(181, 48),
    "L4": Device(121, 24),
    "RTX A6000": Device(155, 48),
    "RTX 5090": Device(209, 32),
    "RTX 4090": Device(165, 24),
    "RTX 3090": Device(71, 24),
    "MI325X": Device(1307, 256),
    "MI300X": Device(1307, 192),
    "MI250X": Device(191, 64),
}
"""Devices by the names that `plan --device` accepts. The MI250X is one of the two devices that torch shows for it."""

_NAMES = {
    "H100": "H100 SXM",
    "H100 80GB HBM3": "H100 SXM",
    "H200": "H200 SXM",
    "GH200 480GB": "GH200",  # the CPU's memory
    "A100": "A100 80GB",
    "A100 SXM4 80GB": "A100 80GB",
    "A100 80GB PCIe": "A100 80GB",
    "A100 SXM4 40GB": "A100 40GB",
    "A100 PCIE 40GB": "A100 40GB",
}
"""Aliases of the names in :data:`DEVICES`, without the vendor."""

_VENDORS = {"nvidia", "geforce", "amd", "instinct"}


def find_device(name: str) -> Device | None:
    """Return the device with a name such as `H100 PCIe`, or `NVIDIA H100 80GB HBM3`, which torch reports.

    All words of the name except the vendor's must match. An `NVIDIA GeForce RTX 4090 Laptop GPU`, a MIG partition or a
    variant that is not in the table has another peak, so the result is None.
    """
    known = {_words(key): device for key, device in DEVICES.items()}
    known |= {_words(alias): DEVICES[key] for alias, key in _NAMES.items()}
    return known.get(_words(name))


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[\s_-]+", name.strip().lower()) if word not in _VENDORS)


def peak_flops(name: str) -> float | None:
    """Return the dense bfloat16 peak of a device in operations per second; None if the device is unknown."""
    device = find_device(name)
    return None if device is None else 1e12 * device.tflops


def device_name() -> str | None:
    """Return the name of this process's GPU, or None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
