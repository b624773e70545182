"""Settings of K-means (paper, section 3.2)."""

from dataclasses import dataclass
from typing import Literal

from digit.errors import DigitError


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """K-means settings; the defaults follow faiss.Kmeans, which the released code uses."""

    num_clusters: int = 8192
    """Number of centroids K (the paper has 8192 and 16000)."""
    num_iterations: int = 20
    """At most this many Lloyd iterations."""
    init: Literal["random", "k-means++"] = "random"
    """Start from random points, or from points far apart (k-means++ in geometrically growing batches)."""
    seed: int = 0
    """Seed of the start, the subsample and the re-seeding of empty clusters."""
    max_points_per_centroid: int | None = 256
    """Use a random subsample of at most K times this many points; null uses all."""
    tolerance: float = 1e-4
    """Stop once an iteration lowers the inertia by less than this fraction; 0 runs all iterations."""
    memory_budget_bytes: int = 2**31
    """Streamed features are kept in memory only up to this many bytes, and are streamed anew otherwise."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the distances during the iterations; auto takes bfloat16 where the hardware multiplies it fast."""
    device: str | None = None
    """Device that computes; null stays where the features are."""

    def __post_init__(self) -> None:
        counts = ("num_clusters", "num_iterations", "max_points_per_centroid", "memory_budget_bytes")
        for name, least in (*((name, 1) for name in counts), ("tolerance", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DigitError(f"k-means: {name} is {value}, it must be at least {least}")
        for name, allowed in {"init": ("random", "k-means++"), "dtype": ("auto", "float32", "bfloat16")}.items():
            if getattr(self, name) not in allowed:
                raise DigitError(f"k-means: {name} is {getattr(self, name)!r}, choose one of {', '.join(allowed)}")
