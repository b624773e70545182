"""Scores on the features and logits of any network: Inception Score and kernel distance.

All sums run in float64. A score compares only with scores of the same network, resize and number of images.
`JudgeNetwork.metric` gives its full name: inception_score, kid, ... on Inception alone.
"""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float64, Int64, Real
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.arrays import checked_pair, checked_rows

Rows = Int64[Tensor, "R S"]
MAX_DISTANCES = 2**24  # float64 values per block, 128 MiB
MIN_IMAGES_PER_SPLIT = 500  # fewer give a useless score, which is at most the number of images


def splits_of(num: int) -> int:
    """Number of splits for the Inception Score of `num` images: 10, or fewer so that each holds at least 500."""
    return max(1, min(10, num // MIN_IMAGES_PER_SPLIT))


def inception_score(logits: Real[Tensor, "N C"], num_splits: int = 10, seed: int | None = 0) -> tuple[float, float]:
    """exp( mean_x KL( p(y|x) || mean_x p(y|x) ) )  (IS, Salimans et al. 2016, section 4), for each split.

    Returns the mean and the standard deviation (over n, not n - 1) over the splits of logits (N, C); the score lies in
    1..C. `seed` shuffles the images before they are split, as in torch-fidelity. None keeps their order, as ADM's
    evaluator does; samples sorted by class then give splits of few classes each and so lower scores.
    """
    logits = checked_rows(logits, "logits")
    if not 1 <= num_splits <= len(logits):
        raise DigitError(f"{num_splits} splits of {len(logits)} images: give at least one image per split")
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.default_rng(seed % 2**64).permutation(len(logits)))]
    bounds = [len(logits) * split // num_splits for split in range(num_splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        log_p = logits[start:stop].double().log_softmax(1)  # (n, C)
        log_marginal = log_p.logsumexp(0) - np.log(stop - start)  # (C,)
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    first: Real[Tensor, "N D"],
    second: Real[Tensor, "M D"],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    within_second: Float64[Tensor, " R"] | None = None,
) -> tuple[float, float]:
    """sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / m(m-1) - 2 sum_{ij} k(x_i, y_j) / m²,  k(x, y) = (x.y / D + 1)³.

    Unbiased MMD² (KID, Bińkowski et al. 2018, section 4); it may be below 0. Returns its mean and standard deviation
    over random subsets of m = subset_size rows of features (N, D) and (M, D), sampled without replacement. subset_size
    is at most the size of the smaller set. Where it is the size of both, every subset is the whole set and the
    deviation is 0: it shows the choice of subsets, not of images.

    within_second (R,) is `kernel_within` of the second set's `kernel_subsets`, if it is known already.
    """
    first, second = checked_pair(first, second)
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise DigitError(f"kernel distance of {len(first)} and {len(second)} images: give at least 2 of each")
    chosen = kernel_subsets(len(first), len(second), num_subsets, size, seed)
    if within_second is None:
        within_second = kernel_within(second, chosen[1])
    within = kernel_within(first, chosen[0]) + within_second.double()
    distances = within / (size * (size - 1)) - 2 * _kernel_sums(first, second, *chosen) / size**2
    return float(distances.mean()), float(distances.std(unbiased=False))


def kernel_subsets(num: int, num_second: int, num_subsets: int, size: int, seed: int) -> tuple[Rows, Rows]:
    """Rows (R, size) of the first and of the second set in each of R = num_subsets random subsets."""
    rng = np.random.default_rng(seed % 2**64)
    chosen = [[rng.choice(n, size, replace=False) for n in (num, num_second)] for _ in range(num_subsets)]
    first, second = (torch.from_numpy(np.stack(rows)) for rows in zip(*chosen, strict=True))
    return first, second


def kernel_within(x: Real[Tensor, "N D"], chosen: Rows) -> Float64[Tensor, " R"]:
    """sum_{i != j} k(x_i, x_j) over the rows of each of R subsets, with the kernel of `kernel_distance`."""
    own = (x.double().square().mean(1) + 1) ** 3  # (N,), k(x_i, x_i)
    return _kernel_sums(x, x, chosen, chosen) - own[chosen].sum(1)


def _kernel_sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """sum_{ij} k(x_i, y_j) over the rows in_x (R, n) of x and in_y (R, m) of y of each of R subsets, (R,)."""
    sums = torch.zeros(len(in_x), dtype=torch.float64)
    if len(x) * len(y) > in_x.numel() * in_y.shape[1]:  # then separate subsets cost less
        for row, (rows, columns) in enumerate(zip(in_x, in_y, strict=True)):
            b = y[columns].double()
            for a in x[rows].split(max(1, MAX_DISTANCES // len(b))):
                sums[row] += (a.double() @ b.T / b.shape[1] + 1).pow(3).sum()
        return sums
    mask_x, mask_y = (torch.zeros(len(sums), len(z), dtype=torch.float64) for z in (x, y))
    mask_x.scatter_(1, in_x, 1.0)
    mask_y.scatter_(1, in_y, 1.0)
    y = y.double()
    for rows in torch.arange(len(x)).split(max(1, MAX_DISTANCES // len(y))):
        kernel = (x[rows].double() @ y.T / y.shape[1] + 1) ** 3  # (n, M)
        sums += ((mask_x[:, rows] @ kernel) * mask_y).sum(1)
    return sums
