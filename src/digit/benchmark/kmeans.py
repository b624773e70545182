"""K-means: points times iterations per second, beside the distance matrix multiplications and a read of the points."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from digit.benchmark import floors
from digit.benchmark.clock import alternate
from digit.benchmark.measurement import Measurement
from digit.benchmark.sizes import Points, Size
from digit.runtime.hardware import multiplies_bf16
from digit.tokenizers.encoders import PRECISIONS
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.kmeans import KMeans
from digit.tokenizers.kmeans.nearest import chunk_rows

MAX_REPEATS = 3


def random_points(points: Points, device: torch.device) -> Tensor:
    """(N, D) float32, normal with variance 1 / j of the j-th feature: overlapping clusters, as in real features.

    With well-separated clusters, the inertia would depend on which of them the initialisation missed.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(points.num, points.dim, generator=generator, device=device)
    return x.mul_(torch.arange(1, points.dim + 1, device=device).rsqrt())


def kmeans_config(points: Points) -> KMeansConfig:
    """Uses all points and runs all iterations."""
    return KMeansConfig(
        num_clusters=points.clusters,
        num_iterations=points.iterations,
        max_points_per_centroid=None,
        tolerance=0,
        memory_budget_bytes=2**35,
    )


def time_kmeans(size: Size, device: torch.device, repeats: int) -> list[Measurement]:
    """Times `KMeans.fit`; the floor covers its iterations, without initialisation and last assignment."""
    return [time_problem(points, device, min(repeats, MAX_REPEATS)) for points in size.points]


def time_problem(points: Points, device: torch.device, repeats: int) -> Measurement:
    x, precision = random_points(points, device), "bf16" if multiplies_bf16(device) else "fp32"
    shape = (points.num, points.dim, points.clusters, chunk_rows(device))
    products = floors.distances(*shape, device, PRECISIONS[precision])

    def floor() -> None:
        products()
        x.sum()  # reads every point once

    fits: list[KMeans] = []

    def fit() -> None:
        fits[:] = [KMeans(kmeans_config(points)).fit(x)]

    times, peaks = alternate({"fit": fit, "floor": floor}, repeats, device, warm_up=False)
    labels = dict(part="kmeans", case=points.name, precision=precision, unit="points")
    extra = {"fit_seconds": times["fit"].median, "inertia": fits[0].inertia_}
    return Measurement(
        **labels,
        count=points.num * points.iterations,
        time=times["fit"],
        floor=times["floor"].times(points.iterations),
        peak=peaks["fit"],
        extra=extra,
    )


def profiled(size: Size, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Cases to profile."""
    x = random_points(size.points[0], device)
    return {size.points[0].name: partial(KMeans(kmeans_config(size.points[0])).fit, x)}
