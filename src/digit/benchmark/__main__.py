"""`python -m digit.benchmark`: `digit bench` on machines that have torch but not all of DiGIT's dependencies."""

import argparse
import sys

from digit.benchmark.bench import BenchConfig, add_arguments, run_bench
from digit.errors import DigitError
from digit.runtime.hardware import keep_freed_memory
from digit.runtime.output import kept_open


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Runs the benchmark. Returns the exit code: 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m digit.benchmark", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    keep_freed_memory()
    with kept_open():
        try:
            run_bench(BenchConfig(**vars(parser.parse_args())), say)
        except DigitError as error:
            sys.stderr.write(f"digit: {error}\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
