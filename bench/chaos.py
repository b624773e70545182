"""Kills training, tokenizing, codebook fitting and sampling again and again, and checks that the results stay equal.

    make chaos                                        # all benches of this kind; about half an hour on two cores
    python bench/chaos.py --only train --runs 5       # a part of it
    python bench/chaos.py --short                     # seconds; the tests run this

Each run is killed with SIGKILL several times, at a random moment, at a random moment of its work, or as soon as it
writes a temporary file, and then the same command resumes it. Its files must equal those of an uninterrupted run byte
by byte: weights, last checkpoint, log and TensorBoard curves, tokens, codebook, images. Other runs get SIGTERM: they
must exit with 143 and print the command that resumes them, which is then run as printed. All randomness comes from
--seed, except what depends on the machine's timing.
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

LOOK_EVERY = 0.0005  # seconds between two checks of a folder
ORPHAN_SECONDS = 5.0  # child processes of a killed process must have ended by then
STUCK_SECONDS = 300.0
STOPPED = 128 + signal.SIGTERM
SHARE = 0.45  # signals arrive within this part of the uninterrupted run's length, so that work is left for the next
MOMENTS = ("work", "write", "any")  # when signals arrive, in turn
COMMAND = re.compile(r"digit (?:train|tokenize|codebook|sample) .*")
BEFORE, WORKING, WRITING, TOO_LATE = "before its work", "at work", "while writing", "after its end"


@dataclass
class Run:
    """One run: when the signals arrived, the progress at that time, and the faults found."""

    name: str
    hits: list[str] = field(default_factory=list)
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
    # each thread waits for one process; only one thread may fork
    with ThreadPoolExecutor(1 if args.short else args.workers) as pool:
        references = dict(zip((w.name for w in works), pool.map(chaos.uninterrupted, works), strict=True))
        requests = [
            (work, references[work.name], number, signal_sent)
            for work in works
            for signal_sent, count in ((signal.SIGKILL, args.runs), (signal.SIGTERM, args.stops))
            for number in range(count)
        ]
        for run in pool.map(lambda request: chaos.run(*request), requests):
            runs.append(run)
            say(f"{run.name}: {'; '.join(run.faults) or 'equal'} ({', '.join(run.hits) or 'no signal arrived'})")
    table(runs, references, time.monotonic() - started)
    (out / "runs.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    return int(any(run.faults for run in runs))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder of the runs; emptied first")
    parser.add_argument("--only", default="train,tokenize,codebook,sample", help="commands, separated by commas")
    parser.add_argument("--runs", type=int, default=20, help="runs of each command that get SIGKILL")
    parser.add_argument("--stops", type=int, default=5, help="runs of each command that get SIGTERM")
    parser.add_argument("--kills", type=int, default=4, help="SIGKILLs per run; half as many SIGTERMs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--workers", type=int, default=2, help="parallel runs, one core each")
    parser.add_argument("--short", action="store_true", help="short commands, started as copies of this process")
    return parser.parse_args()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Chaos:
    """Runs, each in its own folder, which is removed if no fault was found."""

    def __init__(self, out: Path, starter: Starter, seed: int, kills: int):
        self.out, self.starter, self.seed, self.kills = out, starter, seed, kills

    def uninterrupted(self, work: Work) -> Reference:
        return tiny_runs.uninterrupted(work, self.out / f"{work.name}-whole", self.starter)

    def run(self, work: Work, reference: Reference, number: int, sent: signal.Signals) -> Run:
        """Starts, interrupts and resumes one run until it ends, then compares its result."""
        run = Run(f"{work.name} {sent.name} {number}")
        folder, rng = self.out / run.name.replace(" ", "-"), random.Random(f"{self.seed} {run.name}")
        words = work.words(folder)
        for attempt in range(self.kills if sent == signal.SIGKILL else max(1, self.kills // 2)):
            process = self.starter(words, folder.with_name(f"{folder.name}.told{attempt}"))
            moment = MOMENTS[(number + attempt) % len(MOMENTS)]
            where = strike(process, work, folder, sent, moment, reference, rng)
            run.hits.append(where)
            run.progress.append(work.progress(folder))
            run.faults += orphans(process)
            if sent == signal.SIGTERM and where != BEFORE:
                words = continuing(process, words, run)
            elif where == TOO_LATE and process.wait():
                run.faults.append(f"exit code {process.wait()} without a signal: {process.stderr[-300:]}")
            if where == TOO_LATE:
                break
        last = self.starter(words, folder.with_name(f"{folder.name}.told"))
        if code := last.wait():
            run.faults.append(f"exit code {code} at the end: {last.stderr[-300:]}")
        elif (fault := tiny_runs.difference(work.result(folder), reference.result)) is not None:
            run.faults.append(fault)
        if not run.faults:
            shutil.rmtree(folder)
        return run


# -------------------------------------------------------------------- one signal


def strike(
    process: Started,
    work: Work,
    folder: Path,
    sent: signal.Signals,
    moment: str,
    reference: Reference,
    rng: random.Random,
) -> str:
    """Sends a signal at a moment of that kind and waits for the end. Returns when it arrived."""
    made, started = work.made(folder), time.monotonic()
    before, progress = set(tiny_runs.temporaries(made)), work.progress(folder)
    first = 0.0 if moment == "any" else reference.ready
    span = reference.length - first
    pause(process, rng.uniform(first, first + SHARE * span))
    while moment == "write" and process.poll() is None and not set(tiny_runs.temporaries(made)) - before:
        time.sleep(LOOK_EVERY)
    if process.poll() is not None:
        return TOO_LATE
    os.kill(process.pid, sent)
    early = time.monotonic() - started < reference.ready
    code = wait(process)
    if sent == signal.SIGTERM:  # before the work begins, the default action is right: the process ends
        return BEFORE if code == -signal.SIGTERM and work.progress(folder) == progress else WORKING
    if set(tiny_runs.temporaries(made)) - before:
        return WRITING
    return BEFORE if early else WORKING


def pause(process: Started, seconds: float) -> None:
    """Sleeps, but not past the end of a process."""
    until = time.monotonic() + seconds
    while process.poll() is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.01))


def wait(process: Started) -> int:
    """Returns the exit code; kills a process that does not end."""
    until = time.monotonic() + STUCK_SECONDS
    while process.poll() is None:
        if time.monotonic() > until:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.001)
    return process.wait()


def orphans(process: Started) -> list[str]:
    """Returns a fault if child processes of the ended process are still running."""
    until = time.monotonic() + ORPHAN_SECONDS
    while left := process.group():
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            return [f"{len(left)} processes outlived the killed one"]
        time.sleep(0.02)
    return []


def continuing(process: Started, words: Sequence[str], run: Run) -> list[str]:
    """The command that a stopped process printed, without `digit`; records a fault if it printed none or failed."""
    if (code := process.wait()) not in (0, STOPPED):
        run.faults.append(f"exit code {code} after SIGTERM: {(process.stderr or process.stdout)[-300:]}")
        return list(words)
    output = process.stdout + process.stderr
    commands = [match[0] for line in output.splitlines() if (match := COMMAND.fullmatch(line.strip()))]
    if code == STOPPED and len(commands) == 1:
        return shlex.split(commands[0])[1:]
    if code == STOPPED or commands:
        run.faults.append(f"exit code {code}, {len(commands)} lines are a command: {output[-300:]}")
    return list(words)  # with 0 the signal came after the last step: the process ended normally


# -------------------------------------------------------------------- results


def table(runs: list[Run], references: dict[str, Reference], seconds: float) -> None:
    """Prints how many runs ended like the uninterrupted one, and when the signals arrived."""
    say(f"\n{'command':<10}{'signal':<9}{'equal':<10}{'signals':<9}when they arrived")
    for name, sent in dict.fromkeys(tuple(run.name.split()[:2]) for run in runs):
        own = [run for run in runs if run.name.startswith(f"{name} {sent} ")]
        moments = Counter(hit for run in own for hit in run.hits)
        hits = sum(count for where, count in moments.items() if where != TOO_LATE)
        equal = f"{sum(not run.faults for run in own)} of {len(own)}"
        arrived = ", ".join(f"{count} {where}" for where, count in sorted(moments.items()))
        say(f"{name:<10}{sent:<9}{equal:<10}{hits:<9}{arrived}")
    for name, reference in references.items():
        say(f"{name}: {reference.length:.1f} s uninterrupted, its first file after {reference.ready:.1f} s")
    say(f"{seconds / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(main())
