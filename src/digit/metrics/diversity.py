"""How varied samples are, without any reference: the Vendi score."""

from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Real
from torch import Tensor

from digit.metrics.arrays import checked_rows
from digit.metrics.intervals import Interval
from digit.metrics.kernels import ROWS, UnitMoments, unit_rows

RANK_TOLERANCE = 1e-13  # eigenvalues below this fraction of the largest are rounding


def vendi_score(
    features: Real[Tensor, "N D"], *, confidence: float = 0.95, moments: UnitMoments | None = None
) -> Interval:
    """exp( -sum_i l_i log l_i ),  l_i the eigenvalues of K / N,  K_ij = x_i.x_j / (||x_i|| ||x_j||).

    Vendi score (Friedman & Dieng 2022, Definition 3.1, with the cosine as similarity) of features (N, D): the effective
    number of different images, in 1..min(N, D). Higher is more varied, though no better: noise varies too. It grows
    with N until that is many times the score; compare equal N only.

    The interval is value -+ z times the standard error by the influence of each image,
    value * (-x_i' log(C) x_i - log value), C = sum_i x_i x_i' / N of rows of length 1. It does not contain the bias of
    few images. moments is `UnitMoments.of(features)`, if it is known already. Raises DigitError for features of length
    0, NaN, infinity and other shapes.
    """
    x = checked_rows(features, "features")
    num, dim = x.shape
    if num < dim:
        units = unit_rows(x)
        values, vectors = torch.linalg.eigh(units @ units.T / num)
        kept = values > RANK_TOLERANCE * values[-1]
        values = values[kept]
        projected = -(vectors[:, kept].square() * values * num) @ values.log()  # (N,), squared projections on the axes
    else:
        moments = UnitMoments.of(x) if moments is None else moments
        values, vectors = torch.linalg.eigh(moments.second / num)
        kept = values > RANK_TOLERANCE * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        projected = torch.cat([-(unit_rows(rows) @ vectors).square() @ values.log() for rows in x.split(ROWS)])
    entropy = -(values * values.log()).sum()
    value = float(entropy.exp())
    influence = (value * (projected - entropy)).numpy()
    error = float(influence.std() / np.sqrt(len(influence)))
    if error <= 1e-9 * value:
        return Interval.without(value, "each image changes the score alike")
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(value, max(value - half, 1.0), value + half)
