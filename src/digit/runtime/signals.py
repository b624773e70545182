"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask the work to stop: it finishes its current unit, saves and ends.

Python runs a signal's handler in the main thread between two steps of Python code. That thread may hang in C code
instead: waiting for another process of the job, a disk, a compiler. `stoppable` therefore has a watchdog thread, which
ends the process where the main thread does not.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self

from digit.errors import Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
ECHO_SECONDS = 2.0  # a launcher forwards the Ctrl-C that its processes already got from the terminal
END_SECONDS = 5.0  # a process that has nothing to save must end within them
UNIT_SECONDS, UNITS = 15.0, 3  # one that works must finish its unit within them, or within the longest UNITS times
LOOK_EVERY = 0.1  # seconds, of the watchdog
_state: dict[str, Any] = {
    "watched": False, "received": None, "active": None, "saving": 0, "left_at": 0.0, "leaving": False,
}  # fmt: skip


def received() -> int | None:
    """The first signal that asked this process to stop, inside `stoppable`; None if there was none."""
    return _state["received"]


def handled() -> list[int]:
    """The signals that ask to stop; not SIGHUP where it is ignored, as under nohup."""
    return [number for number in SIGNALS if number != getattr(signal, "SIGHUP", None) or not is_ignored(number)]


def is_ignored(number: int) -> bool:
    """Whether whoever started this process had it ignore a signal."""
    return signal.getsignal(number) is signal.SIG_IGN


class StopSignals:
    """A context in which a signal sets `asked` instead of ending the process; a second SIGINT interrupts at once.

        with StopSignals() as signals:
            for batch in work:
                do(batch)
                if signals.asked:
                    save()
                    raise Stopped("...")

    Batch systems send SIGTERM, or the signal that the user chose (Slurm's --signal), some time before they kill. A
    signal that came to an earlier StopSignals of the same `stoppable`, which ended all the same, counts here too.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.received_at = 0.0
        self.longest = 0.0  # seconds of a unit

    @property
    def asked(self) -> bool:
        """Whether a signal arrived. Work asks after each of its units, which tells how long one takes."""
        now = time.monotonic()
        self.longest, self.looked_at = max(self.longest, now - self.looked_at), now
        return self.received is not None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()  # Python sets handlers only there
        self.outer, self.looked_at = _state["active"], time.monotonic()
        _state["active"], self.received = self, _state["received"]
        self.previous = {number: signal.signal(number, self._receive) for number in handled() if main}
        return self

    def __exit__(self, *problem: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        _state["active"], _state["left_at"] = self.outer, time.monotonic()
        _state["leaving"] |= problem[0] is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        echo = "RANK" in os.environ and time.monotonic() - self.received_at < ECHO_SECONDS
        if self.received is not None and number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            if _state["watched"]:
                _state["received"] = number


def stop_if_asked() -> None:
    """Raise as a signal outside StopSignals does, where one came to a StopSignals that ended all the same.

    Work that has units without a StopSignals of its own calls it after each.
    """
    busy = _state["active"] is not None or _state["saving"] or _state["leaving"]
    if _state["received"] is None or busy or threading.current_thread() is not threading.main_thread():
        return
    _state["leaving"] = True
    raise _interruption(_state["received"])


def _interruption(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped("stopped", together=False)


@contextmanager
def saving() -> Iterator[None]:
    """A context that a stop request waits for, however long it takes."""
    _state["saving"] += 1
    try:
        yield
    finally:
        _state["saving"] -= 1
        if _state["active"] is not None:
            _state["active"].looked_at = time.monotonic()


@contextmanager
def stoppable(give_up: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A context in which the first signal raises Stopped, or KeyboardInterrupt for SIGINT, except inside a StopSignals.

    Where the main thread does not end, or does not save, in time, the process ends with code 128 + the signal's number;
    `give_up` is called before, in another thread, to say so.
    """
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers only there
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if _state["received"] is None:  # others come while the work is being left, and must not disturb that
            _state.update(received=number, leaving=True)
            raise _interruption(number)

    _state.update(watched=True, received=None, active=None, saving=0, left_at=0.0, leaving=False)
    previous = {number: signal.signal(number, stop) for number in handled()}
    try:
        with watched(list(previous), give_up):
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _state.update(watched=False, received=None)


@contextmanager
def watched(numbers: list[int], give_up: Callable[[], None]) -> Iterator[None]:
    """A context with a watchdog: a thread that the system tells of signals, whatever the main thread does."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ended = threading.Event()
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, args=(reader, numbers, ended, give_up), daemon=True, name="digit-watchdog").start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(previous)
        writer.close()


def watch(reader: socket.socket, numbers: list[int], ended: threading.Event, give_up: Callable[[], None]) -> None:
    """Wait for a signal, then for the end of the work, and end the process where that does not come in time."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they are for the main thread, to interrupt its system calls
    with reader:
        number = None
        while number is None and (came := reader.recv(64)):
            number = next((byte for byte in came if byte in numbers), None)
    if number is None:
        return
    came_at = time.monotonic()
    while not ended.wait(LOOK_EVERY):
        if time.monotonic() > latest_end(came_at):
            exit_at_once(number, give_up)


def latest_end(came_at: float) -> float:
    """When the process must have ended, or finished the unit at hand, for a signal that came at `came_at`."""
    active, left_at = _state["active"], _state["left_at"]
    if _state["saving"]:
        return float("inf")
    if active is not None:
        return max(came_at, active.looked_at) + max(UNIT_SECONDS, UNITS * active.longest)
    if left_at > came_at:  # what is left to do is to tell the other processes, which may still save
        return left_at + UNIT_SECONDS
    return came_at + END_SECONDS


def exit_at_once(number: int, give_up: Callable[[], None]) -> NoReturn:
    """Say so, and end this process."""
    telling = threading.Thread(target=give_up, daemon=True)
    telling.start()
    telling.join(1.0)  # a terminal may hang too
    leave(128 + number)


def leave(code: int) -> NoReturn:
    """End this process and those that it started at once: Python itself would wait for threads, which may hang."""
    if (processes := sys.modules.get("multiprocessing")) is not None:
        with suppress(Exception):
            for child in processes.active_children():
                child.kill()
    os._exit(code)
