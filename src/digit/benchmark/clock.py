"""Timings that can be compared: warm-up, alternating cases, medians with their spread, peak memory."""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"  # proc(5): writing it to clear_refs sets VmHWM to what is resident now


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of each round of one case, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return median(self.seconds)

    def times(self, factor: float) -> "Timing":
        """The timing of `factor` repetitions of the case."""
        return Timing(tuple(s * factor for s in self.seconds))

    def plus(self, other: "Timing") -> "Timing":
        """The timing of both cases one after the other, round by round."""
        return Timing(tuple(a + b for a, b in zip(self.seconds, other.seconds, strict=True)))

    def over(self, other: "Timing") -> float:
        """Median over the rounds of this time / the other's. Both ran in each round, so drift cancels."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


@dataclass
class Peak:
    """Peak memory in bytes, set when the context ends; None if the system does not report it."""

    size: int | None = field(default=None)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished; CPU work is synchronous."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    cases: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, *, warm_up: bool = True
) -> tuple[dict[str, Timing], dict[str, int | None]]:
    """Times every case `repeats` times, alternating between cases after one warm-up round.

    Returns ({case: Timing}, {case: peak bytes of its first run}). On a GPU the peak is the most memory that torch
    allocated, weights included; on a CPU it is the rise of the resident set's high-water mark during the case.
    Without `warm_up` the first round counts too: for cases of many seconds, whose start-up time is negligible.
    """
    peaks: dict[str, int | None] = {}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats + warm_up):
        for name, run in cases.items():
            with peak_memory(device) if name not in peaks else nullcontext(Peak()) as peak:
                synchronize(device)
                started = time.perf_counter()
                run()
                synchronize(device)
                seconds[name].append(time.perf_counter() - started)
            peaks.setdefault(name, peak.size)
    return {name: Timing(tuple(taken[warm_up:])) for name, taken in seconds.items()}, peaks


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measures the peak memory of what runs inside, as defined in `alternate`."""
    peak = Peak()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        synchronize(device)
        peak.size = torch.cuda.max_memory_allocated(device)
        return
    before = resident("VmRSS") if reset_high_water() else None
    yield peak
    after = resident("VmHWM")
    if before is not None and after is not None:
        peak.size = max(0, after - before)


def reset_high_water() -> bool:
    """Returns freed memory to the system, so that its reuse counts, and resets the high-water mark, if possible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text(RESET_HIGH_WATER)
    except (OSError, AttributeError, TypeError):  # no glibc, no Linux, or not permitted
        return False
    return True


def resident(name: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes; None without /proc."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)
