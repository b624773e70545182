"""Fréchet distance between two sets of features (the formula of FID, Heusel et al. 2017), in float64.

The distance depends on the feature network, its input size and the number of images: report all three with it. It is
an FID only on the Inception network of Heusel et al. (metrics/judge.py describes our own network).
"""

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from digit.errors import DigitError, MismatchError
from digit.metrics.arrays import Values, as_float64

BLOCK = 16_384  # images in float64 at a time
NUCLEAR_ERROR = 1e-10  # of a sum of singular values
FEW = 10_000  # images below which the upward bias of a Fréchet distance is far from small (Chong & Forsyth 2020)


class FeatureStats:
    """m = sum_i x_i / N and S = sum_i (x_i - m)(x_i - m)' / (N - 1), of batched features (Chan et al. 1979); float64.

    `update` takes (B, D), `merge` another FeatureStats. Order and batch size change the result by rounding alone.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None  # (D,)
        self._scatter: np.ndarray | None = None  # (D, D), sum of outer products about the mean

    @classmethod
    def of(cls, features: np.ndarray | Tensor) -> Self:
        """Compute the statistics of one array or tensor (N, D)."""
        return cls().update(features)

    @property
    def dim(self) -> int:
        """Number D of features. Raises DigitError before the first update."""
        return self.mean.shape[0]

    @property
    def mean(self) -> Float64[np.ndarray, " D"]:
        """Mean (D,) float64. Raises DigitError before the first update."""
        if self._mean is None:
            raise DigitError("feature statistics are empty: update them with at least 2 images")
        return self._mean

    @property
    def cov(self) -> Float64[np.ndarray, "D D"]:
        """Unbiased covariance (D, D) float64. Raises DigitError for fewer than 2 images."""
        if self.count < 2:
            raise DigitError(f"feature statistics hold {self.count} images: a covariance needs at least 2")
        assert self._scatter is not None
        return self._scatter / (self.count - 1)

    def update(self, features: np.ndarray | Tensor) -> Self:
        """Add a batch (B, D), array or tensor of real numbers. Raises DigitError for other shapes, NaN and infinity."""
        for start in range(0, _num_rows(features), BLOCK):
            block = self.checked(features[start : start + BLOCK])
            mean = block.mean(0)
            centred = block - mean
            self._add(len(block), mean, centred.T @ centred)
        return self

    @staticmethod
    def checked(features: np.ndarray | Tensor) -> Float64[np.ndarray, "N D"]:
        """Convert features (N, D) to float64. Raises DigitError for other shapes, NaN and infinity."""
        _num_rows(features)
        values = as_float64(features)
        if not np.isfinite(values).all():
            raise DigitError("features hold NaN or infinity: check the images and the network's weights")
        return values

    def state(self) -> dict[str, Tensor]:
        """Everything that these statistics hold, for `restore`: count (), mean (D,) and scatter (D, D) float64."""
        mean, scatter = self.mean, self._scatter
        assert scatter is not None
        return {"count": torch.tensor(self.count), "mean": torch.from_numpy(mean), "scatter": torch.from_numpy(scatter)}

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> Self:
        """Statistics with the `state` of others."""
        stats = cls()
        stats.count, stats._mean, stats._scatter = (
            int(state["count"]),
            *(state[name].numpy().copy() for name in ("mean", "scatter")),
        )
        return stats

    def merge(self, other: "FeatureStats") -> Self:
        """Add the statistics of other images, for example from another process."""
        if other._mean is not None and other._scatter is not None:
            self._add(other.count, other._mean, other._scatter)
        return self

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean.copy(), scatter.copy()
            return
        if mean.shape != self._mean.shape:
            raise MismatchError(f"features have {len(mean)} dimensions, statistics {self.dim}: use one network")
        total, shift = self.count + count, mean - self._mean
        self._scatter += scatter + np.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total


def _num_rows(features: np.ndarray | Tensor) -> int:
    """N of features (N, D). Raises DigitError for other shapes."""
    if len(features.shape) != 2:
        raise DigitError(f"features have shape {tuple(features.shape)}, wanted (images, features): pool them first")
    return len(features)


def frechet_distance(
    mu1: Values, s1: Values, mu2: Values, s2: Values, *, root2: Values | None = None, rank1: int | None = None
) -> float:
    """||mu1 - mu2||² + Tr(S1 + S2 - 2 (S1 S2)^(1/2))  (FID, Heusel et al. 2017, Eq. 6).

    Squared Fréchet (2-Wasserstein) distance of two Gaussians with means (D,) and covariances (D, D); at least 0.
    Tr (S1 S2)^(1/2) is computed as the sum of the singular values of A1' A2, where A A' = S: Cholesky factors, or
    S^(1/2) where S is singular. That takes no complex square root of a nearly singular product, and is exact for
    S1 = S2 with fewer images than features too. root2 is `square_root(s2)`, if it is known already. rank1 is the rank
    of s1 (images - 1, where there are fewer images than features): only so many eigenvalues are more than rounding,
    which saves time.
    """
    mu1, s1, mu2, s2 = (as_float64(value) for value in (mu1, s1, mu2, s2))
    if mu1.shape != mu2.shape or s1.shape != s2.shape:
        raise MismatchError(f"statistics have {mu1.size} and {mu2.size} dimensions: use one network for both")
    if rank1 is None or rank1 >= len(s1):
        factor2 = factor(s2) if root2 is None else as_float64(root2)
        cross = nuclear_norm(factor(s1).T @ factor2)
    else:  # no small eigenvalue but those of rounding, which are left out
        root2 = square_root(s2) if root2 is None else as_float64(root2)
        product = root2 @ s1 @ root2
        values = np.linalg.eigvalsh((product + product.T) * 0.5)[len(s1) - rank1 :]
        cross = np.sqrt(np.maximum(values, 0.0)).sum()
    shift = mu1 - mu2
    return max(float(shift @ shift + np.trace(s1) + np.trace(s2) - 2.0 * cross), 0.0)


def nuclear_norm(matrix: Float64[np.ndarray, "D D"]) -> float:
    """sum_i sigma_i, the singular values of M (D, D).

    They are the roots of the eigenvalues of M'M, which take a third of the time of M's own decomposition. Rounding
    moves each eigenvalue by about 1e-16 of the largest, and its root by that / 2 sigma_i. Where these add up to more
    than 1e-10 of the sum, M itself is decomposed.
    """
    values = np.linalg.eigvalsh(matrix.T @ matrix)
    if values[0] > 0:
        roots = np.sqrt(values)
        error = np.finfo(np.float64).eps * values[-1] / 2 * (1 / roots).sum()
        if error <= NUCLEAR_ERROR * roots.sum():
            return float(roots.sum())
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def factor(cov: Float64[np.ndarray, "D D"]) -> Float64[np.ndarray, "D D"]:
    """A with A A' = S: the Cholesky factor, a tenth of the work of S^(1/2); S^(1/2) where S is singular."""
    try:
        return np.linalg.cholesky((cov + cov.T) * 0.5)
    except np.linalg.LinAlgError:
        return square_root(cov)


