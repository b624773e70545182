"""Stopping on request: SIGINT, SIGTERM and SIGUSR1 let the work at hand finish and be saved; nothing is lost."""

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
ECHO_SECONDS = 2.0  # a launcher passes on the Ctrl-C that its processes got from the terminal too


class StopSignals:
    """Within the context the signals ask for a stop, and `asked` tells; a second SIGINT interrupts at once.

        with StopSignals() as signals:
            for batch in work:
                do(batch)
                if signals.asked:
                    save()
                    raise Stopped("...")

    Batch systems send SIGTERM, or what was agreed with them (Slurm's --signal), some time before they kill.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.when = 0.0

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.received is not None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS if main}
        return self

    def __exit__(self, *problem: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        echo = "RANK" in os.environ and time.monotonic() - self.when < ECHO_SECONDS
        if self.asked and number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        if not self.asked:
            self.received, self.when = number, time.monotonic()


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGTERM and SIGUSR1 raise Stopped where no StopSignals waits for them; there nothing is lost."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped", together=False)

    main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    numbers = [number for number in SIGNALS if number != signal.SIGINT and main]
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
