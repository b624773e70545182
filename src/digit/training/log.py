"""What a run tells: a progress bar, out/log.jsonl (one JSON object per line), and TensorBoard where it is installed."""

import json
import logging
import os
import time
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor

from digit.runtime import distributed
from digit.runtime.files import atomic_path, disk_errors
from digit.runtime.progress import Progress
from digit.training.faults import NotFiniteError, SpikeWatch, find_not_finite
from digit.training.tensorboard import TensorBoardWriter

logger = logging.getLogger(__name__)
Metrics = dict[str, float | Tensor]


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a torn last line is left out, and whatever else is no line of ours."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines


def last_metrics(out: Path) -> dict[str, float]:
    """The metrics of the last step in OUT/log.jsonl, those of its validation included; {} where nothing was logged."""
    lines = read_log(out / "log.jsonl") if (out / "log.jsonl").exists() else []
    lines = [line for line in lines if "note" not in line]
    return {k: v for line in lines if line["step"] == lines[-1]["step"] for k, v in line.items()}


def cut_log(path: Path, step: int) -> None:
    """Drop the lines past `step`, all of them where nothing is kept of the run: it writes them again."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_log(path) if 0 < step >= line.get("step", 0)]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


class RunLog:
    """Collects metrics without waiting for the device; reads them in one transfer when a line is due.

    It is part of a checkpoint: metrics whose line is not due yet when the run is cut short are not lost.
    """

    def __init__(
        self, out: Path, step: int, num_steps: int, *,
        description: str = "train", tensorboard: bool = True, peak_images_per_second: float | None = None,
    ):  # fmt: skip
        self.peak_images_per_second = peak_images_per_second
        self.description, self.num_steps = description, num_steps
        self.path, self.step = out / "log.jsonl", step
        self.pending: list[tuple[int, Metrics]] = []
        self.averaged = 0  # so many of the first are means over the ranks already: they came from a checkpoint
        self._file: IO[bytes] | None = None
        self.tensorboard_folder = out / "tensorboard" if tensorboard else None

    def state_dict(self) -> dict[str, Any]:
        """What is pending, the mean over the ranks; they all call this."""
        self._fetch()
        return {"pending": [list(entry) for entry in self._means()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending = [(int(step), {k: float(v) for k, v in f.items()}) for step, f in state["pending"]]
        self.averaged = len(self.pending)

    def _means(self) -> list[tuple[int, dict[str, float]]]:
        """The pending metrics, each the mean over the ranks, in one exchange."""
        own = self.pending[self.averaged :]
        means = iter(distributed.mean([value for _, metrics in own for value in metrics.values()]))
        return self.pending[: self.averaged] + [(step, {k: next(means) for k in metrics}) for step, metrics in own]

    def __enter__(self) -> Self:
        self._stack, self._board = ExitStack(), None
        self.seconds = 0.0  # of the whole run, over all its resumptions
        self.spikes = SpikeWatch()
        self._restart_clock()
        self.bar = Progress(self.description, total=self.num_steps, done=self.step) if distributed.is_main() else None
        if self.bar is not None:
            cut_log(self.path, self.step)
            self.seconds = last_metrics(self.path.parent).get("seconds", 0.0)
            lines = read_log(self.path) if self.path.exists() else []
            self.spikes = SpikeWatch(line["loss"] for line in lines if "loss" in line)
            self._stack.enter_context(self.bar)
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # unbuffered: else what a full disk refused would be written again, and refused again, at the end
                self._file = self._stack.enter_context(open(self.path, "ab", buffering=0))
            if self.tensorboard_folder is not None:
                self._open_tensorboard()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._stack.__exit__(*problem)
        self._file = None

    def _open_tensorboard(self) -> None:
        try:
            board = TensorBoardWriter(self.tensorboard_folder, purge_step=self.step + 1)
        except ImportError:
            if not self.step:  # once a run
                self.note("tensorboard is not installed: this file is the only log")
            return
        with disk_errors(self.tensorboard_folder):
            self._board = self._stack.enter_context(board)

    def _restart_clock(self) -> None:
        self.since, self.waited = time.perf_counter(), 0.0

    def add(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of finished step `step`; `data_seconds` is the time that step waited for its batch."""
        metrics = {k: v.detach() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        self.waited += float(metrics.pop("data_seconds", 0.0))
        self.step = step
        self.pending.append((step, metrics))
        if self.bar is not None:
            self.bar.update(1)

    def check(self) -> None:
        """Look at the pending metrics. Raises NotFiniteError at the first NaN or Inf, on all ranks if on one."""
        self._fetch()
        found = find_not_finite(self.pending)
        everyones = distributed.gather(found and (found.step, found.metrics))
        if told := [each for each in everyones if each is not None]:
            raise NotFiniteError(*min(told, key=itemgetter(0)), moved=True)

    def _fetch(self) -> None:
        """Bring the pending metrics to the CPU, in one transfer a device."""
        tensors = [(metrics, k) for _, metrics in self.pending for k, v in metrics.items() if isinstance(v, Tensor)]
        for device in {metrics[k].device for metrics, k in tensors}:
            here = [(metrics, k) for metrics, k in tensors if metrics[k].device == device]
            values = torch.stack([metrics[k].double().reshape(()) for metrics, k in here]).tolist()
            for (metrics, k), value in zip(here, values, strict=True):
                metrics[k] = value

    def write(self, images_per_step: int) -> None:
        """Write one line: the mean of each figure since the last one (over the ranks too), speed, its share of the
        hardware's peak (mfu, where that is known), data wait (the fraction of the time that went into waiting for
        batches) and the seconds since step 0."""
        self.check()
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        pending = self._means()
        names = list(dict.fromkeys(name for _, metrics in pending for name in metrics))
        columns = [[metrics[name] for _, metrics in pending if name in metrics] for name in names]
        line = {name: sum(column) / len(column) for name, column in zip(names, columns, strict=True)}
        if "lr" in line:
            line["lr"] = columns[names.index("lr")][-1]
        line["images_per_second"] = images_per_step * len(self.pending) / elapsed
        if self.peak_images_per_second is not None:
            line["mfu"] = line["images_per_second"] / self.peak_images_per_second
        line["data_wait"] = self.waited / elapsed
        line["seconds"] = self.seconds = self.seconds + elapsed
        self.pending.clear()
        self.averaged = 0
        self._restart_clock()
        self.put(line)
        if "loss" in line and (remark := self.spikes.look(line["loss"])) and self._file is not None:
            logger.warning("step %d: %s", self.step, remark)
            self.note(remark)

    def put(self, metrics: dict[str, float]) -> None:
        """Write `metrics` of the present step to the file, the bar and TensorBoard (rank 0)."""
        if self._file is None:
            return
        self._line({"step": self.step, **metrics})
        shown = ("loss", "lr", "images_per_second", "mfu", "data_wait")
        self.bar.update(0, **{name: value for name, value in metrics.items() if name in shown})
        if self._board is not None:
            with disk_errors(self.tensorboard_folder):
                self._board.add(metrics, self.step)

    def sync(self) -> None:
        """Bring the lines and curves so far to the disk: no checkpoint may outlive them in a power cut (rank 0)."""
        if self._file is None:
            return
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.sync()

    def note(self, text: str) -> None:
        """Write a remark to the file (rank 0)."""
        if self._file is not None:
            self._line({"step": self.step, "note": text})

    def _line(self, line: dict[str, Any]) -> None:
        with disk_errors(self.path):
            data = memoryview((json.dumps(line) + "\n").encode())
            while data:
                data = data[self._file.write(data) :]
