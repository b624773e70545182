"""How varied samples are, without any reference: the Vendi score."""

from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Real
from torch import Tensor

from digit.metrics.arrays import checked_rows
from digit.metrics.intervals import Interval
from digit.metrics.kernels import unit_rows

RANK_TOLERANCE = 1e-13  # eigenvalues below this fraction of the largest are rounding


def vendi_score(features: Real[Tensor, "N D"], *, confidence: float = 0.95) -> Interval:
    """exp( -sum_i l_i log l_i ),  l_i the eigenvalues of K / N,  K_ij = x_i.x_j / (||x_i|| ||x_j||).

    Vendi score (Friedman & Dieng 2022, Definition 3.1, with the cosine as similarity) of features (N, D): the effective
    number of different images, in 1..min(N, D). Higher is more varied, though no better: noise varies too. It grows
    with N until that is many times the score; compare equal N only.

    The interval is value -+ z times the standard error by the influence of each image,
    value * (-x_i' log(C) x_i - log value), C = sum_i x_i x_i' / N of rows of length 1. It does not contain the bias of
    few images. Raises DigitError for features of length 0, NaN, infinity and other shapes.
    """
    x = unit_rows(checked_rows(features, "features"))
    if len(x) < x.shape[1]:
        values, vectors = torch.linalg.eigh(x @ x.T / len(x))
        kept = values > RANK_TOLERANCE * values[-1]
        values = values[kept]
        squares = vectors[:, kept].square() * values * len(x)  # (N, R): squared projections of x_i on the axes
    else:
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        kept = values > RANK_TOLERANCE * values[-1]
        values, squares = values[kept], (x @ vectors[:, kept]).square()
    entropy = -(values * values.log()).sum()
    value = float(entropy.exp())
    influence = (value * (-squares @ values.log() - entropy)).numpy()
    error = float(influence.std() / np.sqrt(len(influence)))
    if error <= 1e-9 * value:
        return Interval.without(value, "each image changes the score alike")
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(value, max(value - half, 1.0), value + half)
