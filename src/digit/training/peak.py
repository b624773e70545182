"""The most floating-point operations a second that a device can do, which a run's own are compared with (MFU)."""

from functools import cache

import torch

from digit.runtime.hardware import matmul_flops

# Dense bf16 products, FLOPs a second, as the makers publish them; the first name that the device's name contains
PUBLISHED = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def published_flops(name: str) -> float | None:
    """The rate of a GPU by the name that its driver gives; None where it is not in the table."""
    return next((rate for known, rate in PUBLISHED.items() if known in name), None)


def peak_flops(device: torch.device) -> float:
    """FLOPs a second of one device: published for a GPU that the table knows, else what plain products reach (0.3 s).

    In bf16 where the device multiplies it, whatever the precision of a run: an fp32 run shows what it leaves unused.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return published_flops(name) or _measured_flops(device)


@cache
def _measured_flops(device: torch.device) -> float:
    """Measured once per process."""
    return matmul_flops(device)
