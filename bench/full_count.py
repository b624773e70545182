"""Time and peak memory of the parts of a reproduction that run on the CPU, at the count of ImageNet-1k.

    python bench/full_count.py probe --images 1281167 --layers 5
    python bench/full_count.py kmeans --dim 64
    python bench/full_count.py judged --images 50000

Images and features are random numbers: what is measured is how they are kept, shuffled and read. Peak memory is the
resident set's, of this process alone. docs/performance.md, "At full count", has the results.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from digit.evaluation.feature_files import LABELS, FeatureCache
from digit.metrics.feature_rows import Features, as_rows, batches
from digit.metrics.judge import Judged, collect_judged, fd
from digit.metrics.probe import ProbeConfig, probe_layers
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.points import open_points

WRITTEN_TOGETHER = 1000  # rows of features
CPU = torch.device("cpu")


class Watch:
    """Prints what each part took, on the clock and on all cores, and the peak of the resident set so far."""

    def __init__(self) -> None:
        self.began, self.used = time.perf_counter(), time.process_time()

    def tell(self, what: str, note: str = "") -> None:
        """One line for the part that ends here."""
        seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
        cpu, self.used = time.process_time() - self.used, time.process_time()
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        print(f"{what:<44} {seconds:9.1f} s   CPU {cpu:8.1f} s   peak {peak:6.2f} GiB   {note}", flush=True)


def probe(args: argparse.Namespace) -> None:
    """Features into files, then the classifiers: one pass for each of two fits, as many settings as are given."""
    watch, num, test = Watch(), args.images, args.images // 25
    with TemporaryDirectory(dir=args.folder) as folder:
        (train, labels), (tested, test_labels) = (
            made_features(Path(folder) / name, count, args) for name, count in (("train", num), ("test", test))
        )
        size = 2 * num * args.layers * args.dim
        watch.tell(f"write {num} x {args.layers} x {args.dim}", f"{size / 2**30:.1f} GiB")
        order = torch.randperm(num)[: 200 * 1024].split(1024)
        for _ in batches(as_rows(train), order, CPU):
            pass
        rate = sum(map(len, order)) / num * size / (time.perf_counter() - watch.began) / 2**30
        watch.tell("read 200 random batches of 1024", f"{rate:.2f} GiB/s")
        cfg = ProbeConfig(solver="sgd", num_epochs=args.epochs, learning_rates=(0.1, 0.4)[: args.settings])
        probe_layers(train, labels, tested, test_labels, cfg)
        updates = args.epochs * sum(-(-count // 1024) for count in (num * 9 // 10, num))
        watch.tell("classifiers, sweep and final fit", f"{updates} updates, {args.classes} classes")


def made_features(folder: Path, num: int, args: argparse.Namespace) -> tuple[Features, Tensor]:
    """Random features (N, L, D) and labels (N,) in files."""
    noise = torch.randn(WRITTEN_TOGETHER, args.layers, args.dim)

    def parts() -> Iterator[dict[str, Tensor]]:
        for start in range(0, num, WRITTEN_TOGETHER):
            count = min(WRITTEN_TOGETHER, num - start)
            yield {LABELS: torch.arange(start, start + count) % args.classes, "features": noise[:count] + start / num}

    found = FeatureCache(folder, dict, budget=0).collect(parts, {"features": (args.layers, args.dim)}, num)
    labels = found[LABELS]
    assert isinstance(labels, Tensor)
    return found["features"], labels


def kmeans(args: argparse.Namespace) -> None:
    """The sample that k-means is fitted to: 256 points for each of 8192 centroids, from 10% of the images."""
    watch, rows = Watch(), 64 * 256
    part = torch.randn(rows, args.dim)

    def stream() -> Iterator[Tensor]:
        for _ in range(args.images // 10 // 64):
            yield part

    cfg = KMeansConfig(num_clusters=8192, memory_budget_bytes=2**33)
    points = open_points(stream, cfg)
    watch.tell(
        f"sample {points.num_here} of {args.images // 10 * 256} x {args.dim}", f"streamed again: {points.streamed}"
    )


class BlankNetwork:
    """Gives random features of Inception's sizes."""

    name = "blank"

    def judge(self, images: Tensor) -> Judged:
        """(B, 3, H, W) -> features."""
        return Judged(torch.randn(len(images), 2048), torch.randn(len(images), 2023), torch.randn(len(images), 1008))

    def metric(self, name: str) -> str:
        """The name itself."""
        return name

    def describe(self) -> dict[str, str]:
        """Nothing to describe."""
        return {}


def judged(args: argparse.Namespace) -> None:
    """Images in batches through a judge without a network, then the Frechet distance of two such sets."""
    watch, sets = Watch(), []
    for name in ("reference", "samples"):
        images = torch.randint(0, 256, (64, 3, 256, 256), dtype=torch.uint8)
        parts = (images[: min(64, args.images - start)] for start in range(0, args.images, 64))
        sets.append(collect_judged(parts, BlankNetwork(), total=args.images))
        watch.tell(f"judge {args.images} {name}")
    fd(sets[0].pooled, sets[1].pooled)
    watch.tell("Frechet distance, 2048 features")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"probe": probe, "kmeans": kmeans, "judged": judged}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--images", type=int, default=None, help="default: 1281167, 50000 for judged")
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--dim", type=int, default=None, help="features; default: 1024, 768 for kmeans")
    parser.add_argument("--classes", type=int, default=100, help="the classifiers lie on the GPU in a true probe")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--settings", type=int, default=1)
    parser.add_argument("--folder", default=None, help="where the features are written (default: the temporary folder)")
    args = parser.parse_args()
    args.images = args.images or (50_000 if args.part == "judged" else 1_281_167)
    args.dim = args.dim or (768 if args.part == "kmeans" else 1024)
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
