"""Maximum mean discrepancies of whole sets with intervals over the samples (Gretton et al. 2012).

x_i are samples (N, D), y_j reference features (M, D), k a kernel. `kernel_distance` in scores.py is KID's own way with
random subsets; these take all pairs, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np
import torch
from jaxtyping import Float64, Real
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.arrays import checked_pair
from digit.metrics.distances import Block, Pairs
from digit.metrics.intervals import Interval

SIGMA, SCALE = 10.0, 1000.0  # of CMMD
LEAST_SIGMA = 5.0  # below, the cosines' errors in float32 would count
ROWS = 4096  # features in float64 at a time
MAX_PAIRS = 2**22  # float64 kernel values in memory at a time
Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, D), (m, D) -> (n, m)


def gaussian_distance(
    first: Real[Tensor, "N D"], second: Real[Tensor, "M D"], *, sigma: float = SIGMA, confidence: float = 0.95
) -> Interval:
    """1000 (mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j)),  k(x, y) = exp(-||x - y||² / 2 sigma²).

    CMMD (Jayasumana et al. 2024) of samples (N, D) to reference features (M, D), all scaled to length 1: CLIP's
    ViT-L/14 at 336 px in the paper. Means run over all pairs, i = j included, as in the authors' code, so that equal
    sets have distance 0 and few images a bias of about 1000 (1 - mean k) (1/N + 1/M) upward. At least 0, lower is
    better. The paper finds it stable from 5,000 images.

    The interval is value -+ z times the standard error by the influence of each sample, with the reference fixed. There
    is none for equal samples. Raises DigitError for features of length 0, NaN, infinity and other shapes.
    """
    x, y = checked_pair(first, second)
    own, within_second = gaussian_means(x, sigma=sigma), float(gaussian_means(y, sigma=sigma).mean())
    return gaussian_interval(own, gaussian_means(x, y, sigma=sigma), within_second, confidence=confidence)


def gaussian_interval(
    own: Float64[np.ndarray, " N"],
    cross: Float64[np.ndarray, " N"],
    within_second: float,
    *,
    confidence: float = 0.95,
) -> Interval:
    """`gaussian_distance` from mean_j k(x_i, x_j) (N,), mean_j k(x_i, y_j) (N,) and mean_ij k(y_i, y_j)."""
    value = SCALE * max(float(own.mean()) + within_second - 2 * float(cross.mean()), 0.0)
    influence = 2 * SCALE * (own - cross)
    error = float(influence.std() / np.sqrt(len(influence)))
    if len(own) < 2 or error <= 1e-12 * SCALE:
        return Interval.without(value, "the samples do not vary, or equal the reference")
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(value, max(value - half, 0.0), value + half)


def gaussian_means(
    x: Real[Tensor, "N D"], y: Real[Tensor, "M D"] | None = None, *, sigma: float = SIGMA
) -> Float64[np.ndarray, " N"]:
    """mean_j k(x_i, y_j) for each row of x (N, D), with rows of y (M, D) or, by default, of x.

    k is the kernel of `gaussian_distance`. Raises DigitError for features of length 0.
    """
    if sigma >= LEAST_SIGMA:
        pairs = Pairs(x, y)
        means = GaussianMeans(pairs, sigma=sigma)
        pairs.sweep(means.add)
        return means.result()
    units = unit_rows(x)
    others = units if y is None else unit_rows(y)
    return row_means(units, others, lambda a, b: (a @ b.T).sub_(1).div_(sigma**2).exp_()).numpy()


@dataclass(frozen=True)
class UnitMoments:
    """Sums over features (M, D) scaled to length 1: of u (D,), and of u u' (D, D); float64."""

    first: Float64[Tensor, " D"]
    second: Float64[Tensor, "D D"]

    @classmethod
    def of(cls, features: Real[Tensor, "M D"]) -> Self:
        """Compute the sums, some rows at a time. Raises DigitError for features of length 0."""
        dim = features.shape[1]
        first, second = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
        for rows in features.split(ROWS):
            units = unit_rows(rows)
            first += units.sum(0)
            second += units.T @ units
        return cls(first, second)


