"""python -m fuzz: damaged inputs through the loaders; see the package's docstring."""

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from digit.errors import DigitError
from digit.runtime.progress import Progress

from .loaders import LOADERS
from .worker import Verdict, build_input, judge_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--loader", default="all", choices=["all", *LOADERS])
    parser.add_argument("--num", type=int, default=10_000, help="inputs per loader")
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, default=None, help="load only this input, in this process, and show what it raises"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for the inputs with findings")
    args = parser.parse_args()
    names = list(LOADERS) if args.loader == "all" else [args.loader]
    if args.only is not None:
        return replay(names[0], args.only, args.seed, args.out)
    found = 0
    for name in names:
        found += run(name, range(args.start, args.start + args.num), args.seed, args.out)
    return 1 if found else 0


def run(name: str, numbers: range, seed: int, out: Path | None) -> int:
    """Judges the inputs of one loader and prints its findings and its row. Returns the number of findings."""
    loader, counts, found = LOADERS[name], Counter(), []
    with Progress(name, len(numbers)) as bar:
        for verdict in judge_all(loader, numbers, seed):
            counts[verdict.kind] += 1
            if verdict.is_finding:
                found.append(verdict)
                show(name, verdict, seed, out)
            bar.update(1, findings=len(found))
    row = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    sys.stdout.write(f"{name:<12} {len(numbers):>7} inputs: {row}\n")
    sys.stdout.flush()
    return len(found)


def show(name: str, verdict: Verdict, seed: int, out: Path | None) -> None:
    """Prints a finding and saves its input in `out`."""
    sys.stdout.write(f"{name:<12} {verdict.number:>7} {verdict.kind}: {verdict.detail}\n")
    sys.stdout.flush()
    if out is not None and verdict.kind != "not built":
        folder = out / name / str(verdict.number)
        folder.mkdir(parents=True, exist_ok=True)
        build_input(LOADERS[name], folder, verdict.number, seed)


def replay(name: str, number: int, seed: int, out: Path | None) -> int:
    """Loads one input in this process."""
    folder = out or Path(tempfile.mkdtemp(prefix="fuzz"))
    folder.mkdir(parents=True, exist_ok=True)
    build_input(LOADERS[name], folder, number, seed)
    sys.stdout.write(f"{name} {number} in {folder}\n")
    try:
        LOADERS[name].load(folder)
    except DigitError as error:
        sys.stdout.write(f"refused: {error}\n")
        return 0
    except Exception:
        traceback.print_exc()
        return 1
    sys.stdout.write("accepted\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
