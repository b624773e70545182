"""What one H100 should reach, beside what it did: `python -m digit.benchmark.targets FOLDER` reads gpu.sh's runs."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.runtime.files import read_json


@dataclass(frozen=True)
class Target:
    """A figure of one run and the least (of seconds: the most) that it should be."""

    part: str
    size: str
    case: str
    field: str
    wanted: float
    text: str

    @property
    def most(self) -> bool:
        """Whether less is better."""
        return self.field.endswith("seconds")

    def value(self, run: dict[str, Any]) -> float | None:
        """The figure, in bf16; None where the run has none."""
        rows = [row for row in run["results"] if row["case"] == self.case and row["precision"] == "bf16"]
        return rows[0].get(self.field) if rows else None

    def met(self, value: float) -> bool:
        """Whether the figure is good enough."""
        return value <= self.wanted if self.most else value >= self.wanted


H100 = (
    Target("sample", "base", "images", "rate", 100, "base, AR end to end, images/s"),
    Target("sample", "base", "images masked", "rate", 300, "base, MaskGIT in 8 steps end to end, images/s"),
    Target("sample", "large", "images", "rate", 40, "large, AR end to end, images/s"),
    Target("train", "base", "step", "mfu", 0.50, "base, training MFU"),
    Target("train", "large", "step", "mfu", 0.55, "large, training MFU"),
    Target("encode", "base", "ViT 224 px", "rate", 8000, "ViT-B/14 features from memory, images/s"),
    Target(
        "kmeans", "base", "2.1M x 768, K=8192", "fit_seconds", 10, "K-means 2.1 M x 768, K = 8192, 20 iterations, s"
    ),
)


def summary(runs: dict[tuple[str, str], dict[str, Any]]) -> Iterator[tuple[Target, float | None, str]]:
    """(target, value, line) of every target; `runs` by (part, size)."""
    for target in H100:
        run = runs.get((target.part, target.size))
        value = None if run is None else target.value(run)
        sign = "at most" if target.most else "at least"
        verdict = "not measured" if value is None else ("yes" if target.met(value) else "NO")
        reached = "-" if value is None else f"{value:.4g}"
        yield target, value, f"{target.text:<52}{reached:>10}   {sign} {target.wanted:<6g}  {verdict}"


def read_runs(folder: str | Path, prefix: str) -> dict[tuple[str, str], dict[str, Any]]:
    """FOLDER/PREFIX-SIZE-PART.json by (part, size). Raises DigitError for a file that is no JSON."""
    runs = {}
    for path in sorted(Path(folder).glob(f"{prefix}-*-*.json")):
        size, part = path.stem.removeprefix(f"{prefix}-").split("-")
        runs[part, size] = read_json(path)
    return runs


def main() -> int:
    """Print the summary, or with --missed `PART SIZE` of each run that missed a target."""
    parser = argparse.ArgumentParser(prog="python -m digit.benchmark.targets", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", help="where the JSON files are")
    parser.add_argument("--prefix", required=True, help="what their names begin with")
    parser.add_argument("--missed", action="store_true", help="name the runs that missed a target, for profiles")
    args = parser.parse_args()
    try:
        lines = list(summary(read_runs(args.folder, args.prefix)))
    except DigitError as error:
        sys.stderr.write(f"digit: {error}\n")
        return 2
    if args.missed:
        missed = {f"{t.part} {t.size}" for t, value, _ in lines if value is not None and not t.met(value)}
        text = "\n".join(sorted(missed))
    else:
        text = "\n".join(line for _, _, line in lines)
    sys.stdout.write(text + "\n" if text else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
