"""Curves over the scales of guidance: distance, recall and recognised share of samples of CIFAR-10.

    python bench/guidance.py DATA --out runs/guidance --run pixels=runs/cifar_pixels --run two-stage=runs/cifar

DATA is CIFAR-10 in the Hub's layout. Each run is a finished pipeline that was trained on it with dropout of labels or
of discriminative tokens. One stage's scale changes at a time, the other keeps the pipeline's own. Writes guidance.json
and guidance.png to OUT; finished figures are read, not made again, where they are of as many samples.
fd_efficientnet_lite2, which is not FID; with fewer than 10,000 samples it is biased upwards, for all points alike.
images_per_second counts the processor's time: of one thread, it holds beside other work too.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from cifar_judge import CifarJudge
from digit.errors import DigitError
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime import plots
from digit.runtime.files import write_json

SEED = 2_000_000  # of the first sample
MEASURES = {"fd": "distance (less is better)", "recall": "recall", "recognised": "recognised share"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", help="CIFAR-10 in the Hub's layout")
    parser.add_argument("--run", action="append", required=True, help="NAME=FOLDER; give it several times")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--scales", default="1,1.25,1.5,2,3,5")
    parser.add_argument("--num", type=int, default=1000, help="samples a point")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "guidance.json"
    found: dict[str, dict[str, dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    runs = {name: DigitPipeline.from_pretrained(folder) for name, folder in (word.split("=", 1) for word in args.run)}
    require_classes(runs)
    judge: CifarJudge | None = None
    for name, pipe in runs.items():
        judge = judge or CifarJudge(args.data, pipe.preprocess, args.out)
        for stage in pipe.guided_stages:
            curve = found.setdefault(f"{name}, {stage}", {})
            for scale in args.scales.split(","):
                if not is_point(curve.get(scale), args.num):
                    started = time.process_time()
                    images = pipe.generate(args.num, None, seed=SEED, **{stage: {"cfg_scale": float(scale)}})
                    speed = args.num / (time.process_time() - started)
                    key = f"{name}_{stage}_{scale}_{args.num}".replace(" ", "_")
                    curve[scale] = judge.figures(key, lambda x=images: x, torch.arange(args.num) % len(pipe.classes))
                    curve[scale] |= {"images_per_second": round(speed, 1), "num": args.num}
                    write_json(kept, found)
                sys.stdout.write(f"{name}, {stage} {scale}: {curve[scale]}\n")
                sys.stdout.flush()
    draw(found, args.out / "guidance.png", args.num)


def require_classes(runs: Mapping[str, DigitPipeline]) -> None:
    """Raise DigitError, before anything is sampled, for a run without classes that samples could be recognised as."""
    for name, pipe in runs.items():
        if not pipe.classes:
            raise DigitError(f"--run {name} has no classes that its samples could be recognised as: leave it out")


def is_point(figures: Mapping[str, float] | None, num: int) -> bool:
    """Whether there are figures of so many samples: those of fewer have a larger distance, whatever the scale does."""
    return figures is not None and figures.get("num") == num


def draw(found: dict[str, dict[str, dict[str, float]]], path: Path, num: int) -> None:
    """One panel a measure, one line a stage of a run, over the scales; the points of `num` samples alone."""
    with plots.panels(path, len(MEASURES), size=(4.6, 3.8)) as axes:
        for plot, (key, words) in zip(axes[0], MEASURES.items(), strict=True):
            for name, curve in found.items():
                points = sorted((float(s), figures[key]) for s, figures in curve.items() if is_point(figures, num))
                if points:
                    plot.plot(*zip(*points, strict=True), marker="o", label=name)
            plot.set(xlabel="scale of guidance", title=words)
            plot.grid(alpha=0.3)
        axes[0, 0].legend(fontsize=8)


if __name__ == "__main__":
    main()
