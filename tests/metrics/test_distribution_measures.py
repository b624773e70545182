"""FD_infinity, FD ratio, CMMD, cubic MMD, Vendi, sliced Wasserstein: other implementations and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from sklearn.linear_model import LinearRegression
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from digit.errors import DigitError, MismatchError
from digit.metrics.diversity import vendi_score
from digit.metrics.extrapolation import Half, frechet_infinity, frechet_ratio, real_distance, samples_needed
from digit.metrics.frechet import FeatureStats
from digit.metrics.kernels import cubic_distance, gaussian_distance, gaussian_means
from digit.metrics.neighbours import copying_score
from digit.metrics.sliced import mind, sliced_wasserstein, transport


def gaussian(num: int, dim: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) + shift


def naive_frechet(x, mean, cov):
    own = np.cov(x, rowvar=False)
    root = scipy.linalg.sqrtm(own @ cov).real
    return ((x.mean(0) - mean) ** 2).sum() + np.trace(own + cov - 2 * root)


def covers(measure, sample, tolerance=0.25, runs=60):
    """Whether the mean standard error of `measure` is the spread over new samples."""
    found = [measure(sample(seed)) for seed in range(runs)]
    spread = np.std([interval.value for interval in found], ddof=1)
    errors = [(interval.high - interval.low) / (2 * 1.959964) for interval in found]
    assert np.mean(errors) == pytest.approx(spread, rel=tolerance)


# -------------------------------------------------------------------- Fréchet distances


def test_infinity_equals_scipy_and_scikit_learn():
    x, truth = gaussian(400, 5, 0.3).double().numpy(), FeatureStats.of(gaussian(900, 5, seed=1))
    order, sizes = np.random.default_rng(7).permutation(400), np.linspace(40, 400, 15).astype(int)
    distances = [naive_frechet(x[order[:n]], truth.mean, truth.cov) for n in sizes]
    line = LinearRegression().fit(1 / sizes[:, None], distances)
    found = frechet_infinity(x, truth.mean, truth.cov, seed=7)
    assert found.value == pytest.approx(line.intercept_, rel=1e-5)
    assert found.low < found.value < found.high
    still = np.concatenate([x, np.ones((400, 1))], 1)  # a feature that never varies: no Cholesky factor
    wide = np.pad(truth.cov, (0, 1)), np.append(truth.mean, 1.0)
    assert frechet_infinity(still, wide[1], wide[0], seed=7).value == pytest.approx(line.intercept_, rel=1e-5)


def test_infinity_has_less_bias_than_the_distance():
    mean, cov = np.zeros(20), np.eye(20)
    samples = [gaussian(200, 20, seed=seed) for seed in range(20)]  # from the reference itself: the truth is 0
    plain = np.mean([naive_frechet(x.double().numpy(), mean, cov) for x in samples])
    assert abs(np.mean([frechet_infinity(x, mean, cov).value for x in samples])) < 0.25 * plain


def test_error_of_infinity_is_the_spread_over_samples():
    truth = FeatureStats.of(gaussian(20000, 4, seed=999) * 1.3 + 0.4)
    covers(lambda x: frechet_infinity(x, truth.mean, truth.cov), lambda seed: gaussian(300, 4, seed=seed))


def test_ratio_equals_its_definition_and_is_one_for_real_images():
    real, fake = gaussian(301, 6, seed=1).double().numpy(), gaussian(120, 6, 0.5).double().numpy()
    rng = np.random.default_rng(3)
    order = rng.permutation(301)
    rest = real[order[150:]]
    gauss = rest.mean(0), np.cov(rest, rowvar=False)
    wanted = naive_frechet(fake, *gauss) / naive_frechet(real[order[:120]], *gauss)
    assert frechet_ratio(real, fake, seed=3).value == pytest.approx(wanted, rel=1e-5)
    half = Half.of(real, 3)
    known = frechet_ratio(real, fake, seed=3, half=half, second=real_distance(real, 120, half, 3))
    assert known == frechet_ratio(real, fake, seed=3)
    found = [frechet_ratio(gaussian(600, 6, seed=2 * s), gaussian(300, 6, seed=2 * s + 1)) for s in range(30)]
    assert np.exp(np.mean([np.log(one.value) for one in found])) == pytest.approx(1, abs=0.15)
    assert np.mean([one.low <= 1 <= one.high for one in found]) > 0.8
    assert "do not vary" in frechet_ratio(np.ones((9, 3)), np.ones((9, 3))).missing


# -------------------------------------------------------------------- kernels


@settings(max_examples=20, deadline=None)
@given(
    st.integers(2, 30), st.integers(2, 30), st.integers(1, 20), st.sampled_from([0.3, 1.0, 10.0]), st.integers(0, 99)
)
def test_cmmd_equals_scikit_learn(num, total, dim, sigma, seed):
    x, y = gaussian(num, dim, 0.5, seed=seed).double(), gaussian(total, dim, seed=seed + 1).double()
    a, b = normalize(x.numpy()), normalize(y.numpy())
    gamma = 1 / (2 * sigma**2)
    wanted = 1000 * (
        rbf_kernel(a, a, gamma).mean() + rbf_kernel(b, b, gamma).mean() - 2 * rbf_kernel(a, b, gamma).mean()
    )
    found = gaussian_distance(x, y, sigma=sigma)
    assert found.value == pytest.approx(max(wanted, 0), rel=1e-5, abs=1e-10)
    assert gaussian_means(x, y, sigma=sigma) == pytest.approx(rbf_kernel(a, b, gamma).mean(1), rel=1e-12)


def test_cmmd_of_equal_doubled_and_reordered_sets():
    x, y = gaussian(40, 8), gaussian(50, 8, 0.5, seed=1)
    assert gaussian_distance(x, x.clone()).value == pytest.approx(0, abs=1e-10)
    whole = gaussian_distance(x, y).value
    assert gaussian_distance(x.repeat(2, 1), y.repeat(3, 1)).value == pytest.approx(whole, rel=1e-9)
    assert gaussian_distance(x.flip(0), y.flip(0)).value == pytest.approx(whole, rel=1e-9)
    assert gaussian_distance(3 * x, y / 7).value == pytest.approx(whole, rel=1e-5), "lengths do not count"
    assert "do not vary" in gaussian_distance(x[:1].expand(9, -1), y).missing
    with pytest.raises(DigitError, match="length 0"):
        gaussian_distance(x * 0, y)
    covers(lambda z: gaussian_distance(z, y), lambda seed: gaussian(200, 8, seed=seed))


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 30), st.integers(2, 30), st.integers(1, 20), st.integers(0, 99))
def test_cubic_distance_equals_scikit_learn(num, total, dim, seed):
    x, y = gaussian(num, dim, 0.5, seed=seed).double(), gaussian(total, dim, seed=seed + 1).double()
    xx, yy, xy = (polynomial_kernel(a, b, degree=3) for a, b in ((x, x), (y, y), (x, y)))
    wanted = (
        (xx.sum() - np.trace(xx)) / (num * (num - 1))
        + (yy.sum() - np.trace(yy)) / (total * (total - 1))
        - 2 * xy.mean()
    )
    assert cubic_distance(x, y).value == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.5])  # without a difference the first-order term vanishes
def test_error_of_the_cubic_distance_is_the_spread_over_samples(shift):
    y = gaussian(400, 6, shift, seed=999)
    covers(lambda x: cubic_distance(x, y), lambda seed: gaussian(150, 6, seed=seed), runs=150)


# -------------------------------------------------------------------- Vendi score


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 99))
def test_vendi_score_equals_scikit_learn_and_scipy(num, dim, seed):
    x = gaussian(num, dim, 0.5, seed=seed).double()
    unit = normalize(x.numpy())
    values = scipy.linalg.eigvalsh(unit @ unit.T / num)
    values = values[values > 0]
    found = vendi_score(x)
    assert found.value == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-5)
    assert vendi_score(x.repeat(2, 1)).value == pytest.approx(found.value, rel=1e-9)
    assert vendi_score(x.flip(0)).value == pytest.approx(found.value, rel=1e-9)


def test_vendi_score_counts_different_images():
    assert vendi_score(torch.eye(9)).value == pytest.approx(9)
    assert vendi_score(torch.eye(9)[:, :4].repeat(1, 3)[:4]).value == pytest.approx(4)
    assert vendi_score(torch.ones(20, 5)).value == pytest.approx(1)
    assert "alike" in vendi_score(torch.eye(9)).missing
    covers(vendi_score, lambda seed: gaussian(300, 5, 0.4, seed=seed))


# -------------------------------------------------------------------- sliced Wasserstein


def naive_transport(x, y):
    """Both sets repeated to one number of points: sorted pairs are the optimal transport in one dimension."""
    return np.square(np.sort(np.repeat(x, len(y))) - np.sort(np.repeat(y, len(x)))).mean()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_transport_equals_its_definition(num, total, ties, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=num), rng.normal(0.5, 2, size=total)
    if ties:
        x, y = x.round(), y.round()
    distance, potential = transport(x, y)
    assert distance == pytest.approx(naive_transport(x, y), rel=1e-9, abs=1e-12)
    assert potential.sum() == pytest.approx(0, abs=1e-9)


def test_potential_is_the_derivative_by_the_weights():
    rng = np.random.default_rng(0)
    x, y, many = rng.normal(size=5), rng.normal(0.5, 2, size=7), 4000
    _, potential = transport(x, y)
    for row in range(5):
        weighted = np.concatenate([np.repeat(x, many), np.repeat(x[row], 20)])
        step = (transport(weighted, y)[0] - transport(x, y)[0]) / (20 / (5 * many))
        assert step == pytest.approx(potential[row], rel=2e-2, abs=2e-2)


def test_sliced_distance_equals_its_definition_and_the_closed_form():
    x, y = gaussian(30, 6, 0.5), gaussian(50, 6, seed=1)
    directions = np.random.default_rng(4).normal(size=(20, 6))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    a, b = (values.double().numpy() for values in (x, y))
    wanted = np.mean([naive_transport(a @ t, b @ t) for t in directions])
    assert sliced_wasserstein(x, y, num_directions=20, seed=4).value == pytest.approx(wanted, rel=1e-5)
    many = gaussian(20000, 6)
    moved = sliced_wasserstein(many + 2, many, num_directions=400).value
    assert moved == pytest.approx(24 / 6, rel=0.1), "||shift||² / D"
    assert sliced_wasserstein(many, many.clone(), num_directions=3).value == 0
    wider = sliced_wasserstein(many * 3, many, num_directions=20).value
    assert wider == pytest.approx((3 - 1) ** 2, rel=0.05), "of standard deviations 3 and 1"
    covers(lambda z: sliced_wasserstein(z, y, num_directions=20), lambda seed: gaussian(200, 6, 0.5, seed=seed))


def test_mind_equals_the_formula_of_paper_and_torch_fidelity():
    """3 d / (n M) sum_i sum_j (sort(u_i'X)_j - sort(u_i'Y)_j)², both sets of n images, M directions of length 1."""
    x, y = gaussian(70, 6, 0.5).double(), gaussian(70, 6, seed=1).double()
    directions = torch.from_numpy(np.random.default_rng(2).normal(size=(30, 6)))
    directions = torch.nn.functional.normalize(directions, dim=1)
    ordered = [(values @ directions.T).sort(dim=0).values for values in (x, y)]
    wanted = 3 * 6 * (ordered[0] - ordered[1]).square().mean()
    found = mind(x, y, num_directions=30, seed=2)
    assert found.value == pytest.approx(float(wanted), rel=1e-9)
    plain = sliced_wasserstein(x, y, num_directions=30, seed=2)
    assert (found.low, found.high) == pytest.approx((18 * plain.low, 18 * plain.high), rel=1e-12)
    many = gaussian(20000, 6)
    assert mind(many + 2, many, num_directions=400).value == pytest.approx(3 * 24, rel=0.1), "3 ||shift||²"
    assert mind(x, x.clone()).value == 0


# -------------------------------------------------------------------- data copying


def test_copying_equals_scipy_and_sees_copies():
    real, held_out, fake = (gaussian(n, 5, seed=s) for s, n in enumerate((200, 80, 60)))
    found = NearestNeighbors(n_neighbors=1).fit(real.numpy())
    d_fake, d_held_out = (found.kneighbors(points.numpy())[0][:, 0] for points in (fake, held_out))
    u = mannwhitneyu(d_fake, d_held_out).statistic
    z, p = copying_score(real, held_out, fake)
    assert z == pytest.approx((u - 60 * 80 / 2) / np.sqrt(60 * 80 * 141 / 12), rel=1e-6)
    wanted = mannwhitneyu(d_fake, d_held_out, method="asymptotic", use_continuity=False).pvalue
    assert p == pytest.approx(wanted, rel=1e-3) and abs(z) < 3
    assert copying_score(real, held_out, real[:60] + 0.01)[0] < -8
    assert copying_score(real, held_out, fake * 4)[0] > 6


def test_misuse_says_what_to_do(unchecked):
    good, cov = gaussian(30, 4), np.eye(4)
    assert samples_needed(4) == 16
    with pytest.raises(DigitError, match="needs 16"):
        frechet_infinity(good[:15], np.zeros(4), cov)
    with pytest.raises(DigitError, match="at least 3"):
        frechet_infinity(good, np.zeros(4), cov, num_points=2)
    with pytest.raises(MismatchError, match="4 and 3"):
        gaussian_distance(good, good[:, :3])
    with pytest.raises(DigitError, match="halves need at least 4"):
        frechet_ratio(good[:3], good)
    with pytest.raises(DigitError, match="at least 3 and 2"):
        cubic_distance(good[:2], good)
    with pytest.raises(DigitError, match="at least 2 and 1"):
        sliced_wasserstein(good, good, num_directions=0)
    with pytest.raises(DigitError, match="NaN"):
        vendi_score(good * float("nan"))