class GaussianMeans:
    """Collects mean_j k(x_i, y_j) from blocks of `Pairs`, so that one product serves neighbours and this kernel.

    With c the cosine of two features and t = 1 / sigma², k = exp(-t) exp(t c). The means of 1, t c and (t c)² / 2 come
    from the moments of y in float64. The rest, (t c)³ / 6 and on, is below 2e-7 at sigma 10, so the blocks' cosines in
    float32 suffice: their error of 1e-7 changes a mean by less than 1e-13, and by 6e-11 at the bound of 2,048 features.
    """

    def __init__(self, pairs: Pairs, *, sigma: float = SIGMA, moments: UnitMoments | None = None):
        """moments is `UnitMoments.of(y)`, if it is known already. Raises DigitError for sigma below LEAST_SIGMA."""
        if sigma < LEAST_SIGMA:
            raise DigitError(f"sigma is {sigma}: give at least {LEAST_SIGMA}, or take gaussian_means")
        self._pairs, self._rate = pairs, 1 / sigma**2
        self._moments = UnitMoments.of(pairs.y) if moments is None else moments
        self._lengths = [_lengths(side) * pairs.scale for side in ((pairs.x,) if pairs.within else (pairs.x, pairs.y))]
        self._rest = np.zeros(len(pairs.x))
        self._space = np.empty((2, 0), np.float32)

    def add(self, block: Block) -> None:
        """Take one block."""
        x, y = self._lengths[0][block.rows], self._lengths[-1][block.columns]
        if self._space.shape[1] < block.lower.size:
            self._space = np.empty((2, block.lower.size), np.float32)
        z, rest = (part[: block.lower.size].reshape(block.lower.shape) for part in self._space)
        np.subtract((np.square(y) - block.column_errors).astype(np.float32), block.lower, out=z)
        z += (np.square(x) - block.row_errors).astype(np.float32)[:, None]  # 2 x.y
        z *= (1 / y).astype(np.float32)
        z *= (self._rate / 2 / x).astype(np.float32)[:, None]  # t c
        np.multiply(z, np.float32(1 / 120), out=rest)
        rest += np.float32(1 / 24)
        rest *= z
        rest += np.float32(1 / 6)
        for _ in range(3):
            rest *= z
        self._rest[block.rows] += rest @ np.ones(len(y), np.float32)
        if self._pairs.within and block.rows != block.columns:
            self._rest[block.columns] += np.ones(len(x), np.float32) @ rest

    def result(self) -> Float64[np.ndarray, " N"]:
        """mean_j k(x_i, y_j) (N,)."""
        t, sums = self._rate, []
        for rows in self._pairs.x.split(ROWS):
            units = unit_rows(rows)
            sums.append(t * (units @ self._moments.first) + t * t / 2 * ((units @ self._moments.second) * units).sum(1))
        return np.exp(-t) * (1 + (torch.cat(sums).numpy() + self._rest) / len(self._pairs.y))


def _lengths(features: Real[Tensor, "N D"]) -> Float64[np.ndarray, " N"]:
    return torch.cat([rows.double().norm(dim=1) for rows in features.split(ROWS)]).numpy()


def cubic_distance(first: Real[Tensor, "N D"], second: Real[Tensor, "M D"], *, confidence: float = 0.95) -> Interval:
    """sum_{i != j} k(x_i, x_j) / N(N-1) + sum_{i != j} k(y_i, y_j) / M(M-1) - 2 sum_ij k(x_i, y_j) / N M.

    k(x, y) = (x.y / D + 1)³: unbiased MMD² with KID's kernel (Bińkowski et al. 2018), over all pairs of samples (N, D)
    and reference features (M, D), for small sets such as one class. It may be below 0; lower is better. It needs no
    particular number of images: it is unbiased, and the interval shows what they tell.

    The interval is value -+ z sqrt(max(4 v_1 / N - s, s)), s = 2 v_2 / N(N - 1), with v_1 the variance of
    mean_j k(x_i, x_j) - mean_j k(x_i, y_j) over i, v_2 that of the doubly centred k(x_i, x_j) (Hoeffding 1948; v_1
    contains v_2 / N), and the reference fixed. Raises DigitError for fewer than 3 samples or 2 reference images.
    """
    x, y = (values.double() for values in checked_pair(first, second))
    if len(x) < 3 or len(y) < 2:
        raise DigitError(f"{len(x)} samples and {len(y)} reference images: give at least 3 and 2")
    within, cross = cubic_kernel(x, x), row_means(x, y, cubic_kernel)
    num, total = len(x), len(y)
    own_y = (float(row_means(y, y, cubic_kernel).sum()) * total - float(((y.square().mean(1) + 1) ** 3).sum())) / (
        total * (total - 1)
    )
    within.fill_diagonal_(0)
    own = within.sum(1) / (num - 1)  # (N,)
    value = float(own.mean()) + own_y - 2 * float(cross.mean())
    centred = (within - own[:, None] - own[None] + own.mean()).fill_diagonal_(0)
    second_order = float(centred.square().sum()) / (num * (num - 1))
    least = 2 * second_order / (num * (num - 1))
    variance = max(4 * float((own - cross).var()) / num - least, least)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * variance**0.5
    return Interval(value, value - half, value + half)


def unit_rows(features: Real[Tensor, "N D"]) -> Float64[Tensor, "N D"]:
    """x / ||x|| in float64. Raises DigitError where a row has length 0."""
    x = features.double()
    lengths = x.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise DigitError(f"{int((lengths == 0).sum())} images have features of length 0: they have no direction")
    return x / lengths


def cubic_kernel(x: Float64[Tensor, "N D"], y: Float64[Tensor, "M D"]) -> Float64[Tensor, "N M"]:
    """(x.y / D + 1)³."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def row_means(x: Float64[Tensor, "N D"], y: Float64[Tensor, "M D"], kernel: Kernel) -> Float64[Tensor, " N"]:
    """mean_j k(x_i, y_j) for each row of x, some rows at a time."""
    return torch.cat([kernel(rows, y).mean(1) for rows in x.split(max(1, MAX_PAIRS // len(y)))])
