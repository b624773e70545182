"""Sliced Wasserstein distance: optimal transport along random directions, by sorting."""

from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float64, Real
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.arrays import checked_pair
from digit.metrics.intervals import Interval

DIRECTIONS = 1000  # of the paper's listing
AT_ONCE = 250  # directions


def mind(
    first: Real[Tensor, "N D"],
    second: Real[Tensor, "M D"],
    *,
    num_directions: int = DIRECTIONS,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """3 D / L sum_l integral_0^1 (F_l^-1(q) - G_l^-1(q))² dq,  F_l and G_l the distributions of x.t_l and y.t_l.

    MIND, the Monge Inception Distance (Berthet et al. 2026; torch-fidelity 0.4 has the same formula), of samples (N, D)
    to reference features (M, D): the squared sliced 2-Wasserstein distance over L random directions t_l of length 1, in
    the scale of a Fréchet distance by the factor 3 D. At least 0, lower is better; Inception's features, 1,000
    directions and 5,000 images of each in the paper. Theirs takes equally many images of both sets; here whole
    distributions are compared, so that no image is left out. Interval and errors as `sliced_wasserstein`.
    """
    found = sliced_wasserstein(first, second, num_directions=num_directions, seed=seed, confidence=confidence)
    factor = 3 * first.shape[1]
    return Interval(factor * found.value, factor * found.low, factor * found.high, found.missing)


def sliced_wasserstein(
    first: Real[Tensor, "N D"],
    second: Real[Tensor, "M D"],
    *,
    num_directions: int = DIRECTIONS,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """1/L sum_l integral_0^1 (F_l^-1(q) - G_l^-1(q))² dq,  F_l and G_l the distributions of x.t_l and y.t_l.

    Squared sliced 2-Wasserstein distance (Rabin et al. 2011) of samples (N, D) to reference features (M, D), over
    L = num_directions random directions t_l of length 1. At least 0, lower is better. It compares whole distributions,
    where a Fréchet distance sees mean and covariance alone, and its bias of few images is small: 5,000 suffice.

    The interval is value -+ z times the standard error by the influence of each sample, with the reference and the
    directions fixed: the influence is the mean over l of Kantorovich's potential at x_i, whose step from one sample to
    the next, in order of x.t_l, is (x_(i+1) - q)² - (x_(i) - q)², q = G^-1(i / N). Raises DigitError for fewer than 2
    samples or no direction.
    """
    x, y = checked_pair(first, second)
    if len(x) < 2 or num_directions < 1:
        raise DigitError(f"{len(x)} samples and {num_directions} directions: give at least 2 and 1")
    rng = np.random.default_rng(seed)
    total, influence = 0.0, np.zeros(len(x))
    for start in range(0, num_directions, AT_ONCE):
        directions = torch.from_numpy(rng.normal(size=(min(AT_ONCE, num_directions - start), x.shape[1])))
        directions /= directions.norm(dim=1, keepdim=True)
        for along_x, along_y in zip(_project(x, directions), _project(y, directions), strict=True):
            distance, potential = transport(along_x, along_y)
            total += distance
            influence += potential
    value, influence = total / num_directions, influence / num_directions
    error = float(influence.std() / np.sqrt(len(x)))
    if error <= 1e-12 * max(value, 1e-300):
        return Interval.without(value, "the samples do not vary, or equal the reference")
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(value, max(value - half, 0.0), value + half)


def _project(x: Tensor, directions: Tensor) -> Float64[np.ndarray, "L N"]:
    parts = [directions @ rows.double().T for rows in x.split(8192)]
    return torch.cat(parts, 1).numpy()


def transport(x: Float64[np.ndarray, " N"], y: Float64[np.ndarray, " M"]) -> tuple[float, Float64[np.ndarray, " N"]]:
    """Squared 2-Wasserstein distance of numbers (N,) and (M,), and its derivative (N,) by the weight of each x."""
    order, y = np.argsort(x), np.sort(y)  # equal values have equal potentials, in any order
    x, num, total = x[order], len(x), len(y)
    if num == total:
        distance = float(np.square(x - y).mean())
    else:
        widths, rows, columns = _steps(num, total)
        distance = float(widths @ np.square(x[rows] - y[columns]))
    level = np.arange(1, num) * total  # of the quantile i / N, in units of 1 / (N M)
    target = y[(level - 1) // num]
    steps = (x[1:] - x[:-1]) * (x[1:] + x[:-1] - 2 * target)
    potential = np.empty(num)
    potential[order] = np.concatenate([[0.0], np.cumsum(steps)])
    return distance, potential - potential.mean()


@lru_cache(maxsize=4)
def _steps(num: int, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Widths (S,) of the intervals on which both quantile functions are constant, and the values (S,) they take there.

    They end at multiples of 1 / N and of 1 / M; in integers of 1 / (N M).
    """
    ends = np.union1d(np.arange(1, num + 1) * total, np.arange(1, total + 1) * num)
    return np.diff(ends, prepend=0) / (num * total), (ends - 1) // total, (ends - 1) // num
