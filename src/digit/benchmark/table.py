"""Formats measurements as a table, and collects them as JSON."""

import platform
from collections.abc import Sequence
from typing import Any

from digit.benchmark.measurement import Measurement
from digit.runtime.hardware import describe_machine
from digit.runtime.version import __version__

COLUMNS = ("part", "case", "", "rate", "slowest .. fastest", "floor", "of floor", "peak", "")
RIGHT = {3, 4, 5, 6, 7}
LEGEND = (
    "floor: the same matrix multiplications alone, by torch's fastest kernels here (or a memory copy, JPEG decoding),\n"
    "timed in alternation with the case; of floor: floor's time / ours (–: above 1, the\n"
    "timing was disturbed). peak: the most that torch allocated on a GPU;\n"
    "on a CPU the rise of resident memory in one round."
)


def header(arguments: dict[str, Any]) -> str:
    """Formats size, machine and versions as one line."""
    machine = describe_machine()
    gpus = f" · {', '.join(machine['gpus'])}" if machine["gpus"] else ""
    first = f"digit bench · {arguments['size']} · {arguments['device']} · {machine['processor']}, "
    return f"{first}{machine['threads']} threads{gpus} · torch {versions()['torch']}"


def table(measurements: Sequence[Measurement]) -> str:
    """Formats measurements as aligned columns under a header."""
    rows = [COLUMNS, *(_cells(measurement) for measurement in measurements)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in RIGHT else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(measurement: Measurement) -> tuple[str, ...]:
    low, high = measurement.spread
    floor = "" if measurement.floor_rate is None else number(measurement.floor_rate)
    of_floor = measurement.of_floor
    share = "" if of_floor is None else f"{of_floor:.0%}" if of_floor <= 1 else "–"
    peak = "" if measurement.peak is None else f"{measurement.peak / 2**20:,.0f} MiB"
    spread, notes = f"{number(low)} .. {number(high)}", "  ".join(note(k, v) for k, v in measurement.extra.items())
    rate = f"{number(measurement.rate)} {measurement.unit}/s"
    return (measurement.part, measurement.case, measurement.precision, rate, spread, floor, share, peak, notes)


def number(value: float) -> str:
    """Formats with at least three digits: 0.512, 12.3, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def note(name: str, value: float) -> str:
    """Formats one of a measurement's extra numbers."""
    known = {
        "whole_over_parts": f"whole {value:.2f} x its parts:",
        "data_wait": f"data wait {value:.2%}",
        "mfu": f"MFU {value:.1%}",
        "fit_seconds": f"{value:.3g} s",
        "inertia": f"inertia {value:.5g}",
    }
    return known.get(name) or f"{name.removesuffix('_share').replace('_', ' ')} {value:.0%}"


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide the speed."""
    import numpy
    import PIL
    import torch

    own = {"digit": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return own | {"cuda": torch.version.cuda, "numpy": numpy.__version__, "pillow": PIL.__version__}


def to_json(measurements: Sequence[Measurement], arguments: dict[str, Any]) -> dict[str, Any]:
    """Collects the measurements, and the machine, versions and arguments needed to repeat them."""
    results = [measurement.to_dict() for measurement in measurements]
    return {"machine": describe_machine(), "versions": versions(), "arguments": arguments, "results": results}
