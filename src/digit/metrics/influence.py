"""Standard error of a Fréchet distance over the choice of samples, by the infinitesimal jackknife.

The bootstrap, rejected here, costs one distance per round and fails where there are few images for the number of
features: resampled images repeat, the covariance loses rank, and the distances of the rounds lie far above the distance
that they should surround. The infinitesimal jackknife (Jaeckel 1972; Efron 1982) differentiates the distance with
respect to the weight of each image: two eigenproblems in all, and no repeated images.
"""

from statistics import NormalDist

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.arrays import Covariance, Features, Mean, as_float64
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.intervals import Interval

ROWS = 4096  # images per matrix product
RANK_TOLERANCE = 1e-10  # eigenvalues below this fraction of the largest are rounding
ERROR_TOLERANCE = 1e-7  # errors below this fraction of the reference's total variance are rounding


def frechet_interval(features: Features, mean: Mean, cov: Covariance, *, confidence: float = 0.95) -> Interval:
    """d -+ z * frechet_error, d the Fréchet distance of samples (N, D) to a Gaussian with mean (D,) and cov (D, D).

    z is the normal quantile (1.96 at 95 %). The interval covers the choice of samples and takes the reference as fixed.
    It does not contain the upward bias of few samples, which shifts value and interval together. There is no interval
    where the error is 0 but for rounding: all samples are equal, or they have the reference's mean and covariance.
    """
    stats = FeatureStats.of(features)
    value = frechet_distance(stats.mean, stats.cov, mean, cov)
    error = frechet_error(features, mean, cov)
    if error <= ERROR_TOLERANCE * float(np.trace(as_float64(cov))):
        return Interval.without(value, "the samples do not vary, or have the reference's own mean and covariance")
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(value, max(0.0, value - half), value + half)


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
    x, mean, cov = (as_float64(values) for values in (features, mean, cov))
    shift, x = x.mean(0) - mean, x - x.mean(0)
    unbiased = len(x) / (len(x) - 1)
    values, vectors = np.linalg.eigh(x.T @ x / len(x) * unbiased)
    kept = values > RANK_TOLERANCE * values[-1]
    if not kept.any():
        return np.zeros(len(x))  # all images are equal
    scale, vectors = np.sqrt(values[kept]), vectors[:, kept]
    root = vectors * scale  # (D, R), S = root root'
    inner_values, inner = np.linalg.eigh(root.T @ cov @ root)
    whiten, weights = (vectors / scale) @ inner, np.sqrt(np.maximum(inner_values, 0.0))  # (D, R), (R,)
    blocks = np.array_split(x, -(-len(x) // ROWS))
    transported = np.concatenate([np.square(block @ whiten) @ weights for block in blocks])  # x'T x
    return 2 * x @ shift + (np.einsum("nd,nd->n", x, x) - transported) * unbiased  # (N,)
