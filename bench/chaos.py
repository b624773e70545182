"""Kill training, tokenizing, codebook fitting and drawing again and again: what they end with must not tell.

    make chaos                                        # part of it; about half an hour on two cores
    python bench/chaos.py --only train --runs 5       # a part of it
    python bench/chaos.py --short                     # what the tests run: seconds

Each run is killed with SIGKILL several times, at a random moment, at a random moment of its work, or as soon as
something is being written aside, and is then continued by the same command to its end. Its files must equal those of a
run that nobody touched: weights, last checkpoint, log and TensorBoard's curves, tokens, codebook, images, byte by byte.
Other runs get SIGTERM: they must exit with 0 and name the command that goes on, which is then typed as it was printed.
Everything random follows from --seed, but for what the machine's clock decides.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tiny_runs
from tiny_runs import SHORT, Reference, Sizes, Started, Starter, Work

LOOK_EVERY = 0.0005  # seconds between two looks at a folder
ORPHAN_SECONDS = 5.0  # what a killed process had started must be gone by then
STUCK_SECONDS = 300.0
SHARE = 0.45  # of the uninterrupted run's length: a blow falls within it, or the first ones would take all the work
MOMENTS = ("work", "write", "any")  # when blows fall, in turn
COMMAND = re.compile(r"digit (?:train|tokenize|codebook|sample) .*")
BEFORE, WORKING, WRITING, TOO_LATE = "before its work", "at work", "while writing", "after its end"


@dataclass
class Run:
    """What happened to one run: where the blows fell, how far it was then, and what was wrong, if anything."""

    name: str
    blows: list[str] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main() -> int:
    args = arguments()
    sizes, starter = (SHORT, tiny_runs.fork) if args.short else (Sizes(), tiny_runs.start)
    tiny_runs.preload()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    tiny_runs.make_base(out / "base", sizes)
    works = [work for name, work in tiny_runs.works(out / "base", sizes).items() if name in args.only.split(",")]
    chaos = Chaos(out, starter, args.seed, args.kills)
    say(f"{args.runs} runs of each with SIGKILL, {args.stops} with SIGTERM; seed {args.seed}; files in {out}")
    started, runs = time.monotonic(), []
    # a thread waits for a process; forking is done from one thread only
    with ThreadPoolExecutor(1 if args.short else args.workers) as pool:
        references = dict(zip((w.name for w in works), pool.map(chaos.untouched, works), strict=True))
        asked = [
            (work, references[work.name], number, how)
            for work in works
            for how, count in ((signal.SIGKILL, args.runs), (signal.SIGTERM, args.stops))
            for number in range(count)
        ]
        for run in pool.map(lambda each: chaos.run(*each), asked):
            runs.append(run)
            say(f"{run.name}: {'; '.join(run.faults) or 'equal'} ({', '.join(run.blows) or 'never hit'})")
    table(runs, references, time.monotonic() - started)
    (out / "runs.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    return int(any(run.faults for run in runs))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder of the runs; emptied first")
    parser.add_argument("--only", default="train,tokenize,codebook,sample", help="commands, separated by commas")
    parser.add_argument("--runs", type=int, default=20, help="runs of each command that get SIGKILL")
    parser.add_argument("--stops", type=int, default=5, help="runs of each command that get SIGTERM")
    parser.add_argument("--kills", type=int, default=4, help="SIGKILLs a run; half as many SIGTERMs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, a core each")
    parser.add_argument("--short", action="store_true", help="short commands, started as copies of this process")
    return parser.parse_args()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Chaos:
    """Runs in a folder, each with a folder of its own that is removed where nothing was wrong."""

    def __init__(self, out: Path, starter: Starter, seed: int, kills: int):
        self.out, self.starter, self.seed, self.kills = out, starter, seed, kills

    def untouched(self, work: Work) -> Reference:
        return tiny_runs.untouched(work, self.out / f"{work.name}-whole", self.starter)

    def run(self, work: Work, whole: Reference, number: int, how: signal.Signals) -> Run:
        """One run: started, hit, continued, until nobody hits it any more; then compared."""
        run = Run(f"{work.name} {how.name} {number}")
        folder, rng = self.out / run.name.replace(" ", "-"), random.Random(f"{self.seed} {run.name}")
        words = work.words(folder)
        for blow in range(self.kills if how == signal.SIGKILL else max(1, self.kills // 2)):
            process = self.starter(words, folder.with_name(f"{folder.name}.told{blow}"))
            moment = MOMENTS[(number + blow) % len(MOMENTS)]
            where = strike(process, work, folder, how, moment, whole, rng)
            run.blows.append(where)
            run.progress.append(work.progress(folder))
            run.faults += orphans(process)
            if how == signal.SIGTERM and where != BEFORE:
                words = continuing(process, words, run)
            elif where == TOO_LATE and process.wait():
                run.faults.append(f"exit code {process.wait()} without a blow: {process.stderr[-300:]}")
            if where == TOO_LATE:
                break
        last = self.starter(words, folder.with_name(f"{folder.name}.told"))
        if code := last.wait():
            run.faults.append(f"exit code {code} at the end: {last.stderr[-300:]}")
        elif (found := tiny_runs.difference(work.result(folder), whole.result)) is not None:
            run.faults.append(found)
        if not run.faults:
            shutil.rmtree(folder)
        return run


# -------------------------------------------------------------------- one blow


def strike(
    process: Started, work: Work, folder: Path, how: signal.Signals, moment: str, whole: Reference, rng: random.Random
) -> str:
    """Send a signal at a moment of that kind and wait for the end; says where it fell."""
    made, started = work.made(folder), time.monotonic()
    before, progress = set(tiny_runs.temporaries(made)), work.progress(folder)
    first = 0.0 if moment == "any" else whole.ready
    span = whole.length - first
    pause(process, rng.uniform(first, first + SHARE * span))
    while moment == "write" and process.poll() is None and not set(tiny_runs.temporaries(made)) - before:
        time.sleep(LOOK_EVERY)
    if process.poll() is not None:
        return TOO_LATE
    os.kill(process.pid, how)
    early = time.monotonic() - started < whole.ready
    code = wait(process)
    if how == signal.SIGTERM:  # until the work begins the system's own answer is right: the process ends
        return BEFORE if code == -signal.SIGTERM and work.progress(folder) == progress else WORKING
    if set(tiny_runs.temporaries(made)) - before:
        return WRITING
    return BEFORE if early else WORKING


def pause(process: Started, seconds: float) -> None:
    """Sleep, but not past the end of a process."""
    until = time.monotonic() + seconds
    while process.poll() is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.01))


def wait(process: Started) -> int:
    """The exit code; a process that does not end is killed and counts as stuck."""
    until = time.monotonic() + STUCK_SECONDS
    while process.poll() is None:
        if time.monotonic() > until:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.001)
    return process.wait()


def orphans(process: Started) -> list[str]:
    """A fault where something that the ended process had started lives on."""
    until = time.monotonic() + ORPHAN_SECONDS
    while left := process.group():
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            return [f"{len(left)} processes outlived the killed one"]
        time.sleep(0.02)
    return []


def continuing(process: Started, words: Sequence[str], run: Run) -> list[str]:
    """The command that a stopped process names, without `digit`; a fault where it names none or its code is not 0."""
    if code := process.wait():
        run.faults.append(f"exit code {code} after SIGTERM: {(process.stderr or process.stdout)[-300:]}")
        return list(words)
    told = process.stdout + process.stderr
    found = [match[0] for line in told.splitlines() if (match := COMMAND.fullmatch(line.strip()))]
    if len(found) == 1:
        return shlex.split(found[0])[1:]
    if found or "stopped" in told:
        run.faults.append(f"{len(found)} lines are a command: {told[-300:]}")
    return list(words)  # the signal came after the last step: it ended as if nobody had asked


# -------------------------------------------------------------------- what is told


def table(runs: list[Run], references: dict[str, Reference], seconds: float) -> None:
    """How many of how many ended as if nobody had touched them, and where the blows fell."""
    say(f"\n{'command':<10}{'signal':<9}{'equal':<10}{'blows':<7}where they fell")
    for name, how in dict.fromkeys(tuple(run.name.split()[:2]) for run in runs):
        mine = [run for run in runs if run.name.startswith(f"{name} {how} ")]
        blows = Counter(blow for run in mine for blow in run.blows)
        hits = sum(count for where, count in blows.items() if where != TOO_LATE)
        equal = f"{sum(not run.faults for run in mine)} of {len(mine)}"
        fell = ", ".join(f"{count} {where}" for where, count in sorted(blows.items()))
        say(f"{name:<10}{how:<9}{equal:<10}{hits:<7}{fell}")
    for name, whole in references.items():
        say(f"{name}: {whole.length:.1f} s untouched, its first file after {whole.ready:.1f} s")
    say(f"{seconds / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(main())
