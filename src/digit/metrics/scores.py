"""Scores on the features and logits of any network: Inception Score, kernel distance, precision and recall.

All sums run in float64. A score compares only with scores of the same network, resize and number of images.
`JudgeNetwork.metric` gives its full name: inception_score, kid, ... on Inception alone.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Real
from torch import Tensor

from digit.errors import DigitError, MismatchError

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
    logits = _checked(logits, "logits")
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
) -> tuple[float, float]:
    """sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / m(m-1) - 2 sum_{ij} k(x_i, y_j) / m²,  k(x, y) = (x.y / D + 1)³.

    Unbiased MMD² (KID, Bińkowski et al. 2018, section 4); it may be below 0. Returns its mean and standard deviation
    over random subsets of m = subset_size rows of features (N, D) and (M, D), sampled without replacement. subset_size
    is at most the size of the smaller set. Where it is the size of both, every subset is the whole set and the
    deviation is 0: it shows the choice of subsets, not of images.
    """
    first, second = _pair(first, second)
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise DigitError(f"kernel distance of {len(first)} and {len(second)} images: give at least 2 of each")
    rng = np.random.default_rng(seed % 2**64)
    chosen = [[rng.choice(len(x), size, replace=False) for x in (first, second)] for _ in range(num_subsets)]
    if len(first) ** 2 + len(second) ** 2 > 2 * num_subsets * size**2:  # then separate subsets cost less
        all_rows = torch.ones(1, size, dtype=torch.float64)
        distances = torch.cat([_mmd(first[a], second[b], all_rows, all_rows) for a, b in chosen])
    else:
        members = [torch.zeros(num_subsets, len(x), dtype=torch.float64) for x in (first, second)]
        for row, subsets in enumerate(chosen):
            for member, indices in zip(members, subsets, strict=True):
                member[row, indices] = 1
        distances = _mmd(first, second, *members)
    return float(distances.mean()), float(distances.std(unbiased=False))


def _mmd(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """Unbiased MMD² (R,) of R subsets of x (N, D) and y (M, D), given as 0/1 masks in_x (R, N) and in_y (R, M)."""
    size = in_x[0].sum()
    within = sum(
        _kernel_sums(z, z, in_z, in_z) - in_z @ (z.double().square().mean(1) + 1) ** 3
        for z, in_z in ((x, in_x), (y, in_y))
    )
    return within / (size * (size - 1)) - 2 * _kernel_sums(x, y, in_x, in_y) / size**2


def _kernel_sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """sum_{ij} in_x_ri k(x_i, y_j) in_y_rj for each of R subsets, (R,)."""
    y, sums = y.double(), torch.zeros(len(in_x), dtype=torch.float64)
    for rows in torch.arange(len(x)).split(max(1, MAX_DISTANCES // len(y))):
        kernel = (x[rows].double() @ y.T / y.shape[1] + 1) ** 3  # (n, M)
        sums += ((in_x[:, rows] @ kernel) * in_y).sum(1)
    return sums


def precision_recall(real: Real[Tensor, "N D"], fake: Real[Tensor, "M D"], k: int = 3) -> tuple[float, float]:
    """precision = 1/M sum_j [exists i: ||f_j - r_i|| <= NN_k(r_i)];  recall: the same with f and r exchanged.

    Kynkäänniemi et al. 2019, Eqs. 1 and 2. r are real features (N, D), f fake ones (M, D); NN_k(r_i) is the distance of
    r_i to its k-th nearest neighbour among r. Both depend on N and M: papers use 10,000 or 50,000 of each. Raises
    DigitError unless both sets hold more than k images.
    """
    real, fake = _pair(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise DigitError(f"k = {k} neighbours among {len(real)} real and {len(fake)} fake images: give more images")
    return _covered(fake, real, k), _covered(real, fake, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points (N, D) within the distance of any centre (M, D) to its k-th nearest other centre."""
    centres = centres.double()
    # k + 1: the nearest centre is the centre itself
    radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distances(centres, centres)])  # (M,)
    return sum(int((block <= radii).any(1).sum()) for block in _distances(points, centres)) / len(points)


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of ||x_i - y_j||² (N, M); rounding errors between equal points are set to 0."""
    squares = y.square().sum(1)  # (M,)
    for rows in x.split(max(1, MAX_DISTANCES // len(y))):
        rows = rows.double()
        scale = rows.square().sum(1, keepdim=True) + squares
        squared = scale - 2 * rows @ y.T
        yield squared.masked_fill_(squared < 1e-13 * scale, 0.0)


def _pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _checked(first, "features"), _checked(second, "features")
    if first.shape[1] != second.shape[1]:
        raise MismatchError(f"features have {first.shape[1]} and {second.shape[1]} dimensions: use one network")
    return first, second


def _checked(values: Tensor, what: str) -> Tensor:
    values = torch.as_tensor(values).detach().cpu()
    if values.ndim != 2 or not values.numel():
        raise DigitError(f"{what} have shape {tuple(values.shape)}, wanted (images, values) of at least one image")
    if not torch.isfinite(values).all():
        raise DigitError(f"{what} hold NaN or infinity: check the images and the network's weights")
    return values
