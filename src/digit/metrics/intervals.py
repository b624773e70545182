"""Confidence intervals over images: bootstrap for means (Efron 1979), Wilson's (1927) for proportions.

They answer how far the figure would move on other images of the same kind; nothing else (another training run, another
seed of the model) is in them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from torch import Tensor

from digit.errors import DigitError

Values = np.ndarray | Tensor | Sequence[float]
CHUNK = 2**22  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its confidence interval. `f"{x:.3f}"` reads `0.114 [0.110, 0.118]`."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """{"value", "low", "high"}, for JSON."""
        return asdict(self)

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_interval(values: Values, *, confidence: float = 0.95, seed: int = 0, num_rounds: int = 1000) -> Interval:
    # the central `confidence` of mean(values[i_1 .. i_N]), i drawn with replacement
    """Mean of `values` (N,), one number an image, with its percentile bootstrap interval.

    Raises DigitError for fewer than 2 values, other shapes, NaN, and a confidence outside (0, 1).
    """
    x = _as_float64(values)
    if x.ndim != 1 or len(x) < 2:
        raise DigitError(f"an interval needs a row of at least 2 values, got shape {x.shape}: give more images")
    if not np.isfinite(x).all():
        raise DigitError(f"{(~np.isfinite(x)).sum()} of {len(x)} values are NaN or infinite: no mean of them exists")
    tail = _tail(confidence)
    rng, at_once = np.random.default_rng(seed), max(1, CHUNK // len(x))
    rounds = [min(at_once, num_rounds - done) for done in range(0, num_rounds, at_once)]
    means = np.concatenate([x[rng.integers(len(x), size=(n, len(x)))].mean(1) for n in rounds])  # (num_rounds,)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high))


def proportion_interval(successes: int, total: int, *, confidence: float = 0.95) -> Interval:
    # (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)  (Wilson 1927)
    """Share `successes / total` with Wilson's interval, honest also near 0 and 1 and for few images."""
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
    # mean(a_i - b_i), images drawn in pairs
    """Mean difference of two measurements (N,) of the same images, with its paired bootstrap interval.

    Pairing takes the images' own spread out, so that it decides what two separate intervals leave open.
    """
    first, second = _as_float64(a), _as_float64(b)
    if first.shape != second.shape:
        raise DigitError(f"{first.shape} and {second.shape} values cannot be paired: measure both on the same images")
    return mean_interval(first - second, confidence=confidence, seed=seed, num_rounds=num_rounds)


def _as_float64(values: Values) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


def _tail(confidence: float) -> float:
    """Probability outside on either side."""
    if not 0 < confidence < 1:
        raise DigitError(f"confidence is {confidence}: wanted a fraction between 0 and 1, 0.95 for example")
    return (1 - confidence) / 2


def seeds_interval(values: Values, *, confidence: float = 0.95) -> Interval:
    # mean +- t_(n-1, 1 - alpha/2) s / sqrt(n)  (Student 1908)
    """Mean of a few independent runs, taken as normally distributed: how far other seeds would move it.

    Three seeds give a wide interval on purpose: the quantile of t is 4.3 there. Raises DigitError below two runs.
    """
    from scipy.stats import t

    x = _as_float64(values)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise DigitError(f"an interval over seeds needs at least 2 finite figures, got {x.tolist()}: train more seeds")
    mean, half = float(x.mean()), float(t.ppf(1 - _tail(confidence), len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)
