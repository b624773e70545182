"""Standard error of a Fréchet distance over the choice of samples, by the infinitesimal jackknife.

The bootstrap, rejected here, costs one distance per round and fails where there are few images for the number of
features: resampled images repeat, the covariance loses rank, and the distances of the rounds lie far above the distance
that they should surround. The infinitesimal jackknife (Jaeckel 1972; Efron 1982) differentiates the distance with
respect to the weight of each image: two eigenproblems in all, and no repeated images.
"""

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from digit.errors import DigitError, MismatchError
from digit.metrics.arrays import Covariance, Features, Mean, as_float64
from digit.metrics.frechet import FeatureStats, frechet_distance, square_root
from digit.metrics.intervals import Interval

ROWS = 4096  # images per matrix product
RANK_TOLERANCE = 1e-10  # eigenvalues below this fraction of the largest are rounding
ERROR_TOLERANCE = 1e-7  # errors below this fraction of the reference's total variance are rounding


def frechet_interval(
    features: Features, mean: Mean, cov: Covariance, *, confidence: float = 0.95, root: Covariance | None = None
) -> Interval:
    """d -+ z * frechet_error, d the Fréchet distance of samples (N, D) to a Gaussian with mean (D,) and cov (D, D).

    z is the normal quantile (1.96 at 95 %). The interval covers the choice of samples and takes the reference as fixed.
    It does not contain the upward bias of few samples, which shifts value and interval together. There is no interval
    where the error is 0 but for rounding: all samples are equal, or they have the reference's mean and covariance.

    root is `square_root(cov)`, if it is known already; it takes an eigenproblem of (D, D).
    """
    return interval_of(*frechet_with_error(features, mean, cov, root=root), cov, confidence=confidence)


def interval_of(value: float, error: float, cov: Covariance, *, confidence: float = 0.95) -> Interval:
    """The interval of `frechet_interval` from the distance, its standard error and the reference's covariance."""
    if error <= ERROR_TOLERANCE * float(np.trace(as_float64(cov))):
        return Interval.without(value, "the samples do not vary, or have the reference's own mean and covariance")
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(value, max(0.0, value - half), value + half)


def frechet_with_error(
    features: Features, mean: Mean, cov: Covariance, *, root: Covariance | None = None
) -> tuple[float, float]:
    """(d, frechet_error), d the Fréchet distance of samples (N, D) to a Gaussian with mean (D,) and cov (D, D).

    root as for `frechet_interval`. Raises DigitError for fewer than 2 samples, and for another D.
    """
    if len(features) < 2:
        raise DigitError(f"{len(features)} samples have no covariance: give at least 2")
    mean, cov = as_float64(mean), as_float64(cov)
    if cov.shape != (features.shape[1], features.shape[1]):
        raise MismatchError(f"features have {features.shape[1]} dimensions, the Gaussian {len(mean)}: use one network")
    root = square_root(cov) if root is None else as_float64(root)
    if len(features) <= features.shape[1]:
        x = FeatureStats.checked(features)
        shift, x = x.mean(0) - mean, x - x.mean(0)
        # x S2^(1/2) = U diag(s) V': Tr (S S2)^(1/2) = sum_k s_k / r and x_i'T x_i = r sum_k U_ik² s_k, r = sqrt(N - 1)
        left, cross, _ = np.linalg.svd(x @ root, full_matrices=False)
        cross, total = cross * math.sqrt(len(x) - 1), np.square(x).sum()
        influence = 2 * x @ shift + (np.square(x).sum(1) - np.square(left) @ cross) * (len(x) / (len(x) - 1))
        value = shift @ shift + (total - 2.0 * cross.sum()) / (len(x) - 1) + np.trace(cov)
    else:
        stats = FeatureStats.of(features)
        shift, (scale, vectors) = stats.mean - mean, _axes(stats.cov)
        cross = np.linalg.svd((vectors * scale).T @ root, compute_uv=False)
        influence = _influence(features, stats.mean, shift, cov, scale, vectors)
        value = shift @ shift + np.square(scale).sum() + np.trace(cov) - 2.0 * cross.sum()
    return max(float(value), 0.0), _error(influence)


