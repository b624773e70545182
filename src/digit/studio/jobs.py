"""Jobs of several people on one model: a queue in front of one thread that runs it, with progress and cancelling.

One thread runs the model, since two would only share the same cores and memory. Quick jobs run from beginning to end,
in turn between the people who wait. Slow jobs are generators: the thread makes one step of them between two quick jobs,
and all their steps while nobody waits.
"""

import asyncio
import logging
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from digit.errors import DigitError

log = logging.getLogger(__name__)
MAX_WAITING, MAX_OF_ONE = 64, 16  # quick jobs that wait, in all and of one page
MAX_SLOW = 16
KEPT_LATEST = ("step", "progress", "queue")  # of these events only the newest matters: a slow reader misses the others
ALIVE_SECONDS = 1.0  # between signs of life of a waiting job, by which a closed page is noticed


class Cancelled(Exception):
    """The page that asked for a job is gone, or its person pressed Stop."""


class BusyError(DigitError):
    """Too many jobs wait."""


@dataclass(frozen=True)
class Event:
    """Something a job tells its page."""

    kind: str
    """queue, step, progress, picture, ..., and last done or error."""
    data: dict[str, Any]

    @property
    def last(self) -> bool:
        return self.kind in ("done", "error")


Steps = Generator[None, None, None]


class Job:
    """One request to the model, and the events that it sends to its page.

    Args:
        work: called in the thread of the model with the job. A slow job's returns a generator.
        owner: who asked, for taking turns.
        loop: the event loop in which `events` is read; None where nobody reads.
    """

    def __init__(
        self, work: Callable[["Job"], Any], owner: str = "", loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self.work, self.owner, self.loop = work, owner, loop
        self.steps: Steps | None = None  # of a slow job that has begun
        self.ended = False
        self._cancelled = threading.Event()
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()
        self._arrived = asyncio.Event()

    def emit(self, kind: str, **data: Any) -> None:
        """Send an event to the page. Raises Cancelled where nobody waits for it any more."""
        if self._cancelled.is_set():
            raise Cancelled
        self._put(Event(kind, data))

    def _put(self, event: Event) -> None:
        with self._lock:
            if self._events and event.kind in KEPT_LATEST and self._events[-1].kind == event.kind:
                self._events.pop()
            self._events.append(event)
        if self.loop is not None:
            with suppress(RuntimeError):  # the loop of this page is closed
                self.loop.call_soon_threadsafe(self._arrived.set)

    def finish(self, kind: str, **data: Any) -> None:
        """Send the last event; does nothing after it."""
        if not self.ended:
            self.ended = True
            self._put(Event(kind, data))

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask the job to end: it does at its next event."""
        self._cancelled.set()

    async def events(self) -> AsyncIterator[Event | None]:
        """The events until the last one; None as a sign of life where nothing happens."""
        while True:
            with self._lock:
                event = self._events.popleft() if self._events else None
            if event is not None:
                yield event
                if event.last:
                    return
                continue
            self._arrived.clear()
            with self._lock:
                if self._events:
                    continue
            try:
                await asyncio.wait_for(self._arrived.wait(), ALIVE_SECONDS)
            except TimeoutError:
                yield None


class Worker:
    """The thread that runs the model. `stop` ends it."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._slow: deque[Job] = deque()
        self._served: dict[str, int] = {}  # owner -> number of its last job
        self._count, self._stopping = 0, False
        self.running: Job | None = None
        self.finished = 0
        self._thread = threading.Thread(target=self._run, name="studio model", daemon=True)
        self._thread.start()

    def submit(self, job: Job, *, slow: bool = False) -> Job:
        """Let a job wait for its turn. Raises BusyError where too many wait."""
        with self._wake:
            if self._stopping:
                raise BusyError("the studio is closing: start it again")
            own = sum(other.owner == job.owner for other in self._waiting)
            if slow and len(self._slow) >= MAX_SLOW:
                raise BusyError(f"{len(self._slow)} long jobs wait already: try again in a minute")
            if not slow and (len(self._waiting) >= MAX_WAITING or own >= MAX_OF_ONE):
                raise BusyError(f"{len(self._waiting)} jobs wait already, {own} of them yours: try again in a minute")
            (self._slow if slow else self._waiting).append(job)
            self._tell_places()
            self._wake.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End a job, whether it waits or runs."""
        job.cancel()
        with self._wake:
            for jobs in (self._waiting, self._slow):
                if job in jobs:
                    jobs.remove(job)
                    job.finish("error", text="stopped")
                    if job.steps is not None:
                        job.steps.close()
            self._tell_places()

    def stop(self) -> None:
        """End the thread after the step at work, and every job."""
        with self._wake:
            self._stopping = True
            for job in (*self._waiting, *self._slow, *([self.running] if self.running else [])):
                job.cancel()
            self._wake.notify()
        self._thread.join(timeout=30)

    @property
    def waiting(self) -> int:
        """Jobs that wait or run."""
        with self._wake:
            return len(self._waiting) + len(self._slow) + (self.running is not None)

    def _tell_places(self) -> None:
        before = int(self.running is not None)
        for place, job in enumerate(self._waiting):
            if job.loop is not None and not job.cancelled:
                job._put(Event("queue", {"before": place + before}))

    def _next_quick(self) -> Job | None:
        """The first waiting job of the owner who was served least recently."""
        if not self._waiting:
            return None
        job = min(self._waiting, key=lambda job: self._served.get(job.owner, 0))
        self._waiting.remove(job)
        self._count += 1
        self._served[job.owner] = self._count
        if len(self._served) > 1000:  # owners come and go
            self._served = dict(sorted(self._served.items(), key=lambda entry: entry[1])[-100:])
        return job

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._slow or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    for job in (*self._waiting, *self._slow):
                        job.finish("error", text="the studio was closed")
                    return
                quick = self._next_quick()
                self.running = quick
                slow = self._slow.popleft() if self._slow else None
            if quick is not None:
                self._attempt(quick, self._whole)
            with self._wake:
                self.running = slow
            if slow is not None and self._attempt(slow, self._one_step):
                with self._wake:
                    self._slow.append(slow)
            with self._wake:
                self.running = None

    @staticmethod
    def _whole(job: Job) -> bool:
        job.work(job)
        return False

    @staticmethod
    def _one_step(job: Job) -> bool:
        """One step of a slow job; whether it goes on."""
        if job.cancelled:
            raise Cancelled
        steps: Steps = job.work(job) if job.steps is None else job.steps
        job.steps = steps
        try:
            next(steps)
        except StopIteration:
            return False
        return True

    def _attempt(self, job: Job, run: Callable[[Job], bool]) -> bool:
        """Run a job or a step of it and end it where that fails; whether it goes on."""
        if job.cancelled:
            job.finish("error", text="stopped")
            return False
        try:
            if run(job):
                return True
            job.finish("done")
        except Cancelled:
            job.finish("error", text="stopped")
        except DigitError as error:
            job.finish("error", text=str(error))
        except Exception as error:  # a bug must end neither the thread nor the page
            log.error("a job failed:\n%s", traceback.format_exc())
            job.finish("error", text=f"this failed inside the studio ({type(error).__name__}): see its terminal")
        self.finished += 1
        return False
