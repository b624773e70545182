"""Measures of nearest neighbours: precision, recall, density, coverage, authenticity.

r_i are real features (N, D), f_j fake ones (M, D). NN_k(r_i) is the distance of r_i to its k-th nearest neighbour among
the other r. All measures of one comparison come from one pass over the pairs (`compare_neighbours`), with the decisions
of float64. They depend on N and M, and on the network: compare only values of the same three.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64, Real
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.arrays import checked_pair
from digit.metrics.distances import Block, Nearest, Pairs, nearest_others, within
from digit.metrics.intervals import Interval, mean_interval, proportion_interval


@dataclass(frozen=True)
class Neighbours:
    """How the fake points lie among the real ones, and the real ones among the fake."""

    k: int
    num_balls: Int64[np.ndarray, " M"]
    """Number of real points r_i with ||f_j - r_i|| <= NN_k(r_i), for each fake point."""
    covered: Bool[np.ndarray, " N"]
    """Whether some fake point lies within NN_k(r_i) of r_i."""
    recalled: Bool[np.ndarray, " N"]
    """Whether r_i lies within NN_k(f_j) of some fake point f_j."""
    nearest: Int64[np.ndarray, " M"]
    """The real point that is nearest to each fake point."""
    nearest_squares: Float64[np.ndarray, " M"]
    """Squared distance to it."""
    real_squares: Float64[np.ndarray, " N"]
    """Squared distance of each real point to its nearest other real point."""
    fake_squares: Float64[np.ndarray, " M"]
    """Squared distance of each fake point to its nearest other fake point."""

    @property
    def own_squares(self) -> Float64[np.ndarray, " M"]:
        """`real_squares` of the real point that is nearest to each fake point."""
        return self.real_squares[self.nearest]

    @property
    def authentic(self) -> Bool[np.ndarray, " M"]:
        """Whether each fake point is farther from its nearest real point than that one is from its nearest other."""
        return self.nearest_squares > self.own_squares

    @property
    def densities(self) -> Float64[np.ndarray, " M"]:
        """Number of real balls about each fake point, divided by k."""
        return self.num_balls / self.k

    def precision(self) -> Interval:
        """1/M sum_j [exists i: ||f_j - r_i|| <= NN_k(r_i)], with Wilson's interval over the fake points.

        Kynkäänniemi et al. 2019, Eq. 1. In 0..1, higher is better.
        """
        return _share(self.num_balls > 0)

    def recall(self) -> Interval:
        """1/N sum_i [exists j: ||r_i - f_j|| <= NN_k(f_j)], with Wilson's interval over the real points.

        Kynkäänniemi et al. 2019, Eq. 2. In 0..1, higher is better.
        """
        return _share(self.recalled)

    def density(self) -> Interval:
        """1/(k M) sum_j sum_i [||f_j - r_i|| <= NN_k(r_i)], with a bootstrap interval over the fake points.

        Naeem et al. 2020, section 3. At least 0 and not bounded by 1; about 1 for samples from the real distribution.
        """
        return mean_interval(self.densities)

    def coverage(self) -> Interval:
        """1/N sum_i [exists j: ||f_j - r_i|| <= NN_k(r_i)], with Wilson's interval over the real points.

        Naeem et al. 2020, section 3. In 0..1, higher is better; samples of the real distribution have
        1 - (N - 1)...(N - k) / ((M + N - 1)...(M + N - k)) on average: 0.97 for k = 5 and N = M, far less for M << N.
        """
        return _share(self.covered)

    def authenticity(self) -> Interval:
        """1/M sum_j [||f_j - r_i|| > NN_1(r_i)],  i = argmin_i ||f_j - r_i||,  with Wilson's interval over the fakes.

        Alaa et al. 2022, without their embedding, as AuthPct in dgm-eval (a percentage there). The rest is the share of
        samples that lie nearer to a training image than that lies to any other. In 0..1; new samples of the real
        distribution have 1/3 in one dimension, 0.38 in two, and more in many (0.76 for 1,000 Gaussian points in 30), so
        compare with real images that were held out. Lower where training images were copied, and higher, though not
        better, where samples lie far from all of them.
        """
        return _share(self.authentic)


def _share(chosen: np.ndarray) -> Interval:
    return proportion_interval(int(chosen.sum()), len(chosen))


def compare_neighbours(real: Real[Tensor, "N D"], fake: Real[Tensor, "M D"], k: int = 3) -> Neighbours:
    """Find the neighbours of fake features (M, D) among real ones (N, D) and the reverse.

    Raises DigitError unless both sets hold more than k points, and for NaN, infinity and features of another shape.
    """
    return compare_at(real, fake, (k,))[0]


def compare_at(
    real: Real[Tensor, "N D"],
    fake: Real[Tensor, "M D"],
    ks: Sequence[int],
    *,
    real_squares: Float64[np.ndarray, "N K"] | None = None,
    fake_squares: Float64[np.ndarray, "M K"] | None = None,
    consumer: Callable[[Pairs], Callable[[Block], None]] | None = None,
) -> list[Neighbours]:
    """`compare_neighbours` for several k in one pass over the pairs.

    real_squares (N, K) and fake_squares (M, K), K the largest k, are the results of `nearest_others(real, K)` and of
    fake, if they are known already: they take N² D and M² D operations, the rest N M D. consumer makes a function of
    the pairs of fake (rows) with real points that gets their blocks too.
    """
    real, fake = checked_pair(real, fake)
    most = max(ks)
    if not 1 <= min(ks) <= most < min(len(real), len(fake)):
        raise DigitError(f"k = {most} neighbours among {len(real)} real and {len(fake)} fake images: give more images")
    real_squares = nearest_others(real, most)[0] if real_squares is None else real_squares
    fake_squares = nearest_others(fake, most)[0] if fake_squares is None else fake_squares
    pairs = Pairs(fake, real)
    nearest = Nearest(pairs, 1)
    balls = [_Balls(pairs, real_squares[:, k - 1], fake_squares[:, k - 1]) for k in ks]
    others = () if consumer is None else (consumer(pairs),)
    pairs.sweep(nearest.add, *(one.add for one in balls), *others)
    squares, which = (values[:, 0] for values in nearest.result())
    return [
        Neighbours(k, one.num, one.covered, one.recalled, which, squares, real_squares[:, 0], fake_squares[:, 0])
        for k, one in zip(ks, balls, strict=True)
    ]


class _Balls:
    """Counts which points lie in which balls, from blocks of the pairs of fake (rows) with real points (columns)."""

    def __init__(self, pairs: Pairs, real_squares: np.ndarray, fake_squares: np.ndarray):
        self._pairs, self._real_squares, self._fake_squares = pairs, real_squares, fake_squares
        self.num = np.zeros(len(pairs.x), dtype=np.int64)
        self.covered, self.recalled = (np.zeros(len(pairs.y), dtype=bool) for _ in range(2))

    def add(self, block: Block) -> None:
        i, j = within(self._pairs, block, self._real_squares)
        self.num[block.rows] += np.bincount(i, minlength=block.rows.stop - block.rows.start)
        self.covered[j + block.columns.start] = True
        _, j = within(self._pairs, block, self._fake_squares, of_rows=True)
        self.recalled[j + block.columns.start] = True


def precision_recall(real: Real[Tensor, "N D"], fake: Real[Tensor, "M D"], k: int = 3) -> tuple[float, float]:
    """precision = 1/M sum_j [exists i: ||f_j - r_i|| <= NN_k(r_i)];  recall: the same with f and r exchanged.

    Kynkäänniemi et al. 2019, Eqs. 1 and 2; papers use 10,000 or 50,000 of each. Raises as `compare_neighbours`.
    """
    found = compare_neighbours(real, fake, k)
    return found.precision().value, found.recall().value


def density_coverage(real: Real[Tensor, "N D"], fake: Real[Tensor, "M D"], k: int = 5) -> tuple[float, float]:
    """density = 1/(k M) sum_ji c_ji;  coverage = 1/N sum_i max_j c_ji,  c_ji = [||f_j - r_i|| <= NN_k(r_i)].

    Naeem et al. 2020, section 3; k = 5 and 10,000 of each there. Raises as `compare_neighbours`.
    """
    found = compare_neighbours(real, fake, k)
    return found.density().value, found.coverage().value


def authenticity(real: Real[Tensor, "N D"], fake: Real[Tensor, "M D"]) -> float:
    """1/M sum_j [||f_j - r_i|| > NN_1(r_i)],  i = argmin_i ||f_j - r_i||  (Alaa et al. 2022).

    See `Neighbours.authenticity`. Raises as `compare_neighbours`.
    """
    return compare_neighbours(real, fake, 1).authenticity().value


def copying_score(
    real: Real[Tensor, "N D"], held_out: Real[Tensor, "H D"], fake: Real[Tensor, "M D"]
) -> tuple[float, float]:
    """(U - M H / 2) / sqrt(M H (M + H + 1) / 12),  U = sum_jh [d(f_j) > d(h)] + [d(f_j) = d(h)] / 2;  and its p-value.

    Z_U of data copying (Meehan et al. 2020), with the whole space as one cell: d is the distance to the nearest
    training image, of fake features (M, D) and of real ones (H, D) that were not trained on; real (N, D) are those that
    were. 0 is best: below -3 samples lie nearer to training images than new images do (they copy), above 3 farther
    (they miss the distribution). It grows with the number of images and has no interval; the p-value is that of a
    two-sided normal test. Needs about 20 images of each. Raises DigitError for other shapes, NaN and infinity.
    """
    from scipy.stats import norm, rankdata

    squares = []
    for points in (fake, held_out):
        points, training = checked_pair(points, real)
        pairs = Pairs(points, training)
        nearest = Nearest(pairs, 1)
        pairs.sweep(nearest.add)
        squares.append(nearest.result()[0][:, 0])
    num, num_held_out = map(len, squares)
    u = rankdata(np.concatenate(squares))[:num].sum() - num * (num + 1) / 2
    z = float((u - num * num_held_out / 2) / np.sqrt(num * num_held_out * (num + num_held_out + 1) / 12))
    return z, float(2 * norm.sf(abs(z)))
