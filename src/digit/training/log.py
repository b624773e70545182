"""The log of a run: a progress bar, OUT/log.jsonl (one JSON object per line), and TensorBoard if installed."""

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor

from digit.runtime import distributed
from digit.runtime.files import as_path, atomic_path, disk_errors
from digit.runtime.progress import Progress
from digit.training.faults import NotFiniteError, SpikeDetector, find_not_finite
from digit.training.peak import PeakSpeed
from digit.training.tensorboard import TensorBoardWriter

logger = logging.getLogger(__name__)
Metrics = dict[str, float | Tensor]


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, without a torn last line and anything else that is not a log line."""
    lines = []
    for text in as_path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines


def last_metrics(out: Path) -> dict[str, float]:
    """The metrics of the last step in OUT/log.jsonl, including its validation; {} if nothing was logged."""
    lines = read_log(out / "log.jsonl") if (out / "log.jsonl").exists() else []
    lines = [line for line in lines if "note" not in line]
    return {k: v for line in lines if line["step"] == lines[-1]["step"] for k, v in line.items()}


def cut_log(path: Path, step: int) -> None:
    """Remove the lines after `step` (all lines at step 0), because the resumed run writes them again."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_log(path) if 0 < step >= line.get("step", 0)]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


class RunLog:
    """Collects metrics without waiting for the device and fetches them in one transfer when a line is due.

    It is part of a checkpoint, so a run that stops between two lines keeps the metrics since the last line.
    """

    def __init__(
        self, out: Path, step: int, num_steps: int, *,
        description: str = "train", tensorboard: bool = True, peak: PeakSpeed | None = None,
    ):  # fmt: skip
        self.peak, self.peak_is_wrong = peak, False
        self.description, self.num_steps = description, num_steps
        self.path, self.step = out / "log.jsonl", step
        self.pending: list[tuple[int, Metrics]] = []
        self.bar: Progress | None = None
        self.num_averaged = 0  # the first entries of pending, from a checkpoint, are already means over the ranks
        self._file: IO[bytes] | None = None
        self.tensorboard_folder = out / "tensorboard" if tensorboard else None

    def state_dict(self) -> dict[str, Any]:
        """The pending metrics, averaged over the ranks; all ranks call this."""
        self._fetch()
        return {"pending": [list(entry) for entry in self._means()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending = [(int(step), {k: float(v) for k, v in metrics.items()}) for step, metrics in state["pending"]]
        self.num_averaged = len(self.pending)

    def _means(self) -> list[tuple[int, dict[str, float]]]:
        """The pending metrics, averaged over the ranks in one exchange."""
        own = self.pending[self.num_averaged :]
        means = iter(distributed.mean([float(value) for _, metrics in own for value in metrics.values()]))
        averaged = [(step, {k: next(means) for k in metrics}) for step, metrics in own]
        kept = [
            (step, {k: float(v) for k, v in metrics.items()}) for step, metrics in self.pending[: self.num_averaged]
        ]
        return kept + averaged

    def __enter__(self) -> Self:
        self._stack, self._board = ExitStack(), None
        self.seconds = 0.0  # since step 0, over all resumptions
        self.spikes = SpikeDetector()
        self._restart_clock()
        self.bar = Progress(self.description, total=self.num_steps, done=self.step) if distributed.is_main() else None
        if self.bar is not None:
            cut_log(self.path, self.step)
            self.seconds = last_metrics(self.path.parent).get("seconds", 0.0)
            lines = read_log(self.path) if self.path.exists() else []
            self.spikes = SpikeDetector(line["loss"] for line in lines if "loss" in line)
            self._stack.enter_context(self.bar)
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # unbuffered: a buffer that a full disk refused would be written, and refused, again on closing
                self._file = self._stack.enter_context(open(self.path, "ab", buffering=0))
            if self.tensorboard_folder is not None:
                self._open_tensorboard()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._stack.__exit__(*problem)
        self._file = None

    def _open_tensorboard(self) -> None:
        assert self.tensorboard_folder is not None
        try:
            board = TensorBoardWriter(self.tensorboard_folder, purge_step=self.step + 1)
        except ImportError:
            if not self.step:  # once per run
                self.note("tensorboard is not installed: this file is the only log")
            return
        with disk_errors(self.tensorboard_folder):
            self._board = self._stack.enter_context(board)

    def _restart_clock(self) -> None:
        self.since, self.waited = time.perf_counter(), 0.0

    def add(self, step: int, metrics: Metrics) -> None:
        """Add the metrics of finished step `step`; its `data_seconds` is the time that it waited for its batch."""
        metrics = {k: v.detach() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        self.waited += float(metrics.pop("data_seconds", 0.0))
        self.step = step
        self.pending.append((step, metrics))
        if self.bar is not None:
            self.bar.update(1)

    def check(self) -> None:
        """Raise NotFiniteError for the first pending NaN or Inf, on all ranks if any has one."""
        self._fetch()
        error = find_not_finite((step, {k: float(v) for k, v in metrics.items()}) for step, metrics in self.pending)
        all_ranks = distributed.gather(error and (error.step, error.metrics))
        if failures := [failure for failure in all_ranks if failure is not None]:
            raise NotFiniteError(*min(failures, key=itemgetter(0)), moved=True)

    def _fetch(self) -> None:
        """Fetch the pending metrics to the CPU, in one transfer per device."""
        tensors = [(metrics, k, v) for _, metrics in self.pending for k, v in metrics.items() if isinstance(v, Tensor)]
        for device in {v.device for _, _, v in tensors}:
            entries = [entry for entry in tensors if entry[2].device == device]
            values = torch.stack([v.double().reshape(()) for _, _, v in entries]).tolist()
            for (metrics, k, _), value in zip(entries, values, strict=True):
                metrics[k] = value

    def write(self, images_per_step: int) -> None:
        """Write one line: the mean of each metric since the last line, over steps and ranks, and the speed.

        Speed: images_per_second; mfu, its share of the hardware's peak, if that is known and no less; data_wait, the
        fraction of the time spent waiting for batches; seconds since step 0. `lr` is the last one, not the mean.
        """
        self.check()
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        pending = self._means()
        names = list(dict.fromkeys(name for _, metrics in pending for name in metrics))
        columns = [[metrics[name] for _, metrics in pending if name in metrics] for name in names]
        line = {name: sum(column) / len(column) for name, column in zip(names, columns, strict=True)}
        if "lr" in line:
            line["lr"] = columns[names.index("lr")][-1]
        num_timed = len(self.pending) - self.num_averaged  # not those of a checkpoint, which an earlier process timed
        line["images_per_second"] = images_per_step * num_timed / elapsed
        line |= self._mfu(line["images_per_second"])
        line["data_wait"] = self.waited / elapsed
        line["seconds"] = self.seconds = self.seconds + elapsed
        self.pending.clear()
        self.num_averaged = 0
        self._restart_clock()
        self.put(line)
        if "loss" in line and (warning := self.spikes.check(line["loss"])) and self._file is not None:
            logger.warning("step %d: %s", self.step, warning)
            self.note(warning)

    def _mfu(self, images_per_second: float) -> dict[str, float]:
        """{"mfu": share of the peak}; {} where there is no peak, or one that the run exceeds, which is noted once."""
        if self.peak is None or self._file is None:
            return {}
        if (share := self.peak.share(images_per_second)) is not None:
            return {"mfu": share}
        if not self.peak_is_wrong:
            self.peak_is_wrong = True
            self.note("mfu is left out: the run is faster than the peak measured on this machine, which is busy")
        return {}

    def put(self, metrics: dict[str, float]) -> None:
        """Write `metrics` of the current step to the file, the progress bar and TensorBoard (rank 0)."""
        if self._file is None:
            return
        self._line({"step": self.step, **metrics})
        shown = ("loss", "lr", "images_per_second", "mfu", "data_wait")
        assert self.bar is not None
        self.bar.update(0, **{name: value for name, value in metrics.items() if name in shown})
        if self._board is not None and self.tensorboard_folder is not None:
            with disk_errors(self.tensorboard_folder):
                self._board.add(metrics, self.step)

    def show(self, pictures: Mapping[str, Path]) -> None:
        """Show PNG files of the current step in TensorBoard, by name (rank 0)."""
        if self._file is None or self._board is None or self.tensorboard_folder is None:
            return
        with disk_errors(self.tensorboard_folder):
            for name, path in pictures.items():
                self._board.add_picture(name, path, self.step)

    def sync(self) -> None:
        """Flush the log to the disk before a checkpoint, so that a power cut cannot lose only the log (rank 0)."""
        if self._file is None:
            return
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.sync()

    def note(self, text: str) -> None:
        """Write a note to the file (rank 0)."""
        if self._file is not None:
            self._line({"step": self.step, "note": text})

    def _line(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        with disk_errors(self.path):
            data = memoryview((json.dumps(line) + "\n").encode())
            while data:
                data = data[self._file.write(data) :]
