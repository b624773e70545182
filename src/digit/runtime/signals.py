"""SIGINT, SIGTERM and SIGUSR1 ask the work to stop: it finishes its current unit, saves and ends."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from digit.errors import Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
ECHO_SECONDS = 2.0  # a launcher forwards the Ctrl-C that its processes already got from the terminal


class StopSignals:
    """A context in which a signal sets `asked` instead of ending the process; a second SIGINT interrupts at once.

        with StopSignals() as signals:
            for batch in work:
                do(batch)
                if signals.asked:
                    save()
                    raise Stopped("...")

    Batch systems send SIGTERM, or the signal that the user chose (Slurm's --signal), some time before they kill.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.received_at = 0.0

    @property
    def asked(self) -> bool:
        """Whether a signal arrived."""
        return self.received is not None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()  # Python sets handlers only there
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS if main}
        return self

    def __exit__(self, *problem: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        echo = "RANK" in os.environ and time.monotonic() - self.received_at < ECHO_SECONDS
        if self.asked and number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        if not self.asked:
            self.received, self.received_at = number, time.monotonic()


@contextmanager
def stoppable() -> Iterator[None]:
    """A context in which SIGTERM and SIGUSR1 raise Stopped, except inside a StopSignals, which handles them itself."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped", together=False)

    main = threading.current_thread() is threading.main_thread()  # Python sets handlers only there
    numbers = [number for number in SIGNALS if number != signal.SIGINT and main]
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
