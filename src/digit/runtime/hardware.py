"""This machine: its devices, its speed, whether it multiplies bfloat16, and how malloc treats freed memory."""

import ctypes
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from digit.errors import DigitError
from digit.runtime import distributed

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]  # of matrix products, wherever a setting names it
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt parameters in glibc's malloc.h
MIB = 2**20
T = TypeVar("T")
log = logging.getLogger(__name__)


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory for blocks up to 32 MiB instead of returning it to the system.

    Returns whether glibc accepted; without glibc nothing happens. Encoders on one core ran 1.2 to 1.7 times as fast
    with it (docs/results.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 32 * MIB) and mallopt(M_TRIM_THRESHOLD, 2047 * MIB))


def in_own_thread(work: Callable[[], T]) -> T:
    """Call `work` in a thread that ends with it, and give what it gives.

    For what uses torch beside a thread in which a model runs. GNU OpenMP keeps the workers of every thread that ran
    something parallel, and lets them wait actively only while no more of them exist than cores: with the workers of an
    idle second thread a decoding step of 16 images took 1.7 times as long on two cores.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def multiplies_bf16(device: "torch.device") -> bool:
    """Whether the device multiplies bf16 in hardware; emulation on a CPU took 45 times as long as fp32."""
    import torch

    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def hardware_precision(wanted: Precision, device: "torch.device") -> Precision:
    """`wanted`, but fp32 where the device only emulates bf16: a log line says so once."""
    if wanted == "fp32" or multiplies_bf16(device):
        return wanted
    _say_emulated(device.type)
    return "fp32"


@cache
def _say_emulated(device: str) -> None:
    log.warning("this %s has no bf16 arithmetic, and emulating it is several times as slow: sampling in fp32", device)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, memory and GPUs: recorded beside results so that others can repeat them."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(physical_memory() / 2**30, 1),
        "gpus": gpus,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def physical_memory() -> int:
    """Bytes of memory that this machine has, or that a container or batch system leaves to the job; 0 if unknown."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with suppress(OSError, ValueError):  # another system, or "max": no limit
            whole = min(whole, int(limit.read_text()))
    return whole


def free_memory(device: "torch.device") -> int:
    """Bytes of memory that this process may still take on a device.

    On a GPU what is free there, and what torch keeps unused; on a CPU what the system calls available, at most what a
    container leaves to the job, shared among the job's processes on this machine; half of the memory where no system
    says it.
    """
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = physical_memory() // 2 or 2**32
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))  # kB
        free = min(available, physical_memory())
    return free // distributed.local_size()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def matmul_flops(device: "torch.device", seconds: float = 0.3) -> float:
    """Floating-point operations per second of products of 1024 x 1024 matrices in bf16 (fp32 if bf16 is emulated)."""
    import torch

    dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    a = torch.randn(1024, 1024, device=device, dtype=dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        torch.mm(a, a)
    wait()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.mm(a, a)
        wait()
        done += 1
    return done * 2 * 1024**3 / (time.perf_counter() - started)


@dataclass(frozen=True)
class CPUSpeed:
    """What the cores of this process do, and what other programs leave of it now."""

    flops: float
    """Floating-point operations per second of all cores, were they this process's alone."""
    free: float
    """Share of it that this process got while it was measured, in (0, 1]."""
    cores: float
    """How many that are: fewer than the machine has where threads, affinity or a container's quota are fewer."""


def cpu_speed(seconds: float = 0.3) -> CPUSpeed:
    """Speed of products as in `matmul_flops` on the CPU, by the time that the cores spent on them.

    Another program takes wall time, but hardly CPU time: a machine that is busy at the moment has the same `flops`.
    Threads that wait for a core while others spin would lower it, so the upper quartile of the products counts.
    """
    import torch

    a = torch.randn(1024, 1024, dtype=torch.bfloat16 if multiplies_bf16(torch.device("cpu")) else torch.float32)
    cores = min(torch.get_num_threads(), cores_of_this_process(), cpu_quota() or math.inf)
    for _ in range(3):
        torch.mm(a, a)
    started, cpu_times = time.perf_counter(), []
    while time.perf_counter() - started < seconds or len(cpu_times) < 4:
        before = time.process_time()
        torch.mm(a, a)
        cpu_times.append(time.process_time() - before)
    wall = (time.perf_counter() - started) / len(cpu_times)
    spent = max(sorted(cpu_times)[len(cpu_times) // 4] / cores, 1e-9)
    return CPUSpeed(2 * 1024**3 / spent, min(1.0, spent / wall), cores)


def cpu_quota() -> float | None:
    """Cores that a container leaves to the job (0.5, 2.0); None without such a limit."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()[:2]
        return float(quota) / float(period)  # ValueError for "max": no limit
    return None


def choose_device(name: "str | torch.device | None") -> "torch.device":
    """The named device; without a name, cuda if there is a GPU, else cpu. Raises DigitError where it does not exist."""
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except (RuntimeError, TypeError) as error:
        raise DigitError(f"no device named {name!r}: choose cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise DigitError(f"device is {device}: choose cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DigitError(f"device is {device}, but torch sees no GPU: choose cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DigitError(f"device is {device}, but torch sees {torch.cuda.device_count()}: choose cuda:0 and so on")
    if device.type == "cuda" and distributed.launched_size() > 1:  # a number would put every rank on one GPU
        device = torch.device("cuda", distributed.own_gpu(torch.cuda.device_count()))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs belong to the current device
    return device


@contextmanager
def full_precision(device: "torch.device") -> Iterator[None]:
    """float32 products and convolutions at full precision, whatever autocast or the process's settings say.

    On a GPU cuDNN's convolutions otherwise round to TF32, which changes one token of two thousand.
    """
    import torch

    precision, tf32 = None, None
    with suppress(RuntimeError):  # set by backend through torch's newer interface, which refuses to mix the two
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    with suppress(RuntimeError):
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        if tf32 is not None:
            torch.backends.cudnn.allow_tf32 = tf32


def cores_of_this_process() -> int:
    """Cores that this process may use: those it is allowed to run on, shared among the job's processes here."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // distributed.local_size())
