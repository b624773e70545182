"""What this machine is and does well: half-precision products, and memory that stays with the process."""

import ctypes
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digit.errors import DigitError

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


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads in use, memory and GPU, for results that should be repeatable."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": gpus,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def matmul_flops(device: "torch.device", seconds: float = 0.3) -> float:
    """Floating-point operations a second of bf16 (fp32 where bf16 is slow) products of 1024 x 1024 matrices."""
    import torch

    dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    a = torch.randn(1024, 1024, device=device, dtype=dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        a @ a
    wait()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ a
        wait()
        done += 1
    return done * 2 * 1024**3 / (time.perf_counter() - started)


def choose_device(name: str | None) -> "torch.device":
    """cuda where there is one, or the named device. Raises DigitError where it is not to be had."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DigitError(f"no device named {name!r}: choose cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DigitError("device is cuda, but torch sees no GPU: choose cpu")
    return device
