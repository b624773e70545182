"""What becomes of empty clusters, by our rule and by faiss's; k-means with the released settings."""

import numpy as np
import pytest
import torch
from toy_kmeans import blobs

from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.empty import split_as_faiss
from digit.tokenizers.kmeans.kmeans import KMeans


def test_faiss_puts_both_halves_beside_the_mean_with_alternating_signs():
    shift = torch.tensor([1.0, 2.0, -3.0])
    raw = torch.tensor([[4.0, 5.0, 6.0], [0.0, 0.0, 0.0], [7.0, 8.0, 9.0]])
    centroids = raw - shift
    counts = torch.tensor([1, 0, 99])  # a cluster of one point has no chance
    assert split_as_faiss(centroids, shift, counts, np.random.default_rng(0)) == 1
    step = raw[2] * torch.tensor([1.0, -1.0, 1.0]) / 1024
    torch.testing.assert_close(centroids + shift, torch.stack([raw[0], raw[2] + step, raw[2] - step]))


def test_faiss_draws_clusters_by_their_points():
    """(n - 1) / (N - K) in turn from the first cluster: 30 / 97, then (67 / 97) of 67 / 97, and again."""
    counts, drawn = torch.tensor([31, 68, 0]), []
    for seed in range(2000):
        centroids = torch.tensor([[1.0], [2.0], [0.0]])
        split_as_faiss(centroids, torch.zeros(1), counts, np.random.default_rng(seed))
        drawn.append(round(float(centroids[2])))
    first, second = 30 / 97, 67 / 97 * 67 / 97
    assert drawn.count(1) / 2000 == pytest.approx(first / (first + second), abs=0.04)


def test_many_empty_clusters_share_the_points_that_are_left():
    centroids, counts = torch.zeros(64, 2), torch.zeros(64, dtype=torch.int64)
    centroids[0], counts[0] = torch.tensor([3.0, 5.0]), 1000
    assert split_as_faiss(centroids, torch.zeros(2), counts, np.random.default_rng(0)) == 63
    assert len(centroids.unique(dim=0)) > 10 and (centroids / centroids.mean(0) - 1).abs().max() < 0.02


def test_released_settings_make_every_iteration_and_leave_no_code_dead():
    cfg = KMeansConfig(num_clusters=11, num_iterations=3, seed=7, memory_budget_bytes=2**20).as_released()
    assert (cfg.num_clusters, cfg.seed, cfg.memory_budget_bytes) == (11, 7, 2**20)
    assert (cfg.num_iterations, cfg.tolerance, cfg.max_points_per_centroid, cfg.init) == (20, 0, 256, "random")
    assert (cfg.empty_clusters, cfg.precision) == ("faiss", "fp32")
    x = torch.cat([torch.zeros(500, 3), blobs(60, clusters=10, dim=3) + 10])
    fit = KMeans(cfg).fit(x)
    assert len(fit.history_) == 21 and sum(entry["reseeded"] for entry in fit.history_) > 0
    assert fit.inertia_ < KMeans(KMeansConfig(num_clusters=2)).fit(x).inertia_


def test_released_settings_reach_faiss_inertia():
    faiss = pytest.importorskip("faiss")
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1)) + 2
    theirs = [faiss.Kmeans(16, 32, niter=20, seed=seed) for seed in range(5)]
    for fit in theirs:
        fit.train(x.numpy())
    ours = [KMeans(KMeansConfig(num_clusters=32, seed=seed).as_released()).fit(x).history_[-2] for seed in range(5)]
    assert np.mean([entry["inertia"] for entry in ours]) == pytest.approx(
        np.mean([f.obj[-1] for f in theirs]), rel=0.01
    )
