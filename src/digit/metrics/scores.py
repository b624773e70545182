"""Scores on features and logits, whichever network gave them: Inception Score, kernel distance, precision and recall.

All sums run in float64. A number compares only with numbers of the same network, resize and number of images; its full
name (inception_score, kid, ... on Inception alone) is the network's business, see `JudgeNetwork.metric`.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError, MismatchError

MAX_DISTANCES = 2**24  # float64 numbers of one block, 128 MiB
IMAGES_A_SPLIT = 500  # the score of fewer says little: it is at most their number


def splits_of(num: int) -> int:
    """Splits for the Inception Score of `num` images: 10 as usual, fewer where a split would hold under 500."""
    return max(1, min(10, num // IMAGES_A_SPLIT))


def inception_score(logits: Tensor, num_splits: int = 10, seed: int | None = 0) -> tuple[float, float]:
    # exp( mean_x KL( p(y|x) || mean_x p(y|x) ) )  (IS, Salimans et al. 2016, section 4), per split
    """Mean and standard deviation (over N, not N - 1) over splits of logits (N, C); at least 1, at most C.

    Images are shuffled by `seed` before they are split, as in torch-fidelity; None keeps their order, as ADM's
    evaluator does, where samples sorted by class give splits of few classes each and so lower scores.
    """
    logits = _checked(logits, "logits")
    if not 1 <= num_splits <= len(logits):
        raise DigitError(f"{num_splits} splits of {len(logits)} images: give at least one image a split")
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
    first: Tensor, second: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    # MMD^2 = sum_{i != j} k(x_i, x_j) / m(m-1) + sum_{i != j} k(y_i, y_j) / m(m-1) - 2 sum_{ij} k(x_i, y_j) / m^2,
    # k(x, y) = (x.y / D + 1)^3  (KID, Bińkowski et al. 2018, section 4)
    """Mean and standard deviation over random subsets of features (N, D) and (M, D); unbiased, so it may be below 0.

    subset_size is cut to the smaller set. Where both sets are no larger, every subset is the whole and the deviation 0:
    it tells of the drawing of subsets, not of the images.
    """
    first, second = _pair(first, second)
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise DigitError(f"kernel distance of {len(first)} and {len(second)} images: give at least 2 of each")
    rng = np.random.default_rng(seed % 2**64)
    chosen = [[rng.choice(len(x), size, replace=False) for x in (first, second)] for _ in range(num_subsets)]
    if len(first) ** 2 + len(second) ** 2 > 2 * num_subsets * size**2:  # then each subset by itself costs less
        everyone = torch.ones(1, size, dtype=torch.float64)
        distances = torch.cat([_mmd(first[a], second[b], everyone, everyone) for a, b in chosen])
    else:
        members = [torch.zeros(num_subsets, len(x), dtype=torch.float64) for x in (first, second)]
        for row, drawn in enumerate(chosen):
            for member, indices in zip(members, drawn, strict=True):
                member[row, indices] = 1
        distances = _mmd(first, second, *members)
    return float(distances.mean()), float(distances.std(unbiased=False))


def _mmd(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """(R,) unbiased MMD^2 of R subsets of x (N, D) and y (M, D), told by members of 0 and 1, (R, N) and (R, M)."""
    size = in_x[0].sum()
    within = sum(
        _kernel_sums(z, z, in_z, in_z) - in_z @ (z.double().square().mean(1) + 1) ** 3
        for z, in_z in ((x, in_x), (y, in_y))
    )
    return within / (size * (size - 1)) - 2 * _kernel_sums(x, y, in_x, in_y) / size**2


def _kernel_sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """(R,) sums of k(x_i, y_j) over the members of each subset."""
    y, sums = y.double(), torch.zeros(len(in_x), dtype=torch.float64)
    for rows in torch.arange(len(x)).split(max(1, MAX_DISTANCES // len(y))):
        kernel = (x[rows].double() @ y.T / y.shape[1] + 1) ** 3  # (n, M)
        sums += ((in_x[:, rows] @ kernel) * in_y).sum(1)
    return sums


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    # precision = 1/M sum_j [ exists i: |f_j - r_i| <= NN_k(r_i) ],  recall with the roles exchanged, NN_k the distance
    # to the k-th nearest neighbour of the own set  (Kynkäänniemi et al. 2019, Eqs. 1 and 2)
    """Share of fake features (M, D) within the real ones' (N, D) manifold, and of real ones within the fake ones'.

    The two depend on N and M: papers take 10,000 or 50,000 of each.
    """
    real, fake = _pair(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise DigitError(f"k = {k} neighbours among {len(real)} real and {len(fake)} fake images: give more images")
    return _covered(fake, real, k), _covered(real, fake, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points (N, D) in a ball of any centre (M, D) that reaches to its k-th nearest fellow."""
    centres = centres.double()
    # k + 1, since the nearest to a centre is itself
    radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distances(centres, centres)])  # (M,)
    return sum(int((block <= radii).any(1).sum()) for block in _distances(points, centres)) / len(points)


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of the squared distances (N, M); what rounding leaves between equal points is 0."""
    squares = y.square().sum(1)  # (M,)
    for rows in x.split(max(1, MAX_DISTANCES // len(y))):
        rows = rows.double()
        scale = rows.square().sum(1, keepdim=True) + squares
        squared = scale - 2 * rows @ y.T
        yield squared.masked_fill_(squared < 1e-13 * scale, 0.0)


def _pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _checked(first, "features"), _checked(second, "features")
    if first.shape[1] != second.shape[1]:
        raise MismatchError(f"features have {first.shape[1]} and {second.shape[1]} numbers: use one network for both")
    return first, second


def _checked(values: Tensor, what: str) -> Tensor:
    values = torch.as_tensor(values).detach().cpu()
    if values.ndim != 2 or not values.numel():
        raise DigitError(f"{what} have shape {tuple(values.shape)}, wanted (images, numbers) of at least one image")
    if not torch.isfinite(values).all():
        raise DigitError(f"{what} hold NaN or infinity: check the images and the network's weights")
    return values
