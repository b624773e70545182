"""K-means on toy points, also on two ranks; in a module of its own, which a spawned process can import."""

import numpy as np
import torch

from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.kmeans import KMeans


def blobs(num: int = 600, clusters: int = 8, dim: int = 5, seed: int = 0, spread: float = 0.05) -> torch.Tensor:
    """(N, D) points around well separated centres, shuffled."""
    rng = np.random.default_rng(seed)
    centres = 4 * rng.standard_normal((clusters, dim))
    points = centres[np.arange(num) % clusters] + spread * rng.standard_normal((num, dim))
    return torch.from_numpy(points[rng.permutation(num)]).float()


def pieces(x: torch.Tensor, size: int):
    """A re-iterable stream over the rows of x that counts its passes."""

    def stream():
        stream.passes += 1
        return iter(x.split(size))

    stream.passes = 0
    return stream


def budget(cfg: KMeansConfig, dim: int, rows: int) -> int:
    """A memory budget that holds about so many rows beside the work."""
    num = cfg.num_clusters
    kept = 48 * num * dim + 4 * dim * (rows + num)
    return max(kept + 16 * (4 * num + 16 * dim), kept * 8 // 7 + 1)


SHARED = ("all", "k-means++", "subsample", "stream", "stream again")  # a stream without and with numbers


def numbered(x: torch.Tensor, first: int):
    """A stream over the rows of x, with their numbers from `first` on."""
    return lambda: ((part, first + 50 * i + np.arange(len(part))) for i, part in enumerate(x.split(50)))


def fit_share(name: str, x: torch.Tensor) -> dict:
    cfg = dict(num_clusters=12, num_iterations=4, tolerance=0, precision="fp32", max_points_per_centroid=None)
    cfg |= {"k-means++": {"init": "k-means++"}, "subsample": {"max_points_per_centroid": 20}}.get(name, {})
    if name == "stream again":
        cfg["memory_budget_bytes"] = budget(KMeansConfig(**cfg), 5, 100)
    several = torch.distributed.is_initialized()
    features = {"stream": pieces(x, 50), "stream again": numbered(x, 170 if len(x) == 430 else 0)}.get(name, x)
    fit = KMeans(KMeansConfig(**cfg)).fit(features, across_ranks=several)
    fields = ("centroids_", "inertia_", "num_points_", "counts_", "streamed_")
    return {field: getattr(fit, field) for field in fields}


def across_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    shares = (blobs(spread=1.5)[:170], blobs(spread=1.5)[170:])
    fits = {name: fit_share(name, shares[rank]) for name in SHARED}
    torch.save(fits, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
