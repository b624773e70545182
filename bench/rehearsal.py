"""Rehearses `digit reproduce`: two ranks, killed once at a random moment, resumed; then reads every result.

    python bench/rehearsal.py --out runs/rehearsal -- --scale paper --data imagenet/ --reuse_vqgan vqgan ...
    python bench/rehearsal.py --out runs/rehearsal --targets table1,table3 -- --scale tiny

What stands after `--` goes to `digit reproduce TARGETS --rehearse --device cpu --out OUT`. It exits with 1 where the
command fails, or a results.json or table.md is missing, says nothing of the rehearsal, or holds no number.
"""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLL = 1.0  # seconds


def main() -> int:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, passed = sys.argv[1:cut], sys.argv[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--targets", default="all", help="all, or names with commas between them")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moment at which the ranks are killed")
    parser.add_argument("--no-kill", action="store_true", help="run once, without interruption")
    args = parser.parse_args(own)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    command += ["-m", "digit", "--", "reproduce", args.targets, "--rehearse", "--device", "cpu"]
    command += ["--out", str(args.out), *passed]
    started = time.monotonic()
    if not args.no_kill:
        print(f"killed after {killed(command, args.out, args.seed)} steps; the same command goes on", flush=True)
    code = subprocess.run(command, env=environment()).returncode
    seconds = time.monotonic() - started
    problems = [f"the command ended with {code}"] * (code != 0) + list(found_problems(args.out))
    print("\n".join(summary(args.out)), f"\n{seconds / 60:.1f} minutes", flush=True)
    print("\n".join(f"PROBLEM: {problem}" for problem in problems) or "no problem found")
    return 1 if problems else 0


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def steps_done(out: Path) -> int:
    return len(list((out / "steps").glob("*.json")))


def killed(command: list[str], out: Path, seed: int) -> int:
    """Start the ranks and kill all of them at a random moment, in the middle of some step; the steps done by then."""
    chance = random.Random(seed)
    wanted = steps_done(out) + chance.randint(1, 6)
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    while process.poll() is None and steps_done(out) < wanted:
        time.sleep(POLL)
    time.sleep(chance.uniform(0, 5))
    for number in (*descendants(process.pid), process.pid) if process.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()
    return steps_done(out)


def descendants(parent: int) -> list[int]:
    """Numbers of the processes that a process has started, and of theirs: torchrun's ranks have own sessions."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [child for child, its_parent in parents.items() if its_parent == parent]
    return found + [number for child in found for number in descendants(child)]


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from numbers(entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def found_problems(out: Path) -> Iterator[str]:
    """What is wrong with the results."""
    results = sorted(out.glob("*/results.json"))
    if not results:
        yield f"{out} holds no results.json"
    for path in results:
        found, table = json.loads(path.read_text()), path.with_name("table.md")
        values = list(numbers(found.get("metrics")))
        if not found.get("rehearsal"):
            yield f"{path} does not say what was cut"
        if not values or not all(map(math.isfinite, values)):
            yield f"{path} holds {len(values)} numbers, of which some are not finite"
        if not table.is_file() or not table.read_text().startswith("# REHEARSAL"):
            yield f"{table} is missing, or does not say REHEARSAL"


def summary(out: Path) -> Iterator[str]:
    """Seconds of every step, once, and the tables."""
    steps: dict[str, float] = {}
    for path in sorted(out.glob("*/results.json")):
        steps |= {name: step["seconds"] for name, step in json.loads(path.read_text())["steps"].items()}
        yield path.with_name("table.md").read_text()
    yield from (f"{seconds:8.1f} s  {name}" for name, seconds in steps.items())


if __name__ == "__main__":
    sys.exit(main())
