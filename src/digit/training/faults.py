"""Failures of training: metrics that are not finite, and losses that jump.

A run that stops at a NaN or Inf writes a crash dump, OUT/crash/step_00067000/, for `digit replay`:

    report.json         step, metrics, rows of the batch, settings, versions, the last good checkpoint
    batch.safetensors   the batch
    state/step_...      a checkpoint from just before the step, if the trainer checks before it changes the weights
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.files import plain, save_tensors, write_json
from digit.runtime.hardware import describe_machine
from digit.runtime.version import __version__

log = logging.getLogger(__name__)
ROWS_SHOWN = 8  # in the message; report.json has all rows
MAX_LOSSES, MIN_LOSSES = 50, 10  # earlier losses that a new one is compared with
SPIKE_DEVIATIONS, SPIKE_SHARE = 6.0, 0.1  # a spike exceeds both: standard deviations, fraction of the median


class NotFiniteError(DigitError):
    """A step whose metrics are not finite: `step` counts from 1; `moved` says that the weights have changed since."""

    def __init__(self, step: int, metrics: dict[str, Any], moved: bool = False):
        self.step, self.moved = step, moved
        self.metrics = {name: float(value) for name, value in metrics.items()}
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        super().__init__(f"step {step} gave {values}")


def find_not_finite(pending: Iterable[tuple[int, dict[str, float]]]) -> NotFiniteError | None:
    """An error for the first of several steps with a metric that is not finite, after the weights have changed."""
    for step, metrics in pending:
        if not all(math.isfinite(v) for v in metrics.values()):
            return NotFiniteError(step, metrics, moved=True)
    return None


def dump_crash(
    error: NotFiniteError,
    out: Path,
    batches: Callable[[int], dict[str, Tensor | None]] | None,
    settings: dict[str, Any],
    last_good: Path | None,
    save_state: Callable[[Path], Any],
) -> DigitError:
    """Write the crash dump and return the error for the user; all ranks call this.

    `save_state(folder)` writes the present state. It is called if that is the state before the step (not error.moved).
    """
    folder = out / "crash" / f"step_{error.step:08d}"
    read_rows: Any = getattr(batches, "rows", None)  # of the batches that know which rows of the store they read
    rows = None if read_rows is None else read_rows(error.step - 1).tolist()
    report = {
        "step": error.step,
        "metrics": error.metrics,
        "rows": rows,
        "settings": settings,
        "processes": distributed.world_size(),
        "last_good_checkpoint": None if last_good is None else str(last_good),
        "state": None if error.moved else "state",
        "version": __version__,
        "torch": torch.__version__,
        "machine": describe_machine(),
    }
    try:
        if distributed.is_main():
            write_json(folder / "report.json", plain(report))
            if batches is not None:
                batch = {k: v for k, v in batches(error.step - 1).items() if isinstance(v, Tensor)}
                save_tensors(folder / "batch.safetensors", batch)
        if not error.moved:
            save_state(folder / "state")
        dump = f"{folder} holds the batch{'' if error.moved else ' and the state before it'}"
    except (DigitError, OSError, RuntimeError) as fault:  # a full disk must not hide the error
        dump = f"no dump could be written ({fault})"
    batch_rows = "" if rows is None else f" (batch rows {', '.join(map(str, rows[:ROWS_SHOWN]))}, ...)"
    good = "there is no checkpoint yet" if last_good is None else f"the last good checkpoint is {last_good}"
    return DigitError(
        f"{error}{batch_rows}: lower learning_rate, raise warmup_steps, choose precision fp32, or allow some steps "
        f"to be skipped with max_skipped; {good}, {dump}"
    )


class SpikeDetector:
    """Detects a loss far above the losses logged before it, a sign of divergence."""

    def __init__(self, losses: Iterable[float] = ()):
        self.losses = deque(losses, maxlen=MAX_LOSSES)

    def check(self, loss: float) -> str | None:
        """A warning if `loss` is a spike, else None; later losses are compared with it in either case."""
        before = list(self.losses)
        self.losses.append(loss)
        if len(before) < MIN_LOSSES:
            return None
        median = statistics.median(before)
        spread = 1.4826 * statistics.median(
            abs(x - median) for x in before
        )  # standard deviation of a normal distribution
        if loss - median <= max(SPIKE_DEVIATIONS * spread, SPIKE_SHARE * abs(median)):
            return None
        return f"loss {loss:.4g} jumped above the usual {median:.4g}: a lower learning_rate is safer"
