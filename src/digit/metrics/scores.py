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
SCORED_ROWS = 128  # of logits at a time, so that a CPU's cache holds them in float64
SAME_BLOCKS = 8  # blocks of rows of a set with itself: 9/16 of its kernel are computed
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
    order = torch.arange(len(logits))
    if seed is not None:
        order = torch.from_numpy(np.random.default_rng(seed % 2**64).permutation(len(logits)))
    bounds = [len(logits) * split // num_splits for split in range(num_splits + 1)]
    scores = [_score_of_split(logits, order[start:stop]) for start, stop in pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def _score_of_split(logits: Tensor, rows: Tensor) -> float:
    """The Inception Score of some rows as exp(H(mean_x p(y|x)) - mean_x H(p(y|x))), H the entropy."""
    marginal = torch.zeros(logits.shape[1], dtype=torch.float64)  # sum_x p(y|x)
    negative_entropy = 0.0  # sum_x sum_y p(y|x) log p(y|x)
    for part in rows.split(SCORED_ROWS):
        shifted = logits[part].double()
        shifted -= shifted.amax(1, keepdim=True)
        weights = shifted.exp()  # (n, C), p(y|x) times its sum over y
        total = weights.sum(1)
        negative_entropy += float((torch.linalg.vecdot(weights, shifted) / total - total.log()).sum())
        marginal += total.reciprocal() @ weights
    marginal /= len(rows)
    return float(torch.exp(negative_entropy / len(rows) - torch.xlogy(marginal, marginal).sum()))


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


def _kernel_sums(x: Tensor, y: Tensor, in_x: Rows, in_y: Rows) -> Float64[Tensor, " R"]:
    """sum_{ij} k(x_i, y_j) over the rows in_x (R, n) of x and in_y (R, m) of y of each of R subsets.

    Where both sides are the same, k(x_i, x_j) = k(x_j, x_i) is computed once.
    """
    same = x is y and in_x is in_y
    if len(x) * len(y) > in_x.numel() * in_y.shape[1]:  # then separate subsets cost less
        sums = [_weighted_sums(x[rows], y[columns], None, None, same) for rows, columns in zip(in_x, in_y, strict=True)]
        return torch.cat(sums)
    mask_x, mask_y = (torch.zeros(len(in_x), len(z), dtype=torch.float64) for z in (x, y))
    return _weighted_sums(x, y, mask_x.scatter_(1, in_x, 1.0), mask_y.scatter_(1, in_y, 1.0), same)


def _weighted_sums(x: Tensor, y: Tensor, u: Tensor | None, v: Tensor | None, same: bool) -> Float64[Tensor, " R"]:
    """sum_{ij} u_ri k(x_i, y_j) v_rj for u (R, N) and v (R, M), in blocks of rows; None is a row of ones."""
    total = torch.zeros(1 if u is None else len(u), dtype=torch.float64)
    y = y.double()
    x = y if same else x
    block = min(max(1, MAX_DISTANCES // len(y)), -(-len(x) // SAME_BLOCKS) if same else len(x))
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        first = start if same else 0  # the columns before it were rows of earlier blocks
        kernel = (x[rows].double() @ y[first:].T).div_(y.shape[1]).add_(1).pow_(3)  # (n, M - first)
        columns = kernel.sum(0)[None] if u is None else u[:, rows] @ kernel  # (R, M - first)
        columns = columns if v is None else columns * v[:, first:]
        total += columns.sum(1) if not same else 2 * columns.sum(1) - columns[:, : len(kernel)].sum(1)
    return total
