"""What this machine does well: half-precision products, and memory that stays with the process."""

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MIB = 2**20


def keep_freed_memory() -> bool:
    """Have glibc keep memory that is freed, and take blocks up to 32 MiB from it; returns whether this was possible.

    Encoders on one core ran 1.2 to 1.7 times as fast with it (docs/results.md). Nothing happens without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 32 * MIB) and mallopt(M_TRIM_THRESHOLD, 2047 * MIB))


def multiplies_bf16(device: "torch.device") -> bool:
    """Whether the device has bf16 products; a CPU without them emulates bf16 several times slower than fp32."""
    import torch

    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
