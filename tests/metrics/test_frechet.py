"""Fréchet distance against the textbook formula, scipy and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_metrics import reference

from digit.errors import DigitError, MismatchError
from digit.metrics.frechet import (
    FeatureStats,
    bootstrap_std,
    count_warnings,
    frechet_distance,
    nuclear_norm,
    square_root,
)
from digit.metrics.influence import frechet_error, frechet_with_error


def _stats(seed, num, dim, shift=0.0):
    rng = np.random.default_rng(seed)
    features = rng.normal(shift, 1.0, (num, dim)) @ rng.normal(size=(dim, dim))
    return features, FeatureStats.of(features)


def test_matches_scipy_square_root():
    from scipy.linalg import sqrtm

    _, a = _stats(0, 300, 40)
    _, b = _stats(1, 400, 40, shift=0.3)
    covmean = sqrtm(a.cov @ b.cov).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * covmean)
    assert frechet_distance(a.mean, a.cov, b.mean, b.cov) == pytest.approx(expected, rel=1e-5)


def test_matches_eigenvalues_of_the_product():
    # the form torchmetrics computes: Tr (S1 S2)^(1/2) = sum of square roots of the eigenvalues of S1 S2
    _, a = _stats(2, 500, 64)
    _, b = _stats(3, 500, 64)
    roots = torch.linalg.eigvals(torch.from_numpy(a.cov @ b.cov)).sqrt().real.sum().item()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * roots
    assert frechet_distance(a.mean, a.cov, b.mean, b.cov) == pytest.approx(expected, rel=1e-5)


def test_matches_torchmetrics():
    fid = reference("torchmetrics.image.fid")
    _, a = _stats(4, 200, 16)
    _, b = _stats(5, 200, 16, shift=1.0)
    tensors = (torch.from_numpy(x) for x in (a.mean, a.cov, b.mean, b.cov))
    expected = fid._compute_fid(*tensors).item()
    assert frechet_distance(a.mean, a.cov, b.mean, b.cov) == pytest.approx(expected, rel=1e-5)


def test_whole_path_matches_torchmetrics():
    # features in batches -> statistics -> distance, with a network that both are handed
    class Pool(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)

    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, top, (96, 3, 8, 8), dtype=torch.uint8, generator=generator) for top in (256, 200))
    metric = reference("torchmetrics.image.fid").FrechetInceptionDistance(feature=Pool()).set_dtype(torch.float64)
    ours = [FeatureStats(), FeatureStats()]
    for images, stats, is_real in ((real, ours[0], True), (fake, ours[1], False)):
        for batch in images.split(40):
            metric.update(batch, real=is_real)
            stats.update(Pool()(batch))
    found = frechet_distance(ours[0].mean, ours[0].cov, ours[1].mean, ours[1].cov)
    assert found == pytest.approx(float(metric.compute()), rel=1e-5)


def test_closed_forms():
    eye = np.eye(5)
    assert frechet_distance(np.zeros(5), eye, np.full(5, 2.0), eye) == pytest.approx(20.0)
    assert frechet_distance(np.zeros(5), 4 * eye, np.zeros(5), 9 * eye) == pytest.approx(5 * (3 - 2) ** 2)


def test_equal_and_rank_deficient_sets_are_at_zero():
    features, stats = _stats(6, 10, 64)  # 10 images, 64 features: the covariance is singular
    again = FeatureStats.of(features[::-1])
    scale = np.trace(stats.cov)
    assert frechet_distance(stats.mean, stats.cov, again.mean, again.cov) < 1e-9 * scale
    zero = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), zero, np.zeros(3), zero) == 0.0


def test_is_symmetric():
    _, a = _stats(7, 90, 12)
    _, b = _stats(8, 80, 12)
    there, back = frechet_distance(a.mean, a.cov, b.mean, b.cov), frechet_distance(b.mean, b.cov, a.mean, a.cov)
    assert there == pytest.approx(back, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 17), min_size=1, max_size=6), st.integers(0, 2**31), st.sampled_from([0.0, 1e4]))
def test_streaming_equals_one_pass(sizes, seed, offset):
    features = np.random.default_rng(seed).normal(offset, 1.0, (sum(sizes) + 2, 4))
    whole, parts, merged = FeatureStats.of(features), FeatureStats.of(features[:2]), FeatureStats.of(features[:2])
    at = 2
    for size in sizes:
        parts.update(torch.from_numpy(features[at : at + size]))
        merged.merge(FeatureStats().update(features[at : at + size]))
        at += size
    for stats in (whole, parts, merged):
        assert stats.count == len(features)
        np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-12, atol=1e-15)  # a mean may be near 0
        np.testing.assert_allclose(stats.cov, np.cov(features, rowvar=False), rtol=1e-7, atol=1e-9)


def test_float32_features_are_accumulated_in_float64():
    features = torch.randn(1000, 3) * 1e-3 + 100
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(FeatureStats.of(features).cov, expected, rtol=1e-9)


def test_misuse_says_what_to_do():
    with pytest.raises(DigitError, match="at least 2"):
        _ = FeatureStats().mean
    with pytest.raises(DigitError, match="at least 2"):
        _ = FeatureStats.of(np.zeros((1, 4))).cov
    with pytest.raises(DigitError, match="NaN"):
        FeatureStats.of(np.array([[1.0, np.nan]]))
    with pytest.raises(DigitError, match="shape"):
        FeatureStats.of(np.zeros((2, 3, 4)))
    with pytest.raises(MismatchError, match="5 dimensions, statistics 4"):
        FeatureStats.of(np.zeros((2, 4))).update(np.zeros((2, 5)))
    with pytest.raises(MismatchError, match="2 and 3"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_bootstrap_estimates_the_spread_over_samples():
    rng = np.random.default_rng(0)
    samples = [(rng.normal(0, 1, (200, 2)), rng.normal(1, 1, (200, 2))) for _ in range(40)]
    stats = [(FeatureStats.of(a), FeatureStats.of(b)) for a, b in samples]
    truth = np.std([frechet_distance(a.mean, a.cov, b.mean, b.cov) for a, b in stats], ddof=1)
    estimate = bootstrap_std(*samples[0], num_rounds=60)
    assert 0.6 < estimate / truth < 1.6
    assert estimate == bootstrap_std(*samples[0], num_rounds=60)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((60, 60), ["60 samples for 1280", "60 reference images for 1280"]),
        (
            (60, 500),
            ["60 samples for 1280", "500 reference images for 1280", "60 samples against 500 reference images"],
        ),
        ((5000, 5000), ["5000 samples: below", "5000 reference images: below", "5000 samples against 5000"]),
        ((50_000, 50_000), []),
        ((50_000, 10_000), ["50000 samples against 10000 reference images"]),
        ((50_000, None), []),
        ((1280, None), ["1280 samples for 1280 features"]),
        ((1281, None), ["1281 samples: below 10,000"]),
    ],
)
def test_too_few_images_are_warned_of_in_one_way(numbers, told):
    warnings = count_warnings(*numbers, dim=1280)
    assert [text for text, start in zip(warnings, told, strict=True) if not text.startswith(start)] == []


@pytest.mark.parametrize("shape", [(8, 12), (12, 12), (60, 12), (2, 5)])
@pytest.mark.parametrize("rank", [12, 3])
def test_value_and_error_together_equal_each_by_itself(shape, rank):
    """Fewer images than features take one decomposition for both."""
    rng = np.random.default_rng(0)
    x, y = 0.8 * rng.normal(size=shape) + 0.1, rng.normal(size=(400, shape[1]))
    y[:, rank:] = 0
    own, truth = FeatureStats.of(x), FeatureStats.of(y)
    value, error = frechet_with_error(x, truth.mean, truth.cov)
    assert value == pytest.approx(frechet_distance(own.mean, own.cov, truth.mean, truth.cov), rel=1e-6)
    assert error == pytest.approx(frechet_error(x, truth.mean, truth.cov), rel=1e-6)
    known = frechet_with_error(x, truth.mean, truth.cov, root=square_root(truth.cov))
    assert known == pytest.approx((value, error), rel=1e-9)
    gaussians = own.mean, own.cov, truth.mean, truth.cov
    assert frechet_distance(*gaussians, rank1=len(x) - 1) == pytest.approx(value, rel=1e-6)
    again = FeatureStats.restore(truth.state())
    assert (again.cov == truth.cov).all() and again.count == 400


def test_nuclear_norms_of_sound_and_of_nearly_singular_matrices(monkeypatch):
    calls, svd = [], np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(60, 60)))[0] for _ in range(2))
    for least, decomposed in ((1e-3, 0), (1e-9, 1), (0.0, 1)):
        sigma = np.geomspace(1, max(least, 1e-9), 60)
        sigma[-1] = least
        calls.clear()
        np.testing.assert_allclose(nuclear_norm((left * sigma) @ right), sigma.sum(), rtol=1e-10)
        assert len(calls) == decomposed
