"""Precision, recall, density, coverage and authenticity against naive loops, scikit-learn and known answers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from digit.errors import DigitError, MismatchError
from digit.metrics import distances
from digit.metrics.distances import Nearest, Pairs, nearest_others
from digit.metrics.neighbours import authenticity, compare_at, compare_neighbours, density_coverage, precision_recall


def gaussian(num: int, dim: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) + shift


def naive(real, fake, k):
    """(num_balls, covered, recalled, authentic) by loops over the definitions, in float64."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)

    def distances_to(points, others):
        return np.array([[np.linalg.norm(a - b) for b in others] for a in points])

    def radii(points, k):
        own = distances_to(points, points)
        return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(own)])

    d = distances_to(fake, real)
    inside = d <= radii(real, k)
    nearest = d.argmin(1)
    return inside.sum(1), inside.any(0), (d <= radii(fake, k)[:, None]).any(0), d.min(1) > radii(real, 1)[nearest]


def parts(found):
    return found.num_balls, found.covered, found.recalled, found.authentic


@settings(max_examples=25, deadline=None)
@given(
    st.integers(6, 25), st.integers(6, 25), st.integers(1, 5), st.floats(0, 3), st.sampled_from([2, 3, 40]),
    st.sampled_from([0.0, 1e4]), st.sampled_from([1e-20, 1.0, 1e12]), st.sampled_from([3, 2048]), st.integers(0, 99),
)  # fmt: skip
def test_neighbours_equal_the_definitions(num_real, num_fake, k, shift, dim, offset, scale, size, seed):
    """Also far from the origin, where float32 products say nothing, and at scales that float32 squares cannot hold."""
    real, fake = gaussian(num_real, dim, seed=seed).double(), gaussian(num_fake, dim, shift, seed=seed + 1).double()
    fake[1], real[2] = real[0], 30 * real[2]  # a copy, and an outlier
    real, fake = ((values + offset) * scale for values in (real, fake))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "SIZE", size)
        found = compare_neighbours(real, fake, k)
    for value, wanted in zip(parts(found), naive(real, fake, k), strict=True):
        assert (value == wanted).all()


def test_nearest_neighbours_equal_scikit_learn():
    x, y = gaussian(300, 20).double(), gaussian(200, 20, 0.2, seed=1).double()
    squares, which = nearest_others(x, 4)
    wanted, rows = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(x.numpy()).kneighbors(x.numpy())
    assert np.sqrt(squares) == pytest.approx(wanted[:, 1:], rel=1e-6) and (which == rows[:, 1:]).all()
    nearest = Nearest(pairs := Pairs(x, y), 3)
    pairs.sweep(nearest.add)
    squares, which = nearest.result()
    wanted, rows = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(y.numpy()).kneighbors(x.numpy())
    assert np.sqrt(squares) == pytest.approx(wanted, rel=1e-6) and (which == rows).all()


def test_values_equal_their_definitions():
    real, fake = gaussian(150, 6), gaussian(120, 6, 0.4, seed=1)
    num_balls, covered, recalled, authentic = naive(real, fake, 4)
    assert precision_recall(real, fake, 4) == ((num_balls > 0).mean(), recalled.mean())
    assert density_coverage(real, fake, 4) == pytest.approx((num_balls.mean() / 4, covered.mean()), rel=1e-12)
    assert authenticity(real, fake) == authentic.mean()
    found = compare_neighbours(real, fake, 4)
    for interval in (found.precision(), found.recall(), found.density(), found.coverage(), found.authenticity()):
        assert interval.low < interval.value < interval.high


@pytest.mark.parametrize("dim", [3, 300])
def test_errors_of_float32_stay_within_their_bound(dim):
    x, y = gaussian(200, dim, 3.0), gaussian(300, dim, 3.1, seed=1) * torch.logspace(-3, 3, 300)[:, None]
    exact = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    pairs, shares = Pairs(x, y), []

    def check(block):
        error = np.abs(block.values.astype(np.float64) - exact[block.rows, block.columns] * pairs.scale**2)
        shares.append((error / block.errors).max())

    pairs.sweep(check)
    assert 1e-4 < max(shares) <= 1


