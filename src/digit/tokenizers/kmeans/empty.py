"""What becomes of a cluster that no point is nearest to: it takes over a part of another one.

Legend: D features, K clusters.
"""

import heapq
import math

import numpy as np
from torch import Tensor

FAISS_EPSILON = 1 / 1024


def split_largest_errors(centroids: Tensor, table: Tensor, counts: Tensor, rng: np.random.Generator) -> int:
    """Give each empty cluster one half of the cluster with the largest error, cut at random through its mean.

    Changes `centroids` (K, D) in place and returns how many clusters were re-seeded. table (K, D + 2) float64 holds
    each cluster's sum of points, sum of their squared norms, and number. The error, not the count, picks the cluster:
    a heap of identical points has nothing to split.
    """
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return 0
    dim = centroids.shape[1]
    total, squares = table[:, :dim], table[:, dim]
    error = squares - total.square().sum(1) / counts.clamp(min=1)  # sum ||x||^2 - ||s||^2 / n
    noise = 1e-6 * squares  # float32 rounds each ||x||^2
    splittable = ((counts > 1) & (error > noise)).nonzero()[:, 0].tolist()
    errors, sizes = error.tolist(), counts.tolist()
    heap = [(-errors[k], k, float(sizes[k])) for k in splittable]
    heapq.heapify(heap)
    done = 0
    while heap and done < len(empty):
        negative, k, count = heapq.heappop(heap)
        step = torch_like(rng.standard_normal(dim), centroids) * 0.1 * math.sqrt(-negative / count / dim)
        centroids[empty[done]] = centroids[k] + step
        centroids[k] -= step
        for half in (k, empty[done]):
            heapq.heappush(heap, (negative / 2, half, count / 2))
        done += 1
    return done


def split_as_faiss(centroids: Tensor, shift: Tensor, counts: Tensor, rng: np.random.Generator) -> int:
    """Put each empty cluster beside a random other one, a cluster of n points with chance (n - 1) / (N - K) in turn.

    faiss's rule (Douze et al. 2024; its clustering code): from cluster 0 on, again and again, until one is drawn; both
    then lie at its mean times 1 + e and 1 - e, with the sign alternating over the features, e = 1/1024, and share its
    points. Changes `centroids` (K, D), which are less `shift` (D,), in place; returns how many were re-seeded. The
    random numbers are not faiss's.
    """
    empty = (counts == 0).nonzero()[:, 0].tolist()
    sizes = counts.double().cpu().numpy()
    spare = max(sizes.sum() - len(sizes), 1.0)
    signs = np.where(np.arange(centroids.shape[1]) % 2 == 0, FAISS_EPSILON, -FAISS_EPSILON)
    for k in empty:
        chances = (sizes - 1) / spare
        while not len(drawn := np.flatnonzero(rng.random(len(sizes)) < chances)):
            pass
        from_ = int(drawn[0])
        step = torch_like(signs, centroids) * (centroids[from_] + shift)
        centroids[k] = centroids[from_] + step
        centroids[from_] -= step
        sizes[k] = sizes[from_] = sizes[from_] / 2
    return len(empty)


def torch_like(values: np.ndarray, like: Tensor) -> Tensor:
    """An array as a tensor of the same device and type as another."""
    return like.new_tensor(values)
