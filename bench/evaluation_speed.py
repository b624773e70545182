"""Time and peak memory of the measures of `digit evaluate` on random features; images and network are left out.

    python bench/evaluation_speed.py                         # 1,000 samples against 50,000 x 2,048, cold and cached
    python bench/evaluation_speed.py 50000 50000 2048 --alone    # all measures, and each alone, without a cache
    python bench/evaluation_speed.py 50000 50000 2048 --alone density    # and the slowest alone
    python bench/evaluation_speed.py 10000 10000 2048 --peers    # beside torchmetrics and scikit-learn, in turn;
                                                                 # needs the packages of the tests: make env-test

`--alone` ends with the ratio of all to the slowest alone. Products of all pairs cost N² D, eigenproblems D³, kernel
distances D alone, so that smaller sizes have other ratios.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from digit.evaluation.features import Features
from digit.evaluation.measures import MEASURES, compute
from digit.evaluation.settings import EvaluateConfig
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.kernels import gaussian_distance
from digit.metrics.neighbours import compare_neighbours
from digit.metrics.scores import inception_score, kernel_distance

RUNS = 3
CLASSES, SPATIAL = 1008, 2023  # of Inception
PART = 5000  # rows made at a time
ROWS = 1000  # rows of all pairs that the peers take at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[1000, 50000, 2048], help="samples, reference, features")
    parser.add_argument(
        "--alone",
        nargs="*",
        choices=MEASURES,
        metavar="MEASURE",
        help="also each of these alone, without a cache (all)",
    )
    parser.add_argument("--peers", action="store_true", help="beside torchmetrics and scikit-learn")
    args = parser.parse_args()
    num, num_reference, dim = args.sizes
    if args.peers:
        beside_peers(num, num_reference, dim)
    elif args.alone is not None:
        alone(num, num_reference, dim, args.alone or list(MEASURES))
    else:
        cold_and_cached(num, num_reference, dim)


def cold_and_cached(num: int, num_reference: int, dim: int) -> None:
    """Comparisons of new samples with one reference, the first with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        real = make(num_reference, dim, 0, Path(folder))
        for run in range(RUNS):
            fake = make(num, dim, 1 + run, Path(folder))
            seconds, count = timed(lambda fake=fake: len(measure(fake, real).values))
            state = "cached" if run else "cold"
            report(f"{num} against {num_reference} x {dim}, reference {state}: {seconds}, {count} measures, {peak()}")


def alone(num: int, num_reference: int, dim: int, names: list[str]) -> None:
    """All measures in one run, then some alone."""
    real, fake = make(num_reference, dim, 0, None), make(num, dim, 1, None)
    (wall, used), count = clocked(lambda: len(measure(fake, real).values))
    report(f"{num} against {num_reference} x {dim}, all {count} measures: {wall:.1f} s, {used:.1f} s CPU, {peak()}")
    times: dict[str, float] = {}
    for name in names:
        fresh = [Features(**{**vars_of(one), "cache": None}) for one in (fake, real)]  # nothing kept of earlier runs
        (wall, times[name]), found = clocked(lambda name=name, fresh=fresh: measure(*fresh, {name}))
        report(f"  {name} alone: {wall:.1f} s, {times[name]:.1f} s CPU{''.join(found.left_out.values())}")
    slowest = max(times, key=times.__getitem__)
    report(f"all of them: {used / times[slowest]:.2f} times the CPU time of {slowest}, {peak()}")


def vars_of(features: Features) -> dict[str, object]:
    """The fields, without what was computed from them."""
    return {name: getattr(features, name) for name in Features.__dataclass_fields__}


def measure(fake: Features, real: Features, wanted: set[str] | None = None):
    return compute(fake, real, None, EvaluateConfig(), shuffled_splits=True, wanted=wanted)


def beside_peers(num: int, num_reference: int, dim: int) -> None:
    """Ours and theirs in turn, best of RUNS, on the same features; values are compared."""
    real, fake = make(num_reference, dim, 0, None), make(num, dim, 1, None)
    x, y = fake.pooled, real.pooled
    rows: dict[str, tuple[Callable[[], float], str, Callable[[], float]]] = {
        "fd": (lambda: ours_fd(x, y), "torchmetrics", lambda: torchmetrics_fd(x, y)),
        "is": (lambda: inception_score(fake.logits)[0], "torchmetrics", lambda: torchmetrics_is(fake.logits.double())),
        "kd": (lambda: kernel_distance(x, y)[0], "torchmetrics", lambda: torchmetrics_kd(x, y)),
        "cmmd": (lambda: gaussian_distance(x, y).value, "scikit-learn", lambda: sklearn_cmmd(x, y)),
        "precision, recall": (lambda: ours_precision(y, x), "scikit-learn", lambda: sklearn_precision(y, x)),
    }
    for name, (ours, peer, theirs) in rows.items():
        best, values = [float("inf")] * 2, [0.0, 0.0]
        for _ in range(RUNS):
            for side, call in enumerate((ours, theirs)):
                (_, used), values[side] = clocked(call)
                best[side] = min(best[side], used)
        report(
            f"{name}: ours {best[0]:.2f} s CPU, {peer} {best[1]:.2f} s, {best[1] / best[0]:.2f} times as fast; values "
            f"{values[0]:.6g} and {values[1]:.6g}"
        )


