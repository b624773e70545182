"""torch's profile of one round, to find where the time goes when a measurement misses its target."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from digit.benchmark import encode, kmeans, sample, train
from digit.benchmark.clock import synchronize
from digit.benchmark.sizes import Size
from digit.runtime.files import atomic_path

CASES = {"sample": sample.profiled, "train": train.profiled, "encode": encode.profiled, "kmeans": kmeans.profiled}
NUM_ROWS = 25  # operators in a table


def write_profile(parts: Sequence[str], size: Size, device: torch.device, path: str | Path) -> None:
    """Writes one table of operators per case, longest first, to a text file."""
    text = "\n\n".join(f"{part}: {name}\n{table}" for part in parts for name, table in profiles(part, size, device))
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def profiles(part: str, size: Size, device: torch.device) -> Iterator[tuple[str, str]]:
    """Yields (case, table) of each case of a part; the part data has none."""
    cases: dict[str, Callable[[], Any]] = CASES[part](size, device) if part in CASES else {}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for name, run in cases.items():
        run()
        synchronize(device)
        with profile(activities=activities) as recorded:
            run()
            synchronize(device)
        yield name, recorded.key_averages().table(sort_by=by, row_limit=NUM_ROWS)
