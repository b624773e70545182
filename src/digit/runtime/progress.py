"""Progress with metrics and remaining time: a bar on a terminal, a line every 15 s in a log file.

Work of several stages says so (`Stages`); every bar and line then names its stage and the time that all of them need.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from digit.runtime.output import Output, stderr
from digit.runtime.signals import stop_if_asked

if TYPE_CHECKING:
    from rich.text import Text

T = TypeVar("T")
LINE_EVERY_SECONDS = 15.0  # in a log file
MOST_OFF = 5.0  # how many times faster or slower than expected later stages are taken to be, at most
MAX_BAR, MIN_BAR, LEAST_BAR = 40, 10, 4  # columns: at most; beside less important parts; beside count and ETA alone
_state: dict[str, Any] = {"quiet": False, "stages": None, "bar": None}


def quiet(on: bool = True) -> None:
    """Turn all progress off (or on again): for tests and for programs that import DiGIT."""
    _state["quiet"] = on


def format_duration(seconds: float) -> str:
    """93.2 -> '1:33', 4000 -> '1:06:40'."""
    whole = int(max(0, seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_metric(name: str, value: Any) -> str:
    """('loss', 1.23456) -> 'loss 1.235'."""
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def format_metrics(metrics: dict[str, Any]) -> str:
    """{'loss': 1.23456, 'bad': 2} -> 'loss 1.235  bad 2'."""
    return "  ".join(format_metric(*entry) for entry in metrics.items())


class Stages:
    """The stages of one piece of work, as a context in which `enter` begins each.

    Args:
        names: the stages, in order.
        seconds: what each is expected to take, 0 where it is done already; empty if nobody knows.
    """

    def __init__(self, names: Sequence[str], seconds: Mapping[str, float] | None = None):
        self.names, self.seconds = list(names), dict(seconds or {})
        self.place, self.began = 0, 0.0
        self.spent: dict[str, float] = {}  # seconds of the stages that ended

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """A context in which stage `name` is at work."""
        self.place, self.began = self.names.index(name), time.monotonic()
        outer, _state["stages"] = _state["stages"], self
        try:
            yield
            self.spent[name] = time.monotonic() - self.began
        finally:
            _state["stages"] = outer

    @property
    def name(self) -> str:
        """Name of the stage at work."""
        return self.names[self.place]

    @property
    def title(self) -> str:
        """'stage 3 of 6'."""
        return f"stage {self.place + 1} of {len(self.names)}"

    def left(self, bar: "Progress") -> float | None:
        """Seconds that all stages still need; None where the estimate of one of them is missing.

        The stage at work needs what its own bar shows. A bar of another name counts a part of it.
        """
        later = self.names[self.place + 1 :]
        measured = bar.left()
        if measured is None or any(name not in self.seconds for name in later):
            return None
        if bar.description != self.name:
            expected = self.seconds.get(self.name, 0.0) - (time.monotonic() - self.began)
            if expected <= 0 and not later:  # longer than expected, and a part does not tell what comes after it
                return None
            measured = max(measured, expected)
        return measured + self._pace(bar, measured) * sum(self.seconds[name] for name in later)

    def _pace(self, bar: "Progress", measured: float) -> float:
        """What the stages so far, and the one at work, took of what was expected of them: the later ones will, too."""
        taken = {name: seconds for name, seconds in self.spent.items() if self.seconds.get(name)}
        if bar.description == self.name and self.seconds.get(self.name):
            taken[self.name] = time.monotonic() - self.began + measured
        expected = sum(self.seconds[name] for name in taken)
        return min(MOST_OFF, max(1 / MOST_OFF, sum(taken.values()) / expected)) if expected else 1.0


class Progress:
    """A bar as a context manager: `with Progress('prior', total=100) as bar: bar.update(1, loss=2.5)`."""

    def __init__(self, description: str, total: int | None = None, done: int = 0):
        self.description, self.total, self.done, self.first = description, total, done, done
        self.metrics: dict[str, Any] = {}
        self._bar: Any = None
        self._written = ""

    def __enter__(self) -> Self:
        self.started = self.last_line = time.monotonic()
        self._out = stderr()
        if not _state["quiet"] and watched(self._out):
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._out)  # type: ignore[arg-type]
            self._bar = Live(get_renderable=lambda: self._styled(console.width), console=console)
            self._bar.start()
            _state["bar"] = self._bar
        return self

    def update(self, advance: int = 1, **metrics: Any) -> None:
        """Add `advance` to the finished units and show the latest metrics."""
        stop_if_asked()
        self.done += advance
        self.metrics.update(metrics)
        if self._bar is None and time.monotonic() - self.last_line > LINE_EVERY_SECONDS:
            self.last_line = time.monotonic()
            self._line()

    def left(self) -> float | None:
        """Seconds to the end at the speed so far; None where speed or end are unknown."""
        elapsed, units = time.monotonic() - self.started, self.done - self.first
        if self.total is None or units <= 0:
            return None
        return max(0, self.total - self.done) * elapsed / units

    # ---------------------------------------------------------------- parts of a line

    def _count(self) -> str:
        return f"{self.done}" if self.total is None else f"{self.done}/{self.total}"

    def _eta(self) -> str:
        """'ETA 1:33'; nothing where there is no end."""
        if self.total is None:
            return ""
        left = self.left()
        return "ETA -:--" if left is None else f"ETA {format_duration(left)}"

    def _whole(self) -> str:
        """'all ~4:10', the time that all stages need; nothing without stages."""
        left = None if _state["stages"] is None else _state["stages"].left(self)
        return "" if left is None else f"all ~{format_duration(left)}"

    def _elapsed(self) -> str:
        return f"in {format_duration(time.monotonic() - self.started)}"

    def _title(self) -> str:
        return "" if _state["stages"] is None else _state["stages"].title

    # ---------------------------------------------------------------- a terminal

    def parts(self, width: int) -> dict[str, str]:
        """What fits into `width` columns: title, description, bar, count, eta, whole, elapsed, metrics, in this order.

        Count, ETA and bar always stay. The others leave in this order: the last metric first, the time elapsed, the
        time of all stages, the stage; at last the description is cut.
        """
        metrics = {name: format_metric(name, value) for name, value in dict(self.metrics).items()}
        names = list(metrics)
        parts = {"description": self.description, "bar": "", "count": self._count(), "eta": self._eta()}
        least = 0 if self.total is None else MIN_BAR
        more = {"title": self._title(), "whole": self._whole(), "elapsed": self._elapsed()} | metrics
        for name in ("title", "whole", *names[:1], "elapsed", *names[1:]):
            longer = parts | {name: more[name]}
            if columns(longer) + least > width:
                break
            parts = longer
        room = width - columns(parts)
        if self.total is not None:
            bar = min(MAX_BAR, max(LEAST_BAR, room))
            parts["bar"], room = self._drawn(bar), room - bar
        if room < 0:
            parts["description"] = self.description[: max(0, len(self.description) + room)]
        shown = ["title", "description", "bar", "count", "eta", "whole", "elapsed", *names]
        return {name: parts[name] for name in shown if parts.get(name)}

    def _drawn(self, width: int) -> str:
        share = min(1.0, self.done / self.total) if self.total else 1.0
        full = int(share * width)
        done, rest = "━─" if self._out.can_show("━─") else "#-"
        return done * full + rest * (width - full)

    def _styled(self, width: int) -> "Text":
        """The line with colours, for rich."""
        from rich.text import Text

        styles = {"bar": "cyan", "count": "green", "eta": "yellow", "title": "bold"}
        line = Text(no_wrap=True, overflow="crop", end="")
        for name, text in self.parts(width - 1).items():
            line.append(" " if len(line) else "").append(text, styles.get(name, ""))
        return line

    # ---------------------------------------------------------------- a log file

    def _line(self) -> None:
        if _state["quiet"]:
            return
        title = f"{self._title()}, " if self._title() else ""
        times = [text for text in ("" if self.left() is None else self._eta(), self._whole()) if text]
        count = "  ".join([f"{title}{self.description}: {self._count()} {self._elapsed()}", *times])
        line = f"{count}  {format_metrics(self.metrics)}".rstrip()
        if line == self._written:  # the last update had said so already
            return
        self._written = line
        self._out.write(line + "\n")
        self._out.flush()

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            _state["bar"] = None
        elif kind is None and time.monotonic() - self.started > 2.0:
            self._line()


def watched(out: Output) -> bool:
    """Whether a person watches a terminal that can move its cursor."""
    return out.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def columns(parts: dict[str, str]) -> int:
    """Width of the parts that are not empty, with a space between; one more space for the bar."""
    return sum(len(text) + 1 for name, text in parts.items() if text or name == "bar") - 1


def give_back_terminal() -> None:
    """Show the cursor again, where the process ends in the middle of a bar."""
    if _state["bar"] is not None:
        _state["bar"].console.show_cursor(True)
        _state["bar"].console.file.write("\n")


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar; `total` defaults to the iterable's length where it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total) as bar:
        for item in iterable:
            yield item
            bar.update()
