"""Inception Score and kernel distance against torchmetrics and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_metrics import reference

from digit.errors import DigitError, MismatchError
from digit.metrics import scores
from digit.metrics.scores import inception_score, kernel_distance, kernel_subsets, kernel_within

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features:UserWarning")


class AsIs(torch.nn.Module):
    """A feature extractor for torchmetrics: images are features already."""

    def forward(self, x):
        return x


def gaussian(num: int, dim: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) + shift


# -------------------------------------------------------------------- Inception Score


def test_inception_score_equals_torchmetrics(monkeypatch):
    module = reference("torchmetrics.image.inception")
    logits = 3 * gaussian(205, 30).double()  # torchmetrics keeps the type it is given
    monkeypatch.setattr(torch, "randperm", torch.arange)  # it shuffles with torch's generator, ours is NumPy's
    theirs = module.InceptionScore(feature=AsIs(), splits=5)
    theirs.update(logits)
    mean, std = (float(value) for value in theirs.compute())
    found = inception_score(logits, num_splits=5, seed=None)
    assert found[0] == pytest.approx(mean, rel=1e-5)
    assert found[1] == pytest.approx(std * (4 / 5) ** 0.5, rel=1e-5)  # theirs divides by N - 1, the paper's by N


def test_inception_score_of_uneven_splits_equals_the_formula():
    logits = 3 * gaussian(23, 6).double().numpy()  # splits of 7, 8 and 8
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = (p[:7], p[7:15], p[15:])
    wanted = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    found = inception_score(torch.from_numpy(logits), num_splits=3, seed=None)
    assert found == pytest.approx((np.mean(wanted), np.std(wanted)), rel=1e-9)


def test_inception_score_in_closed_form():
    sure = torch.eye(8).repeat(10, 1) * 1000  # each image of one class, all classes equally often
    assert inception_score(sure, num_splits=1) == pytest.approx((8.0, 0.0))
    assert inception_score(torch.zeros(20, 8), num_splits=2) == pytest.approx((1.0, 0.0))
    by_class = sure[torch.arange(80).div(10, rounding_mode="floor")]  # sorted: a split holds one class
    assert inception_score(by_class, num_splits=8, seed=None)[0] == pytest.approx(1.0)
    assert inception_score(by_class, num_splits=8)[0] > 4


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 50), st.integers(0, 99))
def test_inception_score_lies_between_1_and_the_classes(num, classes, scale, seed):
    mean, _ = inception_score(scale * gaussian(num, classes, seed=seed), num_splits=1, seed=seed)
    assert 1 - 1e-9 <= mean <= classes * (1 + 1e-9)


# -------------------------------------------------------------------- kernel distance


def test_kernel_distance_equals_torchmetrics():
    module = reference("torchmetrics.image.kid")
    first, second = gaussian(60, 16).double(), gaussian(60, 16, 0.5, seed=1).double()
    theirs = module.KernelInceptionDistance(
        feature=AsIs(), subsets=2, subset_size=60
    )  # whole sets: no subset is sampled
    theirs.update(first, real=True)
    theirs.update(second, real=False)
    assert kernel_distance(first, second) == pytest.approx((float(theirs.compute()[0]), 0.0), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("num_subsets", [3, 60])  # each subset by itself, or all in one pass
def test_kernel_distance_of_subsets_equals_torchmetrics(monkeypatch, num_subsets):
    poly_mmd = reference("torchmetrics.image.kid").poly_mmd
    first, second = gaussian(90, 8), gaussian(40, 8, 0.3, seed=1)
    rng, wanted = np.random.default_rng(3), []
    for _ in range(num_subsets):
        a, b = (x[rng.choice(len(x), 15, replace=False)].double() for x in (first, second))
        wanted.append(float(poly_mmd(a, b)))
    found = kernel_distance(first, second, num_subsets=num_subsets, subset_size=15, seed=3)
    assert found == pytest.approx((np.mean(wanted), np.std(wanted)), rel=1e-5)
    monkeypatch.setattr(scores, "MAX_DISTANCES", 200)  # blocks of a few rows
    assert kernel_distance(first, second, num_subsets=num_subsets, subset_size=15, seed=3) == pytest.approx(found)


def test_kernel_distance_takes_sums_that_are_known_already():
    first, second = gaussian(30, 8), gaussian(90, 8, 0.3, seed=1)
    chosen = kernel_subsets(30, 90, 6, 20, 4)
    known = kernel_within(second, chosen[1])
    kernel = (second[chosen[1][0]].double() @ second[chosen[1][0]].double().T / 8 + 1) ** 3
    assert float(known[0]) == pytest.approx(float(kernel.fill_diagonal_(0).sum()), rel=1e-9)
    options = {"num_subsets": 6, "subset_size": 20, "seed": 4}
    assert kernel_distance(first, second, **options) == kernel_distance(first, second, within_second=known, **options)


def test_kernel_distance_is_unbiased():
    distances = [kernel_distance(gaussian(30, 4, seed=2 * s), gaussian(30, 4, seed=2 * s + 1))[0] for s in range(200)]
    error = np.std(distances) / len(distances) ** 0.5
    assert abs(np.mean(distances)) < 4 * error and min(distances) < 0
    assert kernel_distance(gaussian(30, 4), gaussian(30, 4, 1.0, seed=1))[0] > 10 * np.std(distances)


# -------------------------------------------------------------------- misuse


def test_misuse_says_what_to_do(unchecked):
    good = gaussian(10, 4)
    with pytest.raises(DigitError, match="at least one image per split"):
        inception_score(good, num_splits=11)
    with pytest.raises(DigitError, match="NaN"):
        inception_score(good * float("inf"))
    with pytest.raises(DigitError, match="shape"):
        kernel_distance(good[0], good)
    with pytest.raises(MismatchError, match="4 and 3"):
        kernel_distance(good, good[:, :3])
    with pytest.raises(DigitError, match="at least 2"):
        kernel_distance(good, good[:1])
