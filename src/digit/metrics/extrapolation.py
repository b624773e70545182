"""Fréchet distances without the bias of few images: extrapolated to infinitely many, and relative to real images.

Both have the bias's cause in common with any Fréchet distance, the error of the covariance, and remove it differently.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Self

import numpy as np
from jaxtyping import Float64, Real
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.arrays import Covariance, Features, Mean, as_float64
from digit.metrics.frechet import FeatureStats, frechet_distance, square_root
from digit.metrics.influence import frechet_error, frechet_with_error
from digit.metrics.intervals import Interval

POINTS = 15  # numbers of samples at which the distance is measured, as in the paper
LEAST = 5000  # smallest of them, as in the paper; fewer where there are fewer than 50,000 samples
PER_FEATURE = 2  # samples per feature at the smallest; below, the bias is not proportional to 1/n


def smallest_subset(num: int, dim: int) -> int:
    """Samples in the smallest subset of `frechet_infinity`: 5,000 or a tenth, and at least 2 per feature."""
    return max(min(LEAST, num // 10), PER_FEATURE * dim, 2)


def samples_needed(dim: int) -> int:
    """Fewest samples of `dim` features that `frechet_infinity` takes."""
    return 2 * PER_FEATURE * dim


def frechet_infinity(
    features: Features,
    mean: Mean,
    cov: Covariance,
    *,
    num_points: int = POINTS,
    seed: int = 0,
    confidence: float = 0.95,
    root: Covariance | None = None,
    error: float | None = None,
) -> Interval:
    """a of the line a + b / n that fits d_n in least squares: d_n is the Fréchet distance of n random samples.

    FID_infinity (Chong & Forsyth 2020) of samples (N, D) to a Gaussian with mean (D,) and cov (D, D): the
    distance that infinitely many samples would have. n takes num_points values spaced evenly from 5,000 (or N/10, or
    2 D) to N. The n samples are the first of one random order, so that all covariances take one pass; independent
    subsets, as in the paper's code, gave the same mean and spread. Lower is better; it may be below 0. Needs N >= 4 D
    samples, 50,000 in the paper; the reference's own number of images still matters.

    The interval is a -+ z hypot(frechet_error, standard error of a in the fit): choice of samples and of subsets, with
    the reference fixed. root as for `frechet_interval`; error is `frechet_error`, if it is known already. Raises
    DigitError for fewer samples than it needs.
    """
    num, dim = features.shape
    if num < samples_needed(dim):
        raise DigitError(f"{num} samples of {dim} features: the distance at infinity needs {samples_needed(dim)}")
    if num_points < 3:
        raise DigitError(f"num_points is {num_points}: give at least 3, or the fit has no error")
    mean, cov = as_float64(mean), as_float64(cov)
    root = square_root(cov) if root is None else as_float64(root)
    error = frechet_error(features, mean, cov) if error is None else error
    order = np.random.default_rng(seed).permutation(num)
    sizes = np.linspace(smallest_subset(num, dim), num, num_points).astype(int)
    stats, distances = FeatureStats(), []
    for start, stop in pairwise([0, *sizes]):
        stats.update(features[order[start:stop]])
        distances.append(frechet_distance(stats.mean, stats.cov, mean, cov, root2=root))
    inverse, distances = 1 / sizes, np.array(distances)
    spread = np.square(inverse - inverse.mean()).sum()
    slope = ((inverse - inverse.mean()) * distances).sum() / spread
    value = float(distances.mean() - slope * inverse.mean())
    residual = np.square(distances - value - slope * inverse).sum() / (num_points - 2)
    fit_error = math.sqrt(residual * (1 / num_points + inverse.mean() ** 2 / spread))
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.hypot(error, fit_error)
    return Interval(value, value - half, value + half)


@dataclass(frozen=True)
class Half:
    """One random half B of real images: its mean (D,), and the square root (D, D) of its covariance."""

    mean: Float64[np.ndarray, " D"]
    root: Float64[np.ndarray, "D D"]

    @classmethod
    def of(cls, real: Features, seed: int = 0) -> Self:
        """Compute it from real features (N, D). Raises DigitError for fewer than 4 images."""
        stats = FeatureStats.of(_halves(real, seed)[1])
        return cls(stats.mean, square_root(stats.cov))

    def distance(self, features: Features) -> tuple[float, float]:
        """Fréchet distance of features (n, D) to this half, and its standard error."""
        return frechet_with_error(features, self.mean, self.root @ self.root, root=self.root)


def _halves(real: Features, seed: int) -> tuple[np.ndarray | Tensor, np.ndarray | Tensor]:
    """The random halves A and B of real features (N, D); B is the larger where N is odd."""
    if len(real) < 4:
        raise DigitError(f"{len(real)} real images: halves need at least 4")
    order = np.random.default_rng(seed).permutation(len(real))
    return real[order[: len(real) // 2]], real[order[len(real) // 2 :]]


def real_distance(real: Features, num: int, half: Half, seed: int = 0) -> tuple[float, float]:
    """d(A_n, B) of `frechet_ratio` and its standard error, n = num, B = half."""
    return half.distance(_halves(real, seed)[0][:num])


def frechet_ratio(
    real: Real[np.ndarray, "N D"] | Real[Tensor, "N D"],
    fake: Real[np.ndarray, "M D"] | Real[Tensor, "M D"],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    half: Half | None = None,
    second: tuple[float, float] | None = None,
) -> Interval:
    """d(fake_n, B) / d(A_n, B),  A and B random halves of the real images, n = min(M, |A|) random images of each set.

    d is the Fréchet distance of real features (N, D) and fake ones (M, D). Both distances have the same numbers of
    images and so about the same bias: 1 says that the samples are as far from real images as other real images are.
    Lower is better, with 1 the best to expect; below 1 samples repeat real images or vary less. It needs no particular
    number of images, and tells more of them apart: use thousands.

    The interval is that of the logarithm, ratio * exp(-+ z hypot(e_1 / d_1, e_2 / d_2)) with the `frechet_error` of
    both distances, B fixed. half is `Half.of(real, seed)` and second `real_distance(real, n, half, seed)`, if they are
    known already. Raises DigitError for fewer than 4 real or 2 fake images.
    """
    num = min(len(fake), len(real) // 2)
    half = Half.of(real, seed) if half is None else half
    second = real_distance(real, num, half, seed) if second is None else second
    first = half.distance(fake[np.random.default_rng(seed).permutation(len(fake))[:num]])
    if second[0] <= 0 or first[0] <= 0:
        value = first[0] / second[0] if second[0] > 0 else math.nan
        return Interval.without(value, "a distance is 0: the images do not vary")
    value = first[0] / second[0]
    error = math.hypot(*(error / distance for distance, error in (first, second)))
    factor = math.exp(NormalDist().inv_cdf((1 + confidence) / 2) * error)
    return Interval(value, value / factor, value * factor)