def frechet_difference(
    first: np.ndarray | Tensor,
    second: np.ndarray | Tensor,
    mean: Mean,
    cov: Covariance,
    *,
    confidence: float = 0.95,
    paired: bool = True,
) -> Interval:
    """d(first) - d(second) -+ z * error, d the Fréchet distance of features (N, D) to one Gaussian.

    The Gaussian has mean (D,) and cov (D, D); z is the normal quantile, f (N,) is `frechet_influence`, and
    s(f) = sqrt(sum_i (f_i - mean f)²) / N. paired: row i of both sets comes from one image (two completions of it), so
    the effect of the image on both distances cancels, and error = s(f_first - f_second); otherwise error =
    hypot(s(f_first), s(f_second)). Raises DigitError where paired sets differ in length.
    """
    stats = [FeatureStats.of(features) for features in (first, second)]
    distances = [frechet_distance(one.mean, one.cov, mean, cov) for one in stats]
    value = distances[0] - distances[1]
    influences = [frechet_influence(features, mean, cov) for features in (first, second)]
    if paired and len(influences[0]) != len(influences[1]):
        raise DigitError(f"{len(influences[0])} and {len(influences[1])} images are no pairs: complete the same images")
    error = (
        _error(influences[0] - influences[1])
        if paired
        else float(np.hypot(_error(influences[0]), _error(influences[1])))
    )
    if error <= ERROR_TOLERANCE * float(np.trace(as_float64(cov))):
        return Interval.without(value, "both sets change the distance alike, image by image")
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(value, value - half, value + half)


def frechet_error(features: Features, mean: Mean, cov: Covariance) -> float:
    """sqrt(sum_i (f_i - mean f)²) / N, f of `frechet_influence`: the infinitesimal jackknife.

    Standard error of the Fréchet distance of samples (N, D) to a Gaussian with mean (D,) and cov (D, D).
    """
    return _error(frechet_influence(features, mean, cov))


def _error(influence: np.ndarray) -> float:
    """sqrt(sum_i (f_i - mean f)²) / N, of influences f (N,)."""
    return float(np.sqrt(np.square(influence - influence.mean()).sum()) / len(influence))


def frechet_influence(features: Features, mean: Mean, cov: Covariance) -> Float64[np.ndarray, " N"]:
    """f_i = 2 (m - m2).x + (x.x - x'T x) N / (N - 1),  x = x_i - m,  T = S^(-1/2) (S^(1/2) S2 S^(1/2))^(1/2) S^(-1/2).

    f (N,) is the derivative of the Fréchet distance with respect to the weight of each image. m (D,) and S (D, D) are
    the mean and covariance of the samples (N, D), m2 and S2 the arguments mean and cov; T is the optimal transport of
    N(m, S) to N(m2, S2). S may be singular, since every x lies in its range, where T is defined. The code multiplies x
    by S^(-1/2) first, so small eigenvalues do no harm.
    """
    mean, cov = as_float64(mean), as_float64(cov)
    if len(features) > features.shape[1]:
        stats = FeatureStats.of(features)
        return _influence(features, stats.mean, stats.mean - mean, cov, *_axes(stats.cov))
    x = as_float64(features)
    centre = x.mean(0)
    # a singular value decomposition of fewer rows than columns costs N² D instead of D³
    _, scale, axes = np.linalg.svd(x - centre, full_matrices=False)
    return _influence(x, centre, centre - mean, cov, scale[::-1] / np.sqrt(len(x) - 1), axes[::-1].T)


def _axes(cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations (D,) along the principal axes (D, D) of a covariance, in increasing order."""
    values, vectors = np.linalg.eigh(cov)
    return np.sqrt(np.maximum(values, 0.0)), vectors


def _influence(
    x: Features, centre: np.ndarray, shift: np.ndarray, cov: np.ndarray, scale: np.ndarray, vectors: np.ndarray
) -> np.ndarray:
    """`frechet_influence` (N,) of rows (N, D) with mean `centre`, whose deviations (R,) along axes (D, R) are given."""
    unbiased = len(x) / (len(x) - 1)
    kept = np.square(scale) > RANK_TOLERANCE * np.square(scale[-1])
    if not kept.any():
        return np.zeros(len(x))  # all images are equal
    scale, vectors = scale[kept], vectors[:, kept]
    root = vectors * scale  # (D, R), S = root root'
    inner_values, inner = np.linalg.eigh(root.T @ cov @ root)
    whiten, weights = (vectors / scale) @ inner, np.sqrt(np.maximum(inner_values, 0.0))  # (D, R), (R,)
    parts = []
    for start in range(0, len(x), ROWS):
        block = as_float64(x[start : start + ROWS]) - centre
        transported = np.square(block @ whiten) @ weights  # x'T x
        parts.append(2 * block @ shift + (np.einsum("nd,nd->n", block, block) - transported) * unbiased)
    return np.concatenate(parts)  # (N,)
