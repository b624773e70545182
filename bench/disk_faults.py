"""Makes the disk of a running command fail in four ways, and checks what the command prints and leaves.

    make chaos                                   # after bench/chaos.py; needs Linux and permission to mount
    python bench/disk_faults.py --short          # seconds; the tests run this

full      the disk fills up to the last byte
readonly  a read-only view is mounted over it: files can no longer be opened for writing
device    the file system meets an error and becomes read-only: writes to open files fail too
power     the power fails: data that was not synced is lost, and the disk stops responding

The runs use a separate disk in a separate mount namespace (`unshare`): a tmpfs or, for the last two faults, which need
root, ext4 on a loop device. Nothing else is affected, and everything is gone at the end. The fault happens at a random
moment. The command must end with exit code 2 and one line that begins with `digit: `, and so must the same command
again while the fault lasts. Every finished file must be unchanged (device, power: if it was synced). Once the disk is
repaired, the same command must finish with the result of an uninterrupted run.
"""

import argparse
import fcntl
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import tiny_runs
from tiny_runs import SHORT, Reference, Sizes, Started, Starter, Work

INSIDE = "DIGIT_BENCH_NAMESPACE"  # set inside the namespace
CANNOT = 77  # exit code if mounting is not permitted; test runners read it as "skipped"
DISK_BYTES = 48 * 2**20
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # linux/fs/ext4/ext4.h
SECONDS_TO_NOTICE = 120.0
ATTEMPTS = 4
GROWING = re.compile(r".*\.jsonl|.*\.partial\.npy|journal\.json|events\.out\..*|\..*")  # files that a run keeps writing
PROGRESS = re.compile(r"[^:]+: \d+(/\d+)? in [\d:]+.*")  # a progress bar's lines in a file


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
    faults = possible(args.faults.split(","), out)
    every = [(work, fault, number) for work in works for fault in faults for number in range(args.runs)]
    trials = [bench.trial(*each) for each in every]
    for work, fault in dict.fromkeys((t.work, t.fault) for t in trials):
        own = [t for t in trials if (t.work, t.fault) == (work, fault)]
        say(f"{work:<10}{fault:<10}{sum(bool(t.said) and not t.wrong for t in own)} of {len(own)}")
    return int(any(t.wrong or not t.said for t in trials))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/disk_faults"), help="folder of the runs; emptied first")
    parser.add_argument("--only", default="train,tokenize,codebook,sample", help="commands, separated by commas")
    parser.add_argument("--faults", default="full,readonly,device,power", help="faults, separated by commas")
    parser.add_argument("--runs", type=int, default=3, help="runs of each command and fault")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--short", action="store_true", help="short commands, started as copies of this process")
    return parser.parse_args()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# -------------------------------------------------------------------- mounts


def enter_namespace() -> int:
    """Runs this program again where it may mount. Prints why and returns CANNOT if it may not."""
    probe = f"mount -t tmpfs -o size=64k tmpfs {tempfile.gettempdir()}"
    for unshare in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        try:
            allowed = subprocess.run([*unshare, "sh", "-c", probe], capture_output=True, text=True)
        except FileNotFoundError:
            say("skipped: `unshare` (util-linux) is not installed, which is needed to mount safely")
            return CANNOT
        if allowed.returncode == 0:
            again = [*unshare, sys.executable, *sys.argv]
            return subprocess.run(again, env={**os.environ, INSIDE: "1"}).returncode
    say(f"skipped: mounting is not permitted here ({' '.join(allowed.stderr.split())})")
    return CANNOT


def system(*words: str | Path) -> str:
    """Returns the output of a system command. Raises CalledProcessError if it fails."""
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


class Fault:
    """A disk at `folder` and one fault of it. The disk is mounted within `with fault:`."""

    synced_only = False  # whether data that was not synced is lost

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        system("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", self.folder)
        return self

    def strike(self) -> None:
        """Makes the fault happen."""

    def renew(self) -> None:
        """Restores the fault before the retry."""

    def repair(self) -> None:
        """Makes the disk usable again."""

    def __exit__(self, *_: object) -> None:
        system("umount", self.folder)