def square_root(cov: Values) -> Float64[np.ndarray, "D D"]:
    """S^(1/2) of a covariance (D, D), symmetric; negative eigenvalues come from rounding and become 0."""
    cov = as_float64(cov)
    values, vectors = np.linalg.eigh((cov + cov.T) * 0.5)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def bootstrap_std(
    first: np.ndarray | Tensor, second: np.ndarray | Tensor, *, num_rounds: int = 20, seed: int = 0
) -> float:
    """std_r d(resample_r(first), resample_r(second)), r = 1 .. num_rounds: the bootstrap of the Fréchet distance.

    Both sets of features (N, D) and (M, D) are resampled with replacement. The result estimates how much the distance
    varies with the sample of images. It does not contain the upward bias of small samples: compare only distances of
    equally many images.
    """
    first, second = as_float64(first), as_float64(second)
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(num_rounds):
        a, b = (FeatureStats.of(x[rng.integers(len(x), size=len(x))]) for x in (first, second))
        distances.append(frechet_distance(a.mean, a.cov, b.mean, b.cov))
    return float(np.std(distances, ddof=1))


def count_warnings(num_samples: int | None, num_reference: int | None, dim: int) -> list[str]:
    """Warnings about the numbers of images behind a distance in `dim` features; None is a number that is not known."""
    counts = {"samples": num_samples, "reference images": num_reference}
    known = {noun: count for noun, count in counts.items() if count is not None}
    warnings, few = [], False
    for noun, count in known.items():
        if count <= dim:
            warnings.append(
                f"{count} {noun} for {dim} features: the covariance is singular and the distance far too high"
            )
        elif count < FEW:
            few = True
            warnings.append(f"{count} {noun}: below {FEW:,} images the distance is too high")
    if len(known) == 2 and (few or num_samples != num_reference):
        both = " against ".join(f"{count} {noun}" for noun, count in known.items())
        warnings.append(f"{both}: compare with metrics of the same two numbers only")
    return warnings
