"""Judges inputs in worker processes, so that a crash, a hang or excessive memory is detected and survived."""

import json
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from digit.errors import DigitError

MEMORY_BYTES = 3 * 2**29  # resident, beyond the worker's memory before the first input
HEADROOM_BYTES = 2**32  # data segment beyond that; the system refuses more
CPU_SECONDS = 5.0
WALL_SECONDS = 60.0  # until a silent worker is killed; long, because the machine may be busy
INPUTS_PER_WORKER = 200
MEMORY_WORDS = ("alloc", "out of memory", "bad_array_new_length")


class Loader(Protocol):
    """One kind of input: builds damaged inputs from random numbers, and loads one from a folder."""

    name: str

    def prepare(self) -> None:
        """Optional: computes once, before workers are forked, what all inputs need."""
        ...

    def build(self, folder: Path, rng: random.Random) -> None:
        """Writes one damaged input to an empty folder."""
        ...

    def load(self, folder: Path) -> None:
        """Loads all of it. Raises AssertionError if something was accepted that must not be."""
        ...


@dataclass(frozen=True)
class Verdict:
    """The result of one input."""

    number: int
    kind: str  # accepted, refused, or a finding: exception, not one line, memory, slow, hang, killed, not built
    detail: str = ""

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("accepted", "refused")


def build_input(loader: Loader, folder: Path, number: int, seed: int = 0) -> None:
    """Builds input `number` of a loader, with the same bytes in every run."""
    loader.build(folder, random.Random(f"{loader.name} {seed} {number}"))


def judge(load: Callable[[Path], None], folder: Path) -> tuple[str, str]:
    """(kind, detail) of loading one folder in this process."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(folder)
        kind, detail = "accepted", ""
    except DigitError as error:
        kind, detail = "refused", str(error)
        if "\n" in detail or not detail.strip() or len(detail) > 2000:
            kind, detail = "not one line", f"{len(detail)} characters: {detail[:200]!r}"
        elif cause := _memory_cause(error):
            kind, detail = "memory", cause
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = next((f for f in reversed(where) if "digit" in f.filename and "fuzz" not in f.filename), where[-1])
        kind = "exception"
        detail = f"{type(error).__name__} at {Path(ours.filename).name}:{ours.lineno}: {str(error)[:200]!r}"
    if kind in ("accepted", "refused") and (took := time.process_time() - start) > CPU_SECONDS:
        kind, detail = "slow", f"{took:.1f} s, {kind} {detail}"
    return kind, detail


def _memory_cause(error: BaseException | None) -> str:
    """The failed allocation that caused an error; empty if there is none."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        text = str(error).lower()
        if isinstance(error, MemoryError) or (
            not isinstance(error, DigitError) and any(word in text for word in MEMORY_WORDS)
        ):
            return f"{type(error).__name__}: {str(error)[:200]!r}"
        seen.append(error)
        error = error.__cause__ or error.__context__
    return ""


def judge_all(loader: Loader, numbers: Sequence[int], seed: int = 0) -> Iterator[Verdict]:
    """Yields a verdict for each number, in order."""
    getattr(loader, "prepare", int)()
    waiting = list(numbers)
    while waiting:
        done = 0
        for verdict in _one_worker(loader, waiting[:INPUTS_PER_WORKER], seed):
            yield verdict
            done += 1
        waiting = waiting[done:]


def _one_worker(loader: Loader, numbers: Sequence[int], seed: int) -> Iterator[Verdict]:
    """Yields verdicts until the worker ends; if it ends early, the last verdict says how."""
    reading, writing = os.pipe()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 70
        try:
            _work(loader, numbers, seed, scratch, os.fdopen(writing, "w"))
            code = 0
        finally:
            os._exit(code)  # in any case: this process must not continue with the parent's code
    os.close(writing)
    done, ended, hung = 0, False, False
    try:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            rest = b""
            while done < len(numbers):
                if not select.select([pipe], [], [], WALL_SECONDS)[0]:
                    hung = True
                    break
                if not (more := pipe.read(65536)):
                    break
                *lines, rest = (rest + more).split(b"\n")
                for line in lines:
                    yield Verdict(**json.loads(line))
                    done += 1
        if done < len(numbers):
            if hung:
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            ended = True
            code = os.waitstatus_to_exitcode(status)
            if hung:
                yield Verdict(numbers[done], "hang", f"no answer in {WALL_SECONDS:g} s")
            elif code:
                ending = signal.Signals(-code).name if code < 0 else f"exit {code}"
                yield Verdict(numbers[done], "killed", ending)
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        shutil.rmtree(scratch, ignore_errors=True)


def _work(loader: Loader, numbers: Sequence[int], seed: int, scratch: Path, answers: Any) -> None:
    """Runs in the worker: loads each input and answers with a line; stops after one that took too much memory."""
    silence = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(silence, handle)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + HEADROOM_BYTES,) * 2)
    before = _peak_bytes()
    for number in numbers:
        folder = scratch / "input"
        folder.mkdir()
        try:
            build_input(loader, folder, number, seed)
        except Exception as error:
            kind, detail = "not built", f"{type(error).__name__}: {error}"  # a fault of the fuzzer
        else:
            kind, detail = judge(loader.load, folder)
        grown = _peak_bytes() - before
        if grown > MEMORY_BYTES:
            kind, detail = "memory", f"{grown / 2**20:.0f} MiB resident, {kind}: {detail}"
        answers.write(json.dumps({"number": number, "kind": kind, "detail": detail}) + "\n")
        answers.flush()
        if grown > MEMORY_BYTES:
            return
        shutil.rmtree(folder)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _data_bytes() -> int:
    """The data segment as RLIMIT_DATA counts it."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
