"""Confidence intervals over images: bootstrap for means (Efron 1979), Wilson's (1927) for proportions.

They cover the choice of images alone; another training run or another seed of the model may differ by more.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Self

import numpy as np

from digit.errors import DigitError
from digit.metrics.arrays import Values, as_float64

CHUNK = 2**22  # resampled values in memory at a time


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its confidence interval. `f"{x:.3f}"` gives `0.114 [0.110, 0.118]`."""

    value: float
    low: float
    high: float
    missing: str = ""
    """Why there is no interval; low and high are NaN then."""

    @classmethod
    def without(cls, value: float, missing: str) -> Self:
        """A value whose interval cannot be had, and why."""
        return cls(value, math.nan, math.nan, missing)

    def to_dict(self) -> dict[str, Any]:
        """{"value", "low", "high"}, for JSON; without an interval low and high are None, and "missing" says why."""
        ends = {"low": None, "high": None, "missing": self.missing} if self.missing else None
        return {"value": self.value} | (ends or {"low": self.low, "high": self.high})

    def __format__(self, spec: str) -> str:
        if self.missing:
            return f"{self.value:{spec}} [no interval: {self.missing}]"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_interval(values: Values, *, confidence: float = 0.95, seed: int = 0, num_rounds: int = 1000) -> Interval:
    """mean_i x_i, and the quantiles (1 -+ confidence) / 2 over rounds of mean(x[i_1], .., x[i_N]), i with replacement.

    Percentile bootstrap of `values` (N,), one per image. Raises DigitError for fewer than 2 values, other shapes, NaN,
    and a confidence outside (0, 1).
    """
    x = as_float64(values)
    if x.ndim != 1 or len(x) < 2:
        raise DigitError(f"an interval needs an array (N,) of at least 2 values, got shape {x.shape}: give more images")
    if not np.isfinite(x).all():
        raise DigitError(f"{(~np.isfinite(x)).sum()} of {len(x)} values are NaN or infinite: they have no mean")
    tail = _tail(confidence)
    rng, at_once = np.random.default_rng(seed), max(1, CHUNK // len(x))
    rounds = [min(at_once, num_rounds - done) for done in range(0, num_rounds, at_once)]
    means = np.concatenate([x[rng.integers(len(x), size=(n, len(x)))].mean(1) for n in rounds])  # (num_rounds,)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high))


def proportion_interval(successes: int, total: int, *, confidence: float = 0.95) -> Interval:
    """(p + z² / 2n -+ z sqrt(p (1 - p) / n + z² / 4n²)) / (1 + z² / n),  p = successes / total, n = total.

    Wilson's (1927) interval of a proportion, valid near 0 and 1 and for few images; z is the normal quantile. Raises
    DigitError unless 0 <= successes <= total and total > 0.
    """
    if not 0 <= successes <= total or total < 1:
        raise DigitError(f"{successes} of {total} is no proportion: wanted 0 <= successes <= total, and total above 0")
    z = NormalDist().inv_cdf(1 - _tail(confidence))
    p, width = successes / total, z * z / total
    middle = p + width / 2
    half = z * (p * (1 - p) / total + width / (4 * total)) ** 0.5
    low, high = (middle - half) / (1 + width), (middle + half) / (1 + width)
    return Interval(p, max(0.0, min(low, p)), min(1.0, max(high, p)))  # rounding at 0 and 1


def difference_interval(
    a: Values, b: Values, *, confidence: float = 0.95, seed: int = 0, num_rounds: int = 1000
) -> Interval:
    """mean_i (a_i - b_i) of two metrics (N,) of the same images, with its paired bootstrap interval.

    Pairing removes the variation between images, so it can decide where two separate intervals overlap. Raises
    DigitError for different shapes, else as `mean_interval`.
    """
    first, second = as_float64(a), as_float64(b)
    if first.shape != second.shape:
        raise DigitError(f"{first.shape} and {second.shape} values cannot be paired: compute both on the same images")
    return mean_interval(first - second, confidence=confidence, seed=seed, num_rounds=num_rounds)


def _tail(confidence: float) -> float:
    """Probability outside the interval on either side. Raises DigitError for a confidence outside (0, 1)."""
    if not 0 < confidence < 1:
        raise DigitError(f"confidence is {confidence}: wanted a fraction between 0 and 1, 0.95 for example")
    return (1 - confidence) / 2


def seeds_interval(values: Values, *, confidence: float = 0.95) -> Interval:
    """mean -+ t_(n-1, 1 - alpha/2) s / sqrt(n)  (Student 1908), alpha = 1 - confidence.

    Mean of n independent runs (n,), one per seed, assumed normally distributed, with standard deviation s. Three seeds
    give a wide interval: the quantile of t is 4.3. Raises DigitError for fewer than two runs.
    """
    from scipy.stats import t

    x = as_float64(values)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise DigitError(f"an interval over seeds needs at least 2 finite values, got {x.tolist()}: train more seeds")
    mean, half = float(x.mean()), float(t.ppf(1 - _tail(confidence), len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)