class Full(Fault):
    """The disk is full to the last byte."""

    def strike(self) -> None:
        with open(self.folder / "ballast", "ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    renew = strike  # refills space that was freed since

    def repair(self) -> None:
        (self.folder / "ballast").unlink()


class ReadOnly(Fault):
    """Nothing can be opened for writing, created, renamed or removed; open files stay writable."""

    def strike(self) -> None:
        system("mount", "--bind", self.folder, self.folder)
        system("mount", "-o", "remount,bind,ro", self.folder)

    def repair(self) -> None:
        system("umount", self.folder)


class Device(Fault):
    """ext4 that meets an error and then becomes read-only."""

    synced_only = True

    def __enter__(self) -> Self:
        self.image = self.folder.with_suffix(".img")
        with open(self.image, "wb") as file:
            file.truncate(DISK_BYTES)
        system("mkfs.ext4", "-q", "-F", self.image)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mount()
        return self

    def _mount(self) -> None:
        system("mount", "-o", "loop,errors=remount-ro", self.image, self.folder)

    def strike(self) -> None:
        device = Path(system("findmnt", "--noheadings", "--output", "SOURCE", self.folder).strip())
        Path("/sys/fs/ext4", device.name, "trigger_fs_error").write_text("bench")

    def repair(self) -> None:
        system("umount", self.folder)
        subprocess.run(["e2fsck", "-f", "-y", str(self.image)], capture_output=True)  # its exit code reports repairs
        self._mount()


class Power(Device):
    """ext4 that is shut down without writing the data still in memory."""

    def strike(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY)
        fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        os.close(handle)


FAULTS: dict[str, type[Fault]] = {"full": Full, "readonly": ReadOnly, "device": Device, "power": Power}


def possible(names: list[str], out: Path) -> list[str]:
    """Selects the faults that can be made on this machine, and prints which cannot."""
    kept = []
    for name in names:
        try:
            with FAULTS[name](out / "probe") as fault:
                fault.strike()
                fault.repair()
            kept.append(name)
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"{name}: skipped, not permitted here ({' '.join(str(getattr(error, 'stderr', error)).split())})")
    return kept


# -------------------------------------------------------------------- one trial


@dataclass
class Trial:
    """One fault of one run: the command's message, and what went wrong."""

    work: str
    fault: str
    number: int
    said: str = ""
    wrong: list[str] = field(default_factory=list)


class Trials:
    """Trials in a folder; each command also runs uninterrupted once."""

    def __init__(self, out: Path, starter: Starter, seed: int):
        self.out, self.starter, self.seed = out, starter, seed
        self.whole: dict[str, Reference] = {}

    def trial(self, work: Work, fault: str, number: int) -> Trial:
        """Starts, disturbs, resumes and compares one run; tries earlier if it ended before the fault."""
        rng = random.Random(f"{self.seed} {work.name} {fault} {number}")
        if work.name not in self.whole:
            self.whole[work.name] = tiny_runs.uninterrupted(work, self.out / f"{work.name}-whole", self.starter)
        whole = self.whole[work.name]
        seconds = rng.uniform(0.3, 0.9) * whole.length
        for attempt in range(ATTEMPTS):
            done = Trial(work.name, fault, number)
            with FAULTS[fault](self.out / "disk") as disk:
                self._disturb(done, work, disk, seconds / 2**attempt)
            if done.said:
                break
        say(f"{work.name} {fault} {number}: {'; '.join(done.wrong) or 'passed'} | {done.said or 'no fault happened'}")
        return done

    def _disturb(self, done: Trial, work: Work, disk: Fault, seconds: float) -> None:
        run, output = disk.folder / "run", self.out / f"{done.work}-{done.fault}-{done.number}"
        words = work.words(run)
        process = self.starter(words, output.with_suffix(".first"))
        time.sleep(seconds)
        disk.strike()
        before = {} if disk.synced_only else finished(run)
        self._ends(process, done)
        if process.wait() == 0:  # it ended before the fault: this attempt does not count
            done.said, done.wrong = "", []
            return disk.repair()
        disk.renew()
        self._ends(self.starter(words, output.with_suffix(".again")), done)
        done.wrong += touched(before, finished(run)) if before else []
        disk.repair()
        last = self.starter(words, output.with_suffix(".last"))
        if code := last.wait():
            done.wrong.append(f"exit code {code} once the disk was repaired: {last.stderr[-300:]}")
        elif (fault := tiny_runs.difference(work.result(run), self.whole[work.name].result)) is not None:
            done.wrong.append(fault)

    def _ends(self, process: Started, done: Trial) -> None:
        """Checks that the command ends with exit code 2 and one line."""
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
    """{file: SHA-256} of the finished files."""
    whole = [path for path in tiny_runs.files(run) if not any(map(GROWING.fullmatch, path.relative_to(run).parts))]
    return {str(path.relative_to(run)): tiny_runs.sha256(path) for path in whole}


def touched(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Returns a fault for each file that is gone or has changed."""
    return [f"{name} {'changed' if name in after else 'is gone'}" for name in before if after.get(name) != before[name]]


if __name__ == "__main__":
    sys.exit(main())
