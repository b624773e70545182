"""K-means properties: predict is the brute-force argmin, a fit is a function of the points and the seed."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.kmeans import KMeans
from digit.tokenizers.kmeans.nearest import nearest

QUICK = settings(max_examples=40, deadline=None)


@st.composite
def problems(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """(x (n, D), centroids (K, D)); offsets, scales and repeated centroids included."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, num, dim = draw(st.integers(1, 60)), draw(st.integers(1, 40)), draw(st.integers(1, 24))
    scale, offset = draw(st.sampled_from([1e-3, 1.0, 1e3])), draw(st.sampled_from([0.0, 1.0, 50.0]))
    x = scale * (rng.standard_normal((n, dim)) + offset)
    centroids = scale * (rng.standard_normal((num, dim)) + offset)
    if draw(st.booleans()) and num > 1:
        centroids[-1] = centroids[0]
    return torch.from_numpy(x).float(), torch.from_numpy(centroids).float()


@QUICK
@given(problems())
def test_predict_is_brute_force(problem):
    x, centroids = problem
    distance = (x.double()[:, None] - centroids.double()).square().sum(-1)  # (n, K)
    found = distance.gather(1, nearest(x, centroids)[:, None])[:, 0]
    torch.testing.assert_close(found, distance.amin(1), rtol=1e-9, atol=1e-12 * float(x.double().square().max()))


@QUICK
@given(problems(), st.integers(1, 20))
def test_predict_does_not_depend_on_the_batch(problem, size):
    x, centroids = problem
    assert torch.equal(nearest(x, centroids), torch.cat([nearest(part, centroids) for part in x.split(size)]))


@QUICK
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from(["random", "k-means++"]), st.integers(1, 30))
def test_fit_is_sound_and_repeatable(seed, num, init, piece):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((60, 3))).float()
    cfg = KMeansConfig(num_clusters=num, init=init, seed=seed, num_iterations=4)
    first, second = (KMeans(cfg).fit(lambda: iter(x.split(piece))) for _ in range(2))
    assert torch.equal(first.centroids_, second.centroids_)
    assert int(first.counts_.sum()) == len(x) and torch.isfinite(first.centroids_).all()
    assert first.inertia_ <= float((x.double() - x.double().mean(0)).square().sum()) * (1 + 1e-6)
