"""Time and peak memory of all measures of `digit evaluate` on random features: reference cold, then from the cache.

    python bench/evaluation_speed.py                                # 1,000 samples against 50,000, 2,048 features
    python bench/evaluation_speed.py 50000 50000 2048

Each line is one comparison with new samples. Images and network are left out.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from digit.evaluation.features import Features
from digit.evaluation.measures import compute
from digit.evaluation.settings import EvaluateConfig
from digit.metrics.frechet import FeatureStats

RUNS = 3
CLASSES, SPATIAL = 1008, 2023  # of Inception
PART = 5000  # rows made at a time


def main() -> None:
    num, num_reference, dim = (int(word) for word in (sys.argv[1:4] or ("1000", "50000", "2048")))
    with tempfile.TemporaryDirectory() as folder:
        real = make(num_reference, dim, 0, Path(folder))
        for run in range(RUNS):
            fake = make(num, dim, 1 + run, Path(folder))
            start = time.perf_counter()
            found = compute(fake, real, None, EvaluateConfig(), shuffled_splits=True)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            state = "cached" if run else "cold"
            sys.stdout.write(
                f"{num} against {num_reference} x {dim}, reference {state}: {seconds:.1f} s, "
                f"{len(found.values)} measures, peak {peak:.2f} GiB\n"
            )
            sys.stdout.flush()


def make(num: int, dim: int, seed: int, cache: Path) -> Features:
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
