"""Fill the disk under a running command, or make it read-only, and see what the command says and leaves.

    make chaos                                   # after bench/chaos.py; needs Linux and the right to mount
    python bench/disk_faults.py --short          # what the tests run: seconds

The runs lie on a tmpfs of their own in a mount namespace of their own (`unshare`), so that nothing else is touched and
everything is gone at the end. At a random moment the disk fills up to the last byte (`full`), or a
read-only view is mounted over it (`readonly`: whatever is opened from then on is refused; a file that is open can still
be written, as a process cannot be made to lose it without a real device). The command must end with exit code 2 and one
line that begins with `digit: `, and so must the same command once more while nothing has changed; every finished file
must be as it was; and with room again the same command must end with what an undisturbed one leaves.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import tiny_runs
from tiny_runs import SHORT, Reference, Sizes, Started, Starter, Work

INSIDE = "DIGIT_BENCH_NAMESPACE"  # set within the namespace
CANNOT = 77  # exit code where nothing may be mounted here; what test runners take for "skipped"
VOLUME_BYTES = 48 * 2**20
SECONDS_TO_NOTICE = 120.0
ATTEMPTS = 4
GROWING = re.compile(r".*\.jsonl|.*\.partial\.npy|journal\.json|events\.out\..*|\..*")  # a run goes on writing them
PROGRESS = re.compile(r"[^:]+: \d+(/\d+)? in [\d:]+.*")  # what a bar leaves in a file


def main() -> int:
    args = arguments()
    if INSIDE not in os.environ:
        return enter_namespace()
    sizes, starter = (SHORT, tiny_runs.fork) if args.short else (Sizes(), tiny_runs.start)
    tiny_runs.preload()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tiny_runs.make_base(out / "base", sizes)
    works = [work for name, work in tiny_runs.works(out / "base", sizes).items() if name in args.only.split(",")]
    bench = Trials(out, starter, args.seed)
    every = [(work, fault, number) for work in works for fault in args.faults.split(",") for number in range(args.runs)]
    trials = [bench.trial(*each) for each in every]
    for work, fault in dict.fromkeys((t.work, t.fault) for t in trials):
        mine = [t for t in trials if (t.work, t.fault) == (work, fault)]
        say(f"{work:<10}{fault:<10}{sum(bool(t.said) and not t.wrong for t in mine)} of {len(mine)}")
    return int(any(t.wrong or not t.said for t in trials))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/disk_faults"), help="folder of the runs; emptied first")
    parser.add_argument("--only", default="train,tokenize,codebook,sample", help="commands, separated by commas")
    parser.add_argument("--faults", default="full,readonly", help="full, readonly or both")
    parser.add_argument("--runs", type=int, default=3, help="runs of each command and fault")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--short", action="store_true", help="short commands, started as copies of this process")
    return parser.parse_args()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# -------------------------------------------------------------------- mounts


def enter_namespace() -> int:
    """Run this program again where it may mount; says so and returns CANNOT where there is no such place."""
    probe = f"mount -t tmpfs -o size=64k tmpfs {tempfile.gettempdir()}"
    for unshare in (["unshare", "--map-root-user", "--mount"], ["unshare", "--mount"]):
        try:
            allowed = subprocess.run([*unshare, "sh", "-c", probe], capture_output=True, text=True)
        except FileNotFoundError:
            say("skipped: no `unshare` here (util-linux), so nothing can be mounted without touching the machine")
            return CANNOT
        if allowed.returncode == 0:
            again = [*unshare, sys.executable, *sys.argv]
            return subprocess.run(again, env={**os.environ, INSIDE: "1"}).returncode
    say(f"skipped: mounting is not permitted here ({' '.join(allowed.stderr.split())})")
    return CANNOT


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@contextmanager
def volume(folder: Path) -> Iterator[Path]:
    """A disk of VOLUME_BYTES."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={VOLUME_BYTES}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Full:
    """Within the context not one more byte fits; `renew` takes what has been given back since."""

    def __init__(self, disk: Path):
        self.ballast = disk / "ballast"

    def __enter__(self) -> Self:
        self.renew()
        return self

    def renew(self) -> None:
        with open(self.ballast, "ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def __exit__(self, *_: object) -> None:
        self.ballast.unlink()


class ReadOnly:
    """Within the context nothing on the disk can be opened for writing, made, renamed or removed."""

    def __init__(self, disk: Path):
        self.disk = str(disk)

    def __enter__(self) -> Self:
        mount("--bind", self.disk, self.disk)
        mount("-o", "remount,bind,ro", self.disk)
        return self

    def renew(self) -> None:
        """It stays as it is."""

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.disk], check=True)


