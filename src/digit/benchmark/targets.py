"""Speed targets for one H100 beside measurements: `python -m digit.benchmark.targets FILE` reads what gpu.sh wrote."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.runtime.files import read_json
from digit.runtime.output import kept_open


@dataclass(frozen=True)
class Target:
    """One measured value of a run and its target: a minimum, or a maximum if the value is in seconds."""

    part: str
    size: str
    case: str
    field: str
    threshold: float
    text: str

    @property
    def most(self) -> bool:
        """Whether the target is a maximum."""
        return self.field.endswith("seconds")

    def value(self, run: dict[str, Any]) -> float | None:
        """The measured value in bf16; None if the run has none."""
        rows = [row for row in run["results"] if row["case"] == self.case and row["precision"] == "bf16"]
        return rows[0].get(self.field) if rows else None

    def met(self, value: float) -> bool:
        """Whether `value` meets the target."""
        return value <= self.threshold if self.most else value >= self.threshold


H100 = (
    Target("sample", "base", "images", "rate", 100, "base, AR end to end, images/s"),
    Target("sample", "base", "images masked", "rate", 150, "base, MaskGIT in 8 steps end to end, images/s"),
    Target("sample", "large", "images", "rate", 40, "large, AR end to end, images/s"),
    Target("train", "base", "step", "mfu", 0.50, "base, training MFU"),
    Target("train", "large", "step", "mfu", 0.55, "large, training MFU"),
    Target("encode", "base", "ViT 224 px", "rate", 8000, "ViT-B/14 features from memory, images/s"),
    Target(
        "kmeans", "base", "2.1M x 768, K=8192", "fit_seconds", 10, "K-means 2.1 M x 768, K = 8192, 20 iterations, s"
    ),
)


def summary(runs: dict[tuple[str, str], dict[str, Any]]) -> Iterator[tuple[Target, float | None, str]]:
    """Yields (target, value, line) of every target, from the runs by (part, size)."""
    for target in H100:
        run = runs.get((target.part, target.size))
        value = None if run is None else target.value(run)
        sign = "at most" if target.most else "at least"
        verdict = "not measured" if value is None else ("yes" if target.met(value) else "NO")
        reached = "-" if value is None else f"{value:.4g}"
        yield target, value, f"{target.text:<52}{reached:>10}   {sign} {target.threshold:<6g}  {verdict}"


def read_runs(path: str | Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The runs of the benchmark in a file of gpu.sh, by (part, size). Raises DigitError for a file that is not JSON."""
    runs = {}
    for name, done in read_json(path).get("parts", {}).items():
        part, _, size = name.partition(":")
        if size and isinstance(result := done.get("result"), dict):
            runs[part, size] = result
    return runs


def main() -> int:
    """Prints the summary, or with --missed PART:SIZE of each run that missed a target."""
    parser = argparse.ArgumentParser(prog="python -m digit.benchmark.targets", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", help="JSON file of gpu.sh")
    parser.add_argument("--missed", action="store_true", help="print the runs that missed a target, for profiling")
    args = parser.parse_args()
    with kept_open():
        return show(args)


def show(args: argparse.Namespace) -> int:
    """Prints what was asked for. Returns the exit code."""
    try:
        lines = list(summary(read_runs(args.file)))
    except DigitError as error:
        sys.stderr.write(f"digit: {error}\n")
        return 2
    if args.missed:
        missed = {f"{t.part}:{t.size}" for t, value, _ in lines if value is not None and not t.met(value)}
        text = "\n".join(sorted(missed))
    else:
        text = "\n".join(line for _, _, line in lines)
    sys.stdout.write(text + "\n" if text else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