def torchmetrics_module(name: str) -> ModuleType:
    """A module of torchmetrics, without torchvision, as in our tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    return import_module("reference_metrics").reference(f"torchmetrics.{name}")


def ours_fd(x: Tensor, y: Tensor) -> float:
    a, b = FeatureStats.of(x), FeatureStats.of(y)
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def torchmetrics_fd(x: Tensor, y: Tensor) -> float:
    (a, s), (b, t) = (((z := part.double()).mean(0), z.T.cov()) for part in (x, y))
    return float(torchmetrics_module("image.fid")._compute_fid(a, s, b, t))


def torchmetrics_is(logits: Tensor) -> float:
    """The steps of its InceptionScore.compute, of shuffled logits; in their type, float64 here as ours."""
    p = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))]
    scores = []
    for part in p.softmax(1).chunk(10):
        marginal = part.mean(0, keepdim=True)
        scores.append((part * (part.log() - marginal.log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def torchmetrics_kd(x: Tensor, y: Tensor) -> float:
    """The steps of its KernelInceptionDistance.compute: 100 subsets of 1,000."""
    poly_mmd = torchmetrics_module("image.kid").poly_mmd
    size, generator = min(1000, len(x), len(y)), torch.Generator().manual_seed(0)
    values = [
        poly_mmd(*(z[torch.randperm(len(z), generator=generator)[:size]].double() for z in (y, x))) for _ in range(100)
    ]
    return float(torch.stack(values).mean())


def sklearn_cmmd(x: Tensor, y: Tensor) -> float:
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.preprocessing import normalize

    a, b = (normalize(part.double().numpy()) for part in (x, y))

    def mean(p: np.ndarray, q: np.ndarray) -> float:
        starts = range(0, len(p), ROWS)
        return sum(rbf_kernel(p[i : i + ROWS], q, gamma=1 / 200).sum() for i in starts) / len(p) / len(q)

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


def ours_precision(real: Tensor, fake: Tensor) -> float:
    found = compare_neighbours(real, fake, 3)
    return found.precision().value + found.recall().value


def sklearn_precision(real: Tensor, fake: Tensor) -> float:
    """Radii by NearestNeighbors, then all pairs; in float32."""
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.neighbors import NearestNeighbors

    a, b = real.numpy(), fake.numpy()
    radii = [NearestNeighbors(n_neighbors=4, algorithm="brute").fit(z).kneighbors(z)[0][:, 3] for z in (a, b)]
    inside, recalled = 0, np.zeros(len(a), bool)
    for start in range(0, len(b), ROWS):
        part = slice(start, start + ROWS)
        distances = euclidean_distances(b[part], a)
        inside += (distances <= radii[0]).any(1).sum()
        recalled |= (distances <= radii[1][part, None]).any(0)
    return float(inside / len(b) + recalled.mean())


def timed(call: Callable[[], object]) -> tuple[str, object]:
    (wall, used), value = clocked(call)
    return f"{wall:.1f} s ({used:.1f} s CPU)", value


def clocked(call: Callable[[], object]) -> tuple[tuple[float, float], object]:
    """((seconds on the clock, of all cores), result)."""
    wall, used = time.perf_counter(), time.process_time()
    value = call()
    return (time.perf_counter() - wall, time.process_time() - used), value


def peak() -> str:
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def report(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def make(num: int, dim: int, seed: int, cache: Path | None) -> Features:
    """Correlated features above 0, as a network's behind a ReLU are."""
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -2, dim) / dim**0.5
    generator = torch.Generator().manual_seed(seed)
    pooled, spatial = torch.empty(num, dim), FeatureStats()
    for start in range(0, num, PART):
        rows = torch.randn(min(PART, num - start), dim, generator=generator) @ mixing
        pooled[start : start + PART] = torch.relu(rows + 0.4)
        spatial.update(torch.relu(rows[:, :SPATIAL] + 0.4))
    logits = 3 * torch.randn(num, CLASSES, generator=generator)
    digests, grey = torch.zeros(num, 32, dtype=torch.uint8), torch.zeros(num, dtype=torch.bool)
    return Features(pooled, logits, spatial, digests, grey, torch.zeros(num, 10), f"{num} {dim} {seed}", cache)


if __name__ == "__main__":
    main()
