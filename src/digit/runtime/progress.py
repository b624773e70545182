"""Progress bars with ETA: a live bar on a terminal, sparse lines in a log file, nothing when quiet."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
LINE_EVERY_SECONDS = 15.0  # in a log file; a terminal gets a live bar instead
_state = {"quiet": False}


def quiet(on: bool = True) -> None:
    """Silence every bar from here on (tests, libraries that embed DiGIT)."""
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

            text, metrics = TextColumn("{task.description}"), TextColumn("{task.fields[metrics]}")
            columns = (
                text,
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                "ETA",
                TimeRemainingColumn(),
                metrics,
            )
            self._bar = Bars(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.done, metrics="")
        return self

    def update(self, advance: int = 1, **metrics: Any) -> None:
        """Move on by `advance` and show the latest metrics."""
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
        known = self.total is not None and rate > 0
        eta = f"  ETA {format_duration((self.total - self.done) / rate)}" if known else ""
        of = f"/{self.total}" if self.total is not None else ""
        took = format_duration(elapsed)
        sys.stderr.write(
            f"{self.description}: {self.done}{of} in {took}{eta}  {format_metrics(self.metrics)}".rstrip() + "\n"
        )
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
