"""Progress with metrics and remaining time: a rich bar on a terminal, a line every 15 s in a log file."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
LINE_EVERY_SECONDS = 15.0  # in a log file
_state = {"quiet": False}


def quiet(on: bool = True) -> None:
    """Turn all progress off (or on again): for tests and for programs that import DiGIT."""
    _state["quiet"] = on


def format_duration(seconds: float) -> str:
    """93.2 -> '1:33', 4000 -> '1:06:40'."""
    whole = int(max(0, seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_metrics(metrics: dict[str, Any]) -> str:
    """{'loss': 1.23456} -> 'loss 1.235'."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())


class Progress:
    """A bar as a context manager: `with Progress('prior', total=100) as bar: bar.update(1, loss=2.5)`."""

    def __init__(self, description: str, total: int | None = None, done: int = 0):
        self.description, self.total, self.done, self.first = description, total, done, done
        self.metrics: dict[str, Any] = {}
        self._bar: Any = None

    def __enter__(self) -> Self:
        self.started = self.last_line = time.monotonic()
        if not _state["quiet"] and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            description, metrics = TextColumn("{task.description}"), TextColumn("{task.fields[metrics]}")
            times = TimeElapsedColumn(), "ETA", TimeRemainingColumn()
            self._bar = Bars(
                description, BarColumn(), MofNCompleteColumn(), *times, metrics, console=Console(stderr=True)
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.done, metrics="")
        return self

    def update(self, advance: int = 1, **metrics: Any) -> None:
        """Add `advance` to the finished units and show the latest metrics."""
        self.done += advance
        self.metrics.update(metrics)
        if self._bar is not None:
            self._bar.update(self._task, advance=advance, metrics=format_metrics(self.metrics))
        elif time.monotonic() - self.last_line > LINE_EVERY_SECONDS:
            self.last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        if _state["quiet"]:
            return
        elapsed = time.monotonic() - self.started
        rate = (self.done - self.first) / elapsed if elapsed else 0.0
        total, eta = "", ""
        if self.total is not None:
            total = f"/{self.total}"
            eta = f"  ETA {format_duration((self.total - self.done) / rate)}" if rate > 0 else ""
        count = f"{self.description}: {self.done}{total} in {format_duration(elapsed)}{eta}"
        sys.stderr.write(f"{count}  {format_metrics(self.metrics)}".rstrip() + "\n")
        sys.stderr.flush()

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and time.monotonic() - self.started > 2.0:
            self._line()


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar; `total` defaults to the iterable's length where it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total) as bar:
        for item in iterable:
            yield item
            bar.update()
