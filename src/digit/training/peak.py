"""Peak floating-point operations per second of a device, the denominator of model FLOPs utilisation (MFU)."""

from dataclasses import dataclass

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


_measured: dict[torch.device, float] = {}  # the highest rate that this process has measured


def peak_flops(device: torch.device, *, again: bool = False) -> float:
    """Peak FLOPs per second of one device: published if the table has the GPU, else measured (0.3 s).

    It is measured once per process. `again` measures once more and keeps the higher rate: other programs can slow a
    measurement, and nothing can speed it up. The peak is that of bf16 if the device multiplies it, whatever the run's
    precision, so an fp32 run shows a low MFU.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if (published := published_flops(name)) is not None:
        return published
    if again or device not in _measured:
        _measured[device] = max(_measured.get(device, 0.0), matmul_flops(device))
    return _measured[device]


@dataclass(frozen=True, kw_only=True)
class PeakSpeed:
    """The speed that no run of a model can exceed, the denominator of its MFU."""

    device: torch.device
    flops_per_image: float
    num_devices: int = 1

    def share(self, images_per_second: float) -> float | None:
        """The share of the peak that a speed reaches, 0..1.

        Where it exceeds the peak, the peak is measured again. None where it still does: the peak is not known then.
        """
        flops = images_per_second * self.flops_per_image / self.num_devices
        share = flops / peak_flops(self.device)
        if share > 1:
            share = flops / peak_flops(self.device, again=True)
        return share if share <= 1 else None
