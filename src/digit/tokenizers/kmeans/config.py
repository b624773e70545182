"""Settings of K-means (paper, section 3.2), and of its residual and product forms."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from digit.runtime.hardware import Precision
from digit.runtime.settings import SEED, check_settings, within
from digit.tokenizers.base import FitCost

MIN_POINTS_PER_CODE = 8  # below this a centroid is the mean of a handful of patches
DRAWN_SECONDS = 2.2e-7  # of one core, for each feature that a sample is drawn from (bench/full_count.py kmeans)
CHUNK_SHARE = 0.25  # of the memory budget, for one chunk and its scores


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """K-means settings.

    The released code uses faiss.Kmeans: 20 iterations (faiss's own default is 25), all of them made, at most 256 points
    a centroid, a start from random points, float32. `as_released` gives exactly these. The defaults differ in three
    settings, to save time and codes: iterations stop once they gain next to nothing (tolerance), an empty cluster
    splits the one with the largest error (empty_clusters), and distances may round to bfloat16 during the iterations
    (precision). The random numbers are never faiss's, so the centroids are others, as with another seed.
    """

    num_clusters: int = within("[1, inf)", 8192)
    """Number of centroids K (the paper has 8192 and 16000)."""
    num_iterations: int = within("[1, inf)", 20)
    """At most this many Lloyd iterations."""
    init: Literal["random", "k-means++"] = "random"
    """Start from random points, or from points far apart (k-means++ in geometrically growing batches)."""
    seed: int = within(SEED, 0)
    """Seed of the start, the subsample and the re-seeding of empty clusters."""
    max_points_per_centroid: int | None = within("[1, inf)", 256)
    """Use a random subsample of at most K times this many points; null uses all."""
    tolerance: float = within("[0, 1)", 1e-4)
    """Stop once an iteration lowers the inertia by less than this fraction; 0 runs all iterations, as faiss."""
    empty_clusters: Literal["largest_error", "faiss"] = "largest_error"
    """Where an empty cluster goes: into one half of the cluster with the largest error; or, as in faiss, 1/1024 beside
    a random cluster, large ones more often."""
    memory_budget_bytes: int = within("[1, inf)", 2**31)
    """Streamed features are kept in memory only up to this many bytes, and are streamed again otherwise."""
    precision: Literal["auto", Precision] = "auto"
    """Precision of the distances during the iterations; auto takes bf16 where the hardware multiplies it fast."""
    device: str | None = None
    """Device that computes; null stays where the features are."""
    pca: int = within("[0, inf)", 0)
    """Cluster the features' first principal components, so many of them, in place of all features; 0 takes the features
    as they are, as the paper does. One more pass over the images."""
    whiten: bool = False
    """Scale each principal component to variance 1, so that all of them count alike; nothing without pca."""

    def __post_init__(self) -> None:
        check_settings(self)

    def as_released(self) -> Self:
        """These settings with those that the released code leaves to faiss; K, seed, budget and device stay."""
        return replace(
            self, num_iterations=20, init="random", max_points_per_centroid=256, tolerance=0.0,
            empty_clusters="faiss", precision="fp32",
        )  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return self.num_clusters

    @property
    def num_levels(self) -> int:
        """Codes of one feature."""
        return 1

    @property
    def min_points(self) -> int:
        """Points that a fit should have at least."""
        return MIN_POINTS_PER_CODE * self.num_clusters

    def max_points(self, available: int) -> int:
        """Points of `available` ones that take part."""
        per_centroid = self.max_points_per_centroid
        return available if per_centroid is None else min(available, self.num_clusters * per_centroid)

    def cost(self, num_features: int, dim: int) -> FitCost:
        """One product per iteration, 2 N D K FLOPs; points that exceed the memory budget are computed every time."""
        num_points, projection = self.max_points(num_features), 2.0 * num_features * dim * (dim + self.pca)
        dim = self.pca or dim
        streamed = 4 * num_points * dim > (1 - CHUNK_SHARE) * self.memory_budget_bytes
        flops = 2.0 * num_points * dim * self.num_clusters * (self.num_iterations + 1)
        return FitCost(
            num_points=num_points,
            num_passes=(self.num_iterations + 2 if streamed else 1) + bool(self.pca),
            flops=flops + (projection if self.pca else 0.0),
            memory_bytes=min(4.0 * num_points * dim + 40.0 * self.num_clusters * dim, self.memory_budget_bytes),
            host_seconds=DRAWN_SECONDS * num_features,
            streamed=streamed,
            description=f"K {self.num_clusters}, {self.num_iterations} iterations"
            + (f" of {self.pca} components" if self.pca else ""),
        )


@dataclass(frozen=True, kw_only=True)
class ResidualKMeansConfig(KMeansConfig):
    """Residual K-means: each level clusters what the levels before it leave of a feature."""

    num_clusters: int = within("[1, inf)", 1024)
    """Number of centroids K of each level."""
    num_levels: int = within("[1, 16]", 2)  # pyright: ignore[reportIncompatibleMethodOverride]
    """Levels L: codes of one feature."""

    def cost(self, num_features: int, dim: int) -> FitCost:
        """That of K-means for each level."""
        return of_levels(super().cost(num_features, dim), self.num_levels, self.num_levels, bool(self.pca))


@dataclass(frozen=True, kw_only=True)
class ProductKMeansConfig(KMeansConfig):
    """Product K-means: the features, or their principal components, are cut into parts, and each is clustered alone."""

    num_clusters: int = within("[1, inf)", 1024)
    """Number of centroids K of each part."""
    num_levels: int = within("[1, 16]", 2)  # pyright: ignore[reportIncompatibleMethodOverride]
    """Parts, each a level: codes of one feature. With pca, the first part has the largest variance unless whitened."""

    def cost(self, num_features: int, dim: int) -> FitCost:
        """Passes for each part; all products together are those of K-means."""
        return of_levels(super().cost(num_features, dim), self.num_levels, 1, bool(self.pca))


def of_levels(cost: FitCost, num_levels: int, products: int, pca: bool) -> FitCost:
    """What several levels take, from what one takes of the whole features; the pass of a PCA is made once."""
    return replace(
        cost,
        num_passes=num_levels * (cost.num_passes - pca) + pca,
        flops=products * cost.flops,
        host_seconds=num_levels * cost.host_seconds,
        description=f"{num_levels} levels, {cost.description}",
    )