def test_rows_with_more_candidates_than_are_kept_are_found_in_float64(monkeypatch):
    again, search = [], Pairs.candidates
    monkeypatch.setattr(Pairs, "candidates", lambda self, rows, k: [again.extend(rows), search(self, rows, k)][1])
    x = gaussian(60, 400) * 1e-5 + 0.3  # all distances within the error of products about a centre far from them
    x = torch.cat([x, -x.mean(0, keepdim=True) * 1000])
    squares, which = nearest_others(x, 3)
    assert len(again) > 50
    d = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    wanted = d.topk(3, largest=False)
    assert (which == wanted.indices.numpy()).all() and np.sqrt(squares) == pytest.approx(
        wanted.values.numpy(), rel=1e-9
    )


def test_many_repeated_points_are_one_point():
    repeated = gaussian(4, 8).repeat(40, 1)
    found = compare_neighbours(repeated, repeated.clone())
    assert (found.num_balls == 40).all() and found.covered.all() and found.recalled.all() and not found.authentic.any()


def test_radii_that_are_known_already_change_nothing():
    real, fake = gaussian(101, 5), gaussian(77, 5, 0.5, seed=1)
    whole = compare_neighbours(real, fake)
    known = {"real_squares": nearest_others(real, 3)[0], "fake_squares": nearest_others(fake, 3)[0]}
    at_two, at_three = compare_at(real, fake, (2, 3), **known)
    for found, expected in ((at_three, whole), (at_two, compare_neighbours(real, fake, 2))):
        assert all((a == b).all() for a, b in zip(parts(found), parts(expected), strict=True))


def test_order_of_the_images_does_not_matter():
    real, fake = gaussian(90, 5), gaussian(70, 5, 0.5, seed=1)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    whole, mixed = compare_neighbours(real, fake), compare_neighbours(real[order], fake.flip(0))
    assert (mixed.num_balls[::-1] == whole.num_balls).all() and (mixed.covered == whole.covered[order.numpy()]).all()
    assert (mixed.authentic[::-1] == whole.authentic).all()


def test_what_the_measures_mean():
    real = gaussian(200, 4)
    assert precision_recall(real, real.clone()) == (1.0, 1.0) and authenticity(real, real.clone()) == 0
    near_one = real[:1] + 1e-4 * gaussian(100, 4, seed=1)  # good images of one kind only
    precision, recall = precision_recall(real, near_one)
    assert precision == 1.0 and recall < 0.02 and density_coverage(real, near_one)[1] < 0.1
    assert precision_recall(real, real + 100) == (0.0, 0.0) and density_coverage(real, real + 100) == (0.0, 0.0)
    assert authenticity(real, real + 100) == 1
    repeated = torch.full((10, 4), 1000 / 3)  # radii of 0, squares far from it
    assert precision_recall(repeated, repeated.clone()) == (1.0, 1.0)


def test_samples_of_the_real_distribution_have_the_known_answers():
    """Coverage of new samples (Naeem et al. 2020), density 1, and the chance of mutual neighbours."""
    n, m, k = 2000, 1000, 5
    real, fake = gaussian(n, 1), gaussian(m, 1, seed=1)
    density, coverage = density_coverage(real, fake, k)
    steps = np.arange(1, k + 1)
    assert coverage == pytest.approx(1 - np.prod((n - steps) / (m + n - steps)), abs=0.03)
    assert density == pytest.approx(1, abs=0.07)
    assert authenticity(real, fake) == pytest.approx(1 / 3, abs=0.06)
    mutual = 6 * np.pi / (8 * np.pi + 3 * 3**0.5)  # chance that two nearest neighbours in the plane are each other's
    assert authenticity(gaussian(2000, 2), gaussian(2000, 2, seed=1)) == pytest.approx(1 - mutual, abs=0.04)


def test_misuse_says_what_to_do(unchecked):
    good = gaussian(10, 4)
    with pytest.raises(DigitError, match="k = 3 neighbours among 10 real and 3 fake"):
        precision_recall(good, good[:3])
    with pytest.raises(MismatchError, match="4 and 3"):
        authenticity(good, good[:, :3])
    with pytest.raises(DigitError, match="NaN"):
        density_coverage(good, good * float("nan"))
