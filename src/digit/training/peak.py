"""Peak floating-point operations per second of a device, the denominator of model FLOPs utilisation (MFU)."""

from functools import cache

import torch

from digit.runtime.hardware import matmul_flops

# Published FLOPs per second of dense bf16 products; a device gets the first entry that its name contains
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
    """The published peak of a GPU by its driver's name for it; None if it is not in the table."""
    return next((rate for known, rate in PUBLISHED.items() if known in name), None)


def peak_flops(device: torch.device) -> float:
    """Peak FLOPs per second of one device: published if the table has the GPU, else measured (0.3 s).

    The peak is that of bf16 if the device multiplies it, whatever the run's precision, so an fp32 run shows a low MFU.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return published_flops(name) or _measured_flops(device)


@cache
def _measured_flops(device: torch.device) -> float:
    """Measured once per process."""
    return matmul_flops(device)
