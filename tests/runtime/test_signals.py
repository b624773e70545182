"""Requests to stop are heeded within seconds, whatever the process waits for, and set the exit code."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from digit.errors import Stopped
from digit.runtime import signals
from digit.runtime.progress import Progress
from digit.runtime.signals import StopSignals, handled, latest_end, received, saving, stoppable

PATIENCE = 60.0  # seconds for a process to start on a busy machine
SETTINGS = "signals.END_SECONDS = signals.UNIT_SECONDS = 0.5"
START = f"""
import ctypes, os, signal, sys, threading, time
from contextlib import suppress
from digit.errors import Stopped
from digit.runtime import signals
from digit.runtime.signals import StopSignals, saving, stoppable
{SETTINGS}
libc, mutex = ctypes.CDLL(None), (ctypes.c_char * 64)()
libc.pthread_mutex_lock(mutex)
def hang():  # in C for ever, whatever signals come, as on a dead disk
    libc.pthread_mutex_lock(mutex)
give_up = lambda: sys.stdout.write("gave up") and sys.stdout.flush()
"""


def stopped(code: str, number: int, *, ignored: int | None = None) -> tuple[int, str]:
    """Exit code and output of a process that gets a signal once it has said that it is ready."""
    ignore = (lambda: signal.signal(ignored, signal.SIG_IGN)) if ignored else None
    process = subprocess.Popen(
        [sys.executable, "-c", START + textwrap.dedent(code)], stdout=subprocess.PIPE, preexec_fn=ignore
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    process.send_signal(number)
    began = time.monotonic()
    try:
        output = process.communicate(timeout=PATIENCE)[0].decode()
    finally:
        process.kill()
    assert time.monotonic() - began < 30
    return process.returncode, output


HANGS = {  # before the process says that it is ready, and after
    "in C": ("", "hang()"),
    "for a store": (
        "import torch.distributed as dist; from datetime import timedelta",
        "dist.TCPStore('127.0.0.1', 0, 2, True, timedelta(seconds=60), wait_for_workers=True)",
    ),
    "in a loop that swallows all": ("", "while True:\n  try: time.sleep(60)\n  except BaseException: pass"),
    "in a pool that waits for its threads": (
        "from concurrent.futures import ThreadPoolExecutor",
        "with ThreadPoolExecutor(1) as pool: pool.submit(hang).result()",
    ),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", HANGS)
def test_a_process_that_hangs_ends_with_the_code_of_its_signal(where, number):
    before, hang = HANGS[where]
    code = f"{before}\nwith stoppable(give_up):\n  print('ready', flush=True)\n" + textwrap.indent(hang, "  ")
    assert stopped(code, number) == (128 + number, "gave up")


def test_python_does_not_wait_for_a_thread_that_hangs():
    code = """
    threading.Thread(target=hang).start()
    with suppress(Stopped), stoppable():
        print("ready", flush=True)
        time.sleep(60)
    signals.leave(143)
    """
    assert stopped(code, signal.SIGTERM) == (143, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_work_whose_unit_does_not_end_is_given_up(number):
    code = """
    with stoppable(give_up), StopSignals() as asked:
        for _ in range(5):
            time.sleep(0.02)
            assert not asked.asked
        print("ready", flush=True)
        while True:
            hang()
    """
    assert stopped(code, number) == (128 + number, "gave up")


def test_a_save_is_waited_for():
    code = """
    with stoppable(give_up), StopSignals() as asked:
        print("ready", flush=True)
        while not asked.asked:
            time.sleep(0.01)
        with saving():
            time.sleep(2)
        print("saved", flush=True)
    """
    assert stopped(code, signal.SIGTERM) == (0, "saved\n")


def test_a_giving_up_that_hangs_ends_all_the_same():
    code = "with stoppable(hang):\n  print('ready', flush=True)\n  hang()"
    assert stopped(code, signal.SIGTERM) == (143, "")


def test_nohup_stays_in_force():
    code = "with stoppable():\n    print('ready', flush=True)\n    time.sleep(1)\nprint('done')"
    assert stopped(code, signal.SIGHUP, ignored=signal.SIGHUP) == (0, "done\n")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in handled()
    signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in handled()


def test_a_second_signal_does_not_disturb_the_leaving():
    with pytest.raises(Stopped), stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            assert received() == signal.SIGTERM


def test_a_signal_that_came_too_late_for_one_unit_stops_the_next():
    with stoppable():
        with StopSignals():
            os.kill(os.getpid(), signal.SIGTERM)
        with StopSignals() as later:
            assert later.asked
    with StopSignals() as another:
        assert not another.asked


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_came_too_late_for_one_unit_stops_the_next_bar(number, error):
    with pytest.raises(error), stoppable():
        with StopSignals(), Progress("sample", 1) as bar:
            os.kill(os.getpid(), number)
            bar.update()  # the unit that was at hand
        try:
            with Progress("judge", 2) as bar:
                bar.update()
                raise AssertionError("a unit was counted")
        finally:
            with Progress("clean up", 1) as bar:
                bar.update()  # leaving is not disturbed
    assert received() is None


def test_limits_of_waiting(monkeypatch):
    monkeypatch.setattr(signals.time, "monotonic", lambda: 100.0)
    with stoppable():
        assert latest_end(100.0) == 100.0 + signals.END_SECONDS
        with StopSignals() as asked:
            assert latest_end(90.0) == 100.0 + signals.UNIT_SECONDS
            monkeypatch.setattr(signals.time, "monotonic", lambda: 140.0)
            assert not asked.asked and latest_end(110.0) == 140.0 + signals.UNITS * 40.0
            with saving():
                assert latest_end(110.0) == float("inf")
        assert latest_end(130.0) == 140.0 + signals.UNIT_SECONDS


def test_handlers_and_wakeup_descriptor_are_as_before():
    numbers, (reader, writer) = handled(), socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    before = [signal.getsignal(number) for number in numbers]
    with stoppable(), StopSignals():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == writer.fileno() and received() is None
    reader.close()
    writer.close()
