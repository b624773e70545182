"""Measures whether resident memory stays flat over 10,000 training steps and 10,000 sampled images, one process each.

    python bench/memory.py                                       # minutes on one core; results on stdout
    python bench/memory.py --plot docs/pictures/memory.png       # the plot of docs/reliability.md

The models are tiny, so that even small leaks show; training writes a checkpoint every 500 steps. Linux only: resident
memory is VmRSS of /proc/PID/status, summed over the command and its child processes.
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
WARM_UP = 5_000  # steps or images; the slope starts after the first full garbage collection, at about 4,000
FLAT = 0.5  # MiB per 1,000 steps or images; a run of 100,000 steps may grow by no more than 50 MiB
LOOK_EVERY = 0.2  # seconds
KINDS = {"train": "training steps", "sample": "sampled images"}


@dataclass(frozen=True)
class Watched:
    """Resident memory of one command: pairs of (steps or images done, MiB)."""

    kind: str
    done: np.ndarray  # (n,)
    mib: np.ndarray  # (n,)

    @property
    def steady(self) -> np.ndarray:
        """Mask of the pairs after the warm-up and before the end, when results are written."""
        return (self.done >= WARM_UP) & (self.done < NUM)

    @property
    def slope(self) -> float:
        """MiB per 1,000 steps or images in the steady part, by least squares."""
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
    parser.add_argument("--plot", type=Path, default=None, help="file for a plot (default: none)")
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
    """Runs a command to its end while recording its progress and memory."""
    process, looks = tiny_runs.start(work.words(folder), folder.with_name(f"{folder.name}.told")), []
    while process.poll() is None:
        looks.append((work.progress(folder), resident(process)))
        time.sleep(LOOK_EVERY)
    if code := process.wait():
        raise RuntimeError(f"{work.name} ended with {code}:\n{process.stderr}")
    done, mib = np.array([(d, m) for d, m in looks if d >= 0 and m > 0], dtype=float).T
    return Watched(kind, done, mib)


def resident(process: Started) -> float:
    """MiB of a command and its child processes; 0 if it has just ended."""
    kib = 0
    for pid in process.group():
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return kib / 1024


def plot(path: Path, watched: list[Watched]) -> None:
    """Plots one panel per command, with the memory at both ends of the steady part."""
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
