"""Printed descriptions of a run."""

import pytest
import torch

from ropepp_lit.train.callbacks import describe_precision


@pytest.mark.parametrize(
    ("precision", "device", "setting", "expected"),
    [
        ("bf16-mixed", "cuda", "highest", "bf16-mixed"),
        ("32-true", "cpu", "highest", "32-true"),
        ("32-true", "cuda", "highest", "32-true, matrix products without TF32"),
        ("32-true", "cuda", "high", "32-true, matrix products in TF32"),
    ],
)
def test_precision_on_a_gpu_reports_tf32(precision, device, setting, expected):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        description = describe_precision(precision, torch.device(device))
    finally:
        torch.set_float32_matmul_precision(before)
    assert description.partition(" (")[0] == expected
