"""One entry of docs/leaderboard.md: trains a recipe on CIFAR-10, samples from it, and prints the row.

    python bench/leaderboard.py DATA --recipe cifar_pixels --out runs/leaderboard

The clock runs from the start of `digit fit` to the end of its report, over all continuations of a run that was stopped;
what a stop lost counts too. Then 3,000 class-conditional samples are judged against the 10,000 test images. DATA is
CIFAR-10 in the Hub's layout; further options go to `digit fit`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from cifar_judge import CifarJudge, save_class_rows
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime.files import write_json
from digit.runtime.hardware import describe_machine

NUM, CLASSES = 3000, 10
SEED = 1_000_000  # of the first sample: none that a training's report shows
LIMIT = 30 * 60.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", help="CIFAR-10 in the Hub's layout")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", required=True, type=Path, help="folder for the run, its time, features and grid")
    args, more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = fit(args.data, args.recipe, args.out, more)
    pipe = DigitPipeline.from_pretrained(str(args.out / "run"))
    images = pipe.generate(NUM, None, seed=SEED)
    save_class_rows(args.out / "samples.png", images, pipe.classes)
    judge = CifarJudge(args.data, pipe.preprocess, args.out)
    figures = judge.figures("samples", lambda: images, torch.arange(NUM) % CLASSES)
    about = {"recipe": args.recipe, "options": more, "commit": commit(), "seconds": seconds}
    write_json(args.out / "entry.json", about | figures | {"machine": describe_machine()})
    late = "" if seconds <= LIMIT else " (over the limit)"
    name = " ".join([f"`{args.recipe}`", *more])
    row = (
        name,
        f"{figures['fd']:.1f}",
        figures["recall"],
        figures["recognised"],
        f"{seconds / 60:.0f}{late}",
        commit(),
    )
    sys.stdout.write("| " + " | ".join(map(str, row)) + " |\n")
    return 0


def fit(data: str, recipe: str, out: Path, more: list[str]) -> float:
    """Trains, and returns the seconds that it took, those of earlier calls included; kept in OUT/seconds.json."""
    kept = out / "seconds.json"
    before, done = json.loads(kept.read_text()) if kept.exists() else [0.0, False]
    if done:
        return before
    start = time.time()
    command = [sys.executable, "-m", "digit", "fit", data, "--recipe", recipe, "--out", str(out / "run"), *more]
    process = subprocess.Popen(command)
    while (code := process.poll()) is None:  # a kill of this script loses a second of the clock at most
        write_json(kept, [before + time.time() - start, False])
        time.sleep(1)
    write_json(kept, [before + time.time() - start, code == 0])
    if code:
        sys.exit(code)
    return before + time.time() - start


def commit() -> str:
    """The commit of this repository, with + where files differ from it."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


if __name__ == "__main__":
    sys.exit(main())
