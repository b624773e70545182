"""The queue in front of the model: turns, places, cancelling, slow jobs between quick ones, failures."""

import asyncio
import threading

import pytest
from studio_toys import wait_until

from digit.errors import DigitError
from digit.studio.jobs import MAX_OF_ONE, BusyError, Job, Worker


@pytest.fixture
def worker():
    made = Worker()
    yield made
    made.stop()


class Gate:
    """A job that waits until it is opened; the others queue behind it."""

    def __init__(self, worker: Worker):
        self.open, self.began = threading.Event(), threading.Event()
        self.job = worker.submit(Job(self.work, "gate"))
        assert self.began.wait(10)

    def work(self, job: Job) -> None:
        self.began.set()
        self.open.wait(30)


def collected(job: Job) -> list[tuple[str, dict]]:
    """All events of a job that has ended."""
    return [(event.kind, event.data) for event in job._events]


def ended(*jobs: Job) -> bool:
    return wait_until(lambda: all(job.ended for job in jobs))


def test_people_take_turns(worker):
    gate, order = Gate(worker), []
    jobs = [worker.submit(Job(lambda job, n=n: order.append(n), owner)) for n, owner in enumerate("aaaab")]
    gate.open.set()
    assert ended(*jobs) and order.index(4) <= 1  # the second person does not wait for all jobs of the first


def test_nobody_may_fill_the_queue(worker):
    gate = Gate(worker)
    for _ in range(MAX_OF_ONE):
        worker.submit(Job(lambda job: None, "a"))
    with pytest.raises(BusyError, match="of them yours"):
        worker.submit(Job(lambda job: None, "a"))
    worker.submit(Job(lambda job: None, "b"))
    gate.open.set()


def test_a_waiting_job_is_told_its_place(worker):
    async def told() -> list[int]:
        gate = Gate(worker)
        jobs = [worker.submit(Job(lambda job: None, str(n), asyncio.get_running_loop())) for n in range(3)]
        first = [event async for event in first_events(jobs[2])]
        gate.open.set()
        return first

    async def first_events(job):
        async for event in job.events():
            yield event.data["before"]
            return

    assert asyncio.run(told()) == [3]


def test_a_cancelled_job_ends_while_it_waits_and_while_it_runs(worker):
    gate, ran = Gate(worker), []
    waiting = worker.submit(Job(lambda job: ran.append(1)))
    worker.cancel(waiting)
    gate.open.set()
    began = threading.Event()

    def endless(job: Job) -> None:
        while True:
            began.set()
            job.emit("step")

    running = worker.submit(Job(endless))
    assert began.wait(10)
    worker.cancel(running)
    assert ended(waiting, running) and not ran
    assert collected(waiting)[-1] == collected(running)[-1] == ("error", {"text": "stopped"})


def test_quick_jobs_run_between_the_steps_of_a_slow_one(worker):
    order, go_on = [], threading.Event()

    def slow(job: Job):
        for step in range(4):
            order.append(f"step {step}")
            if not step:
                go_on.wait(10)
            yield

    job = worker.submit(Job(slow), slow=True)
    assert wait_until(lambda: order)
    quick = worker.submit(Job(lambda job: order.append("quick")))
    go_on.set()
    assert ended(job, quick) and order.index("quick") in (1, 2) and order[-1] == "step 3"


def test_a_cancelled_slow_job_closes_its_generator(worker):
    closed, began = threading.Event(), threading.Event()

    def slow(job: Job):
        try:
            while True:
                began.set()
                yield
        finally:
            closed.set()

    job = worker.submit(Job(slow), slow=True)
    assert began.wait(10)
    worker.cancel(job)
    assert ended(job)
    job.steps = None  # the last reference
    assert closed.wait(10)


@pytest.mark.parametrize("slow", [False, True])
def test_a_failed_job_ends_with_its_reason_and_the_next_one_runs(worker, slow, caplog):
    def mistaken(job: Job):
        raise DigitError("label 12 is out of range")

    def broken(job: Job):
        raise ZeroDivisionError("secret /home/me")

    jobs = [worker.submit(Job(work), slow=slow) for work in (mistaken, broken)]
    assert ended(*jobs)
    assert collected(jobs[0])[-1] == ("error", {"text": "label 12 is out of range"})
    assert "secret" not in collected(jobs[1])[-1][1]["text"] and "secret" in caplog.text
    last = worker.submit(Job(lambda job: job.emit("picture", index=1)))
    assert ended(last) and collected(last)[-2:] == [("picture", {"index": 1}), ("done", {})]


def test_a_slow_reader_gets_every_picture_and_the_newest_step(worker):
    def work(job: Job) -> None:
        for i in range(100):
            job.emit("step", i=i)
        for i in range(5):
            job.emit("picture", i=i)

    job = worker.submit(Job(work))
    assert ended(job)
    assert collected(job) == [("step", {"i": 99}), *(("picture", {"i": i}) for i in range(5)), ("done", {})]


def test_stopping_ends_every_job():
    worker = Worker()
    gate = Gate(worker)
    jobs = [worker.submit(Job(lambda job: None)) for _ in range(3)]
    gate.open.set()
    worker.stop()
    assert ended(*jobs)
    with pytest.raises(BusyError, match="closing"):
        worker.submit(Job(lambda job: None))
