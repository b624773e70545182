"""Take the disk away from under a running command, in four ways, and see what the command says and leaves.

    make chaos                                   # after bench/chaos.py; Linux, and the right to mount
    python bench/disk_faults.py --short          # what the tests run: seconds

full      the disk fills up to the last byte
readonly  a read-only view is mounted over it: whatever is opened from then on is refused
device    the file system meets an error and makes itself read-only: files that are open are refused too
power     the power fails: whatever was not synced is lost, and the disk answers no more

The runs lie on a disk of their own in a mount namespace of their own (`unshare`), a tmpfs or, for the last two, which
only root may do, ext4 on a loop device; so nothing else is touched and everything is gone at the end. The fault comes
at a random moment. The command must end with exit code 2 and one line that begins with `digit: `, and so must the same
command once more while nothing has changed; every finished file must be as it was (device, power: as far as it was
synced); and once the disk is well the same command must end with what an undisturbed one leaves.
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

INSIDE = "DIGIT_BENCH_NAMESPACE"  # set within the namespace
CANNOT = 77  # exit code where nothing may be mounted here; what test runners take for "skipped"
DISK_BYTES = 48 * 2**20
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # linux/fs/ext4/ext4.h
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
    faults = possible(args.faults.split(","), out)
    every = [(work, fault, number) for work in works for fault in faults for number in range(args.runs)]
    trials = [bench.trial(*each) for each in every]
    for work, fault in dict.fromkeys((t.work, t.fault) for t in trials):
        mine = [t for t in trials if (t.work, t.fault) == (work, fault)]
        say(f"{work:<10}{fault:<10}{sum(bool(t.said) and not t.wrong for t in mine)} of {len(mine)}")
    return int(any(t.wrong or not t.said for t in trials))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/disk_faults"), help="folder of the runs; emptied first")
    parser.add_argument("--only", default="train,tokenize,codebook,sample", help="commands, separated by commas")
    parser.add_argument("--faults", default="full,readonly,device,power", help="faults, separated by commas")
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
    for unshare in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
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


def system(*words: str | Path) -> str:
    """Output of a system command. Raises CalledProcessError where it fails."""
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


class Fault:
    """A disk at `folder` and what may happen to it: within `with fault:` the disk is mounted."""

    synced_only = False  # what was not synced is lost

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        system("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", self.folder)
        return self

    def strike(self) -> None:
        """Bring the fault about."""

    def renew(self) -> None:
        """See to it that it is as bad as before."""

    def mend(self) -> None:
        """Make the disk usable again."""

    def __exit__(self, *_: object) -> None:
        system("umount", self.folder)


class Full(Fault):
    """Not one more byte fits."""

    def strike(self) -> None:
        with open(self.folder / "ballast", "ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    renew = strike  # what has been given back since

    def mend(self) -> None:
        (self.folder / "ballast").unlink()


class ReadOnly(Fault):
    """Nothing can be opened for writing, made, renamed or removed; the kernel leaves open files alone."""

    def strike(self) -> None:
        system("mount", "--bind", self.folder, self.folder)
        system("mount", "-o", "remount,bind,ro", self.folder)

    def mend(self) -> None:
        system("umount", self.folder)


class Device(Fault):
    """ext4 that meets an error and is set to become read-only then."""

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

    def mend(self) -> None:
        system("umount", self.folder)
        subprocess.run(["e2fsck", "-f", "-y", str(self.image)], capture_output=True)  # its exit code tells of repairs
        self._mount()


class Power(Device):
    """ext4 that is shut down without writing what waits in memory."""

    def strike(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY)
        fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        os.close(handle)


FAULTS: dict[str, type[Fault]] = {"full": Full, "readonly": ReadOnly, "device": Device, "power": Power}


def possible(names: list[str], out: Path) -> list[str]:
    """Those of the faults that this machine lets happen; says which it does not."""
    kept = []
    for name in names:
        try:
            with FAULTS[name](out / "probe") as fault:
                fault.strike()
                fault.mend()
            kept.append(name)
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"{name}: skipped, not permitted here ({' '.join(str(getattr(error, 'stderr', error)).split())})")
    return kept


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
            with FAULTS[fault](self.out / "disk") as disk:
                self._disturb(done, work, disk, seconds / 2**attempt)
            if done.said:
                break
        say(f"{work.name} {fault} {number}: {'; '.join(done.wrong) or 'stood it'} | {done.said or 'never hit'}")
        return done

    def _disturb(self, done: Trial, work: Work, disk: Fault, seconds: float) -> None:
        run, told = disk.folder / "run", self.out / f"{done.work}-{done.fault}-{done.number}"
        words = work.words(run)
        process = self.starter(words, told.with_suffix(".first"))
        time.sleep(seconds)
        disk.strike()
        before = {} if disk.synced_only else finished(run)
        self._ends(process, done)
        if process.wait() == 0:  # it was done already: nothing is learnt
            done.said, done.wrong = "", []
            return disk.mend()
        disk.renew()
        self._ends(self.starter(words, told.with_suffix(".again")), done)
        done.wrong += touched(before, finished(run)) if before else []
        disk.mend()
        last = self.starter(words, told.with_suffix(".last"))
        if code := last.wait():
            done.wrong.append(f"exit code {code} once the disk is well: {last.stderr[-300:]}")
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