FAULTS = {"full": Full, "readonly": ReadOnly}


# -------------------------------------------------------------------- one trial


@dataclass
class Trial:
    """What a fault did to one run, and what the command said."""

    work: str
    fault: str
    number: int
    said: str = ""
    wrong: list[str] = field(default_factory=list)


class Trials:
    """Trials in a folder; each work runs undisturbed once."""

    def __init__(self, out: Path, starter: Starter, seed: int):
        self.out, self.starter, self.seed = out, starter, seed
        self.whole: dict[str, Reference] = {}

    def trial(self, work: Work, fault: str, number: int) -> Trial:
        """Start, disturb, look, go on, compare; sooner where the command was done before the fault."""
        rng = random.Random(f"{self.seed} {work.name} {fault} {number}")
        if work.name not in self.whole:
            self.whole[work.name] = tiny_runs.untouched(work, self.out / f"{work.name}-whole", self.starter)
        whole = self.whole[work.name]
        seconds = rng.uniform(0.3, 0.9) * whole.length
        for attempt in range(ATTEMPTS):
            done = Trial(work.name, fault, number)
            with volume(self.out / "disk") as disk:
                self._disturb(done, work, disk, seconds / 2**attempt)
            if done.said:
                break
        say(f"{work.name} {fault} {number}: {'; '.join(done.wrong) or 'stood it'} | {done.said or 'never hit'}")
        return done

    def _disturb(self, done: Trial, work: Work, disk: Path, seconds: float) -> None:
        run, told = disk / "run", self.out / f"{done.work}-{done.fault}-{done.number}"
        words = work.words(run)
        process = self.starter(words, told.with_suffix(".first"))
        time.sleep(seconds)
        with FAULTS[done.fault](disk) as fault:
            before = finished(run)
            self._ends(process, done)
            if process.wait() == 0:  # it was done already: nothing is learnt
                done.said, done.wrong = "", []
                return
            fault.renew()
            self._ends(self.starter(words, told.with_suffix(".again")), done)
            done.wrong += touched(before, finished(run))
        last = self.starter(words, told.with_suffix(".last"))
        if code := last.wait():
            done.wrong.append(f"exit code {code} with room again: {last.stderr[-300:]}")
        elif (found := tiny_runs.difference(work.result(run), self.whole[work.name].result)) is not None:
            done.wrong.append(found)

    def _ends(self, process: Started, done: Trial) -> None:
        """It must end with code 2 and one line."""
        until = time.monotonic() + SECONDS_TO_NOTICE
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            done.wrong.append(f"still running after {SECONDS_TO_NOTICE:g} s")
        lines = [line for line in process.stderr.splitlines() if line and not PROGRESS.fullmatch(line)]
        done.said = done.said or (lines[-1] if lines else "nothing")
        if process.wait() != 2 or len(lines) != 1 or not lines[0].startswith("digit: "):
            done.wrong.append(f"exit code {process.wait()}, lines {lines[-6:]}")


def finished(run: Path) -> dict[str, str]:
    """{file: SHA-256} of the files that are whole."""
    whole = [path for path in tiny_runs.files(run) if not any(map(GROWING.fullmatch, path.relative_to(run).parts))]
    return {str(path.relative_to(run)): tiny_runs.sha256(path) for path in whole}


def touched(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """A fault a file that is gone or another one."""
    return [f"{name} {'changed' if name in after else 'is gone'}" for name in before if after.get(name) != before[name]]


if __name__ == "__main__":
    sys.exit(main())
