"""Resident memory over 10,000 training steps and 10,000 drawn images, one process each: does it stay flat?

    python bench/memory.py                                       # minutes on one core; figures on stdout
    python bench/memory.py --plot docs/pictures/memory.png       # the picture of docs/reliability.md

Tiny models, so that whatever a step or an image leaves behind shows; training writes a checkpoint every 500 steps.
Linux only: the figures are VmRSS of /proc/PID/status, over the command and what it starts.
"""

import argparse
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tiny_runs
from tiny_runs import Sizes, Started, Work

NUM = 10_000
SAVE_EVERY = 500  # training steps
WARM_UP = 5_000  # steps or images; the slope begins here: the first full garbage collection comes at about 4,000 steps
FLAT = 0.5  # MiB per 1,000 steps or images; a run of 100,000 steps may grow by no more than 50 MiB
LOOK_EVERY = 0.2  # seconds
KINDS = {"train": "training steps", "sample": "drawn images"}


@dataclass(frozen=True)
class Watched:
    """Resident memory of one command: steps or images done and MiB, a pair a look."""

    kind: str
    done: np.ndarray  # (n,)
    mib: np.ndarray  # (n,)

    @property
    def steady(self) -> np.ndarray:
        """Which looks fell between the warm-up and the last step or image, after which the results are written."""
        return (self.done >= WARM_UP) & (self.done < NUM)

    @property
    def slope(self) -> float:
        """MiB per 1,000 while it is steady, by least squares."""
        return float(np.polyfit(self.done[self.steady], self.mib[self.steady], 1)[0]) * 1000

    @property
    def text(self) -> str:
        done, mib = self.done[self.steady], self.mib[self.steady]
        return (
            f"{mib[0]:.1f} MiB at {done[0]:,.0f} {self.kind}, {mib[-1]:.1f} at {done[-1]:,.0f}, at most "
            f"{self.mib.max():.1f}: {self.slope:+.3f} per 1,000 ({'flat' if self.slope < FLAT else 'GROWS'})"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="folder of the runs; emptied first")
    parser.add_argument("--plot", type=Path, default=None, help="where a picture goes; none by default")
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    sizes = Sizes(steps=NUM, samples=NUM, save_every=SAVE_EVERY, sample_batch=100)
    tiny_runs.preload()
    tiny_runs.make_base(out / "base", sizes)
    works = tiny_runs.works(out / "base", sizes)
    watched = [watch(works[name], kind, out / name) for name, kind in KINDS.items()]
    for each in watched:
        sys.stdout.write(each.text + "\n")
    if args.plot is not None:
        plot(args.plot, watched)
    return int(any(each.slope >= FLAT for each in watched))


def watch(work: Work, kind: str, folder: Path) -> Watched:
    """Run a command to its end and look at it as it goes."""
    process, looks = tiny_runs.start(work.words(folder), folder.with_name(f"{folder.name}.told")), []
    while process.poll() is None:
        looks.append((work.progress(folder), resident(process)))
        time.sleep(LOOK_EVERY)
    if code := process.wait():
        raise RuntimeError(f"{work.name} ended with {code}:\n{process.stderr}")
    done, mib = np.array([(d, m) for d, m in looks if d >= 0 and m > 0], dtype=float).T
    return Watched(kind, done, mib)


def resident(process: Started) -> float:
    """MiB of a command and of what it started; 0 where it has just ended."""
    kib = 0
    for pid in process.group():
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return kib / 1024


def plot(path: Path, watched: list[Watched]) -> None:
    """A panel a command, its figures at the start of the slope and at the end written beside the line."""
    from digit.runtime.plots import panels

    with panels(path, len(watched), size=(5.2, 3.4)) as axes:
        for panel, each in zip(axes[0], watched, strict=True):
            panel.plot(each.done, each.mib, linewidth=1.5)
            panel.axvline(WARM_UP, color="0.6", linewidth=0.9, linestyle="--")
            for place, align in ((0, "left"), (-1, "right")):
                done, mib = each.done[each.steady][place], each.mib[each.steady][place]
                panel.annotate(f"{mib:.0f} MiB", (done, mib), (0, 8), textcoords="offset points", ha=align)
            panel.set(xlabel=each.kind, ylabel="resident memory (MiB)", ylim=(0, 1.25 * each.mib.max()))
            panel.set_title(f"{each.slope:+.2f} MiB per 1,000 after {WARM_UP:,}", fontsize=10)
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
