"""How far a Fréchet distance would move on another draw of as many samples, without computing it again.

The bootstrap draws the samples anew with repetitions. It costs a distance a round, and it fails where images are few
for the number of features: repeated images have a smaller rank, so that the distances of the rounds lie far above the
one they should surround. The infinitesimal jackknife (Jaeckel 1972; Efron 1982) differentiates the distance by the
weight of each image instead: two eigenproblems in all, and no repetition.
"""

from statistics import NormalDist
from typing import Any

import numpy as np

from digit.errors import DigitError
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.intervals import Interval

ROWS = 4096  # images of one matrix product
RANK_TOLERANCE = 1e-10  # eigenvalues below this share of the largest are rounding


def frechet_interval(features: Any, mean: Any, cov: Any, *, confidence: float = 0.95) -> Interval:
    """Fréchet distance of samples (N, D) to a kept Gaussian, mean (D,) and cov (D, D), with its interval.

    The interval, value -+ z times `frechet_error`, is of the samples alone: the reference stays. It says nothing of the
    upward bias of few samples, which moves value and interval together.
    """
    stats = FeatureStats.of(features)
    value = frechet_distance(stats.mean, stats.cov, mean, cov)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * frechet_error(features, mean, cov)
    return Interval(value, max(0.0, value - half), value + half)


def frechet_difference(
    first: Any, second: Any, mean: Any, cov: Any, *, confidence: float = 0.95, paired: bool = True
) -> Interval:
    """Distance of `first` (N, D) less that of `second` to one Gaussian, with its interval.

    paired: row i of both comes of the same image (two completions of it), so that what the image itself does to both
    distances cancels. Raises DigitError where the numbers of rows differ then.
    """
    pair = [FeatureStats.of(features) for features in (first, second)]
    value = frechet_distance(pair[0].mean, pair[0].cov, mean, cov) - frechet_distance(
        pair[1].mean, pair[1].cov, mean, cov
    )
    moved = [frechet_influence(features, mean, cov) for features in (first, second)]
    if paired and len(moved[0]) != len(moved[1]):
        raise DigitError(f"{len(moved[0])} and {len(moved[1])} images are no pairs")
    error = _error(moved[0] - moved[1]) if paired else float(np.hypot(*map(_error, moved)))
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(value, value - half, value + half)


def frechet_error(features: Any, mean: Any, cov: Any) -> float:
    """Standard error of the distance under another draw of the samples (N, D): the infinitesimal jackknife."""
    return _error(frechet_influence(features, mean, cov))


def _error(influence: np.ndarray) -> float:
    # sqrt(sum_i (f_i - mean f)^2) / N
    return float(np.sqrt(np.square(influence - influence.mean()).sum()) / len(influence))


def frechet_influence(features: Any, mean: Any, cov: Any) -> np.ndarray:
    # f_i = 2 (m - m2).x + (x.x - x T x) N / (N - 1),   x = x_i - m,
    # T = S^(-1/2) (S^(1/2) S2 S^(1/2))^(1/2) S^(-1/2), the optimal transport of N(m, S) to N(m2, S2)
    """Derivative (N,) of the distance by the weight of each image of the samples (N, D).

    S may be singular: every x lies in its range, where
    T is defined. In products of x with S^(-1/2), so that small eigenvalues do no harm.
    """
    x = features.detach().cpu().double().numpy() if hasattr(features, "detach") else np.asarray(features, np.float64)
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    shift, x = x.mean(0) - mean, x - x.mean(0)
    unbiased = len(x) / (len(x) - 1)
    values, vectors = np.linalg.eigh(x.T @ x / len(x) * unbiased)
    kept = values > RANK_TOLERANCE * values[-1]
    if not kept.any():
        return np.zeros(len(x))  # all images alike
    scale, vectors = np.sqrt(values[kept]), vectors[:, kept]
    root = vectors * scale  # (D, R), S = root root'
    inner_values, inner = np.linalg.eigh(root.T @ cov @ root)
    whiten, weights = (vectors / scale) @ inner, np.sqrt(np.maximum(inner_values, 0.0))  # (D, R), (R,)
    blocks = np.array_split(x, -(-len(x) // ROWS))
    transported = np.concatenate([np.square(block @ whiten) @ weights for block in blocks])  # x T x
    return 2 * x @ shift + (np.einsum("nd,nd->n", x, x) - transported) * unbiased  # (N,)
