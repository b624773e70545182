"""Maximum mean discrepancies of whole sets with intervals over the samples (Gretton et al. 2012).

x_i are samples (N, D), y_j reference features (M, D), k a kernel. `kernel_distance` in scores.py is KID's own way with
random subsets; these take all pairs, in float64.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float64, Real
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.arrays import checked_pair
from digit.metrics.intervals import Interval

SIGMA, SCALE = 10.0, 1000.0  # of CMMD
MAX_PAIRS = 2**22  # float64 kernel values in memory at a time
Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, D), (m, D) -> (n, m)


def gaussian_distance(
    first: Real[Tensor, "N D"],
    second: Real[Tensor, "M D"],
    *,
    sigma: float = SIGMA,
    confidence: float = 0.95,
    within_second: float | None = None,
) -> Interval:
    """1000 (mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j)),  k(x, y) = exp(-||x - y||² / 2 sigma²).

    CMMD (Jayasumana et al. 2024) of samples (N, D) to reference features (M, D), all scaled to length 1:
    CLIP's ViT-L/14 at 336 px in the paper. Means run over all pairs, i = j included, as in the authors' code, so that
    equal sets have distance 0 and few images a bias of about 1000 (1 - mean k) (1/N + 1/M) upward. At least 0, lower is
    better. The paper finds it stable from 5,000 images.

    The interval is value -+ z times the standard error by the influence of each sample, with the reference fixed. There
    is none for equal samples. within_second is `mean_kernel` of the reference, if it is known already. Raises
    DigitError for features of length 0, NaN, infinity and other shapes.
    """
    x, y = (unit_rows(values) for values in checked_pair(first, second))
    kernel = gaussian_kernel(sigma)
    own, cross = row_means(x, x, kernel), row_means(x, y, kernel)  # (N,)
    if within_second is None:
        within_second = float(row_means(y, y, kernel).mean())
    value = SCALE * max(float(own.mean()) + within_second - 2 * float(cross.mean()), 0.0)
    influence = 2 * SCALE * (own - cross).numpy()
    error = float(influence.std() / np.sqrt(len(influence)))
    if len(x) < 2 or error <= 1e-12 * SCALE:
        return Interval.without(value, "the samples do not vary, or equal the reference")
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(value, max(value - half, 0.0), value + half)


def mean_kernel(features: Real[Tensor, "N D"], *, sigma: float = SIGMA) -> float:
    """mean_ij exp(-||x_i - x_j||² / 2 sigma²) of features (N, D) scaled to length 1."""
    x = unit_rows(features)
    return float(row_means(x, x, gaussian_kernel(sigma)).mean())


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


def gaussian_kernel(sigma: float) -> Kernel:
    """exp(-||x - y||² / 2 sigma²) of rows of length 1, for which ||x - y||² = 2 - 2 x.y."""
    return lambda x, y: (x @ y.T).sub_(1).div_(sigma**2).exp_()


def cubic_kernel(x: Float64[Tensor, "N D"], y: Float64[Tensor, "M D"]) -> Float64[Tensor, "N M"]:
    """(x.y / D + 1)³."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def row_means(x: Float64[Tensor, "N D"], y: Float64[Tensor, "M D"], kernel: Kernel) -> Float64[Tensor, " N"]:
    """mean_j k(x_i, y_j) for each row of x, some rows at a time."""
    return torch.cat([kernel(rows, y).mean(1) for rows in x.split(max(1, MAX_PAIRS // len(y)))])
