"""Intervals: known formulas, coverage, and what pairing is for."""

import numpy as np
import pytest
import torch

from digit.errors import DigitError
from digit.metrics.intervals import Interval, difference_interval, mean_interval, proportion_interval


def test_mean_interval_agrees_with_the_normal_one_on_many_values():
    x = np.random.default_rng(0).normal(3, 2, 4000)
    interval = mean_interval(x, num_rounds=4000)
    half = 1.96 * x.std(ddof=1) / len(x) ** 0.5
    assert interval.value == pytest.approx(x.mean(), rel=1e-12)
    assert interval.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_mean_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    samples = rng.exponential(1.0, (300, 60))
    covered = [i.low <= 1 <= i.high for i in (mean_interval(x, confidence=0.8, num_rounds=300) for x in samples)]
    assert 0.72 < np.mean(covered) < 0.86


def test_bootstrap_is_a_function_of_its_seed_and_not_of_its_chunks(monkeypatch):
    x = np.random.default_rng(2).random(50)
    whole = mean_interval(x, num_rounds=200)
    assert mean_interval(x, num_rounds=200) == whole == mean_interval(torch.from_numpy(x), num_rounds=200)
    assert mean_interval(x, num_rounds=200, seed=1) != whole
    monkeypatch.setattr("digit.metrics.intervals.CHUNK", 70)
    assert mean_interval(x, num_rounds=200) == whole


def test_constant_values_have_no_width_and_more_confidence_more():
    assert mean_interval([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    x = np.random.default_rng(3).random(100)
    wide, narrow = mean_interval(x, confidence=0.99), mean_interval(x, confidence=0.5)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_wilson_solves_its_equation():
    # the ends are the p at which (p_hat - p)^2 = z^2 p (1 - p) / n
    z = 1.959963984540054
    for successes, total in ((1, 10), (50, 100), (7, 9), (999, 1000)):
        interval = proportion_interval(successes, total)
        for p in (interval.low, interval.high):
            assert (successes / total - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / total, rel=1e-9)


def test_wilson_at_the_ends_and_mirrored():
    nothing, everything = proportion_interval(0, 20), proportion_interval(20, 20)
    assert nothing.low == 0 and 0.1 < nothing.high < 0.2
    assert everything.high == 1 and everything.low == pytest.approx(1 - nothing.high)
    assert proportion_interval(1, 1).low < 0.5


def test_pairing_sees_what_separate_intervals_do_not():
    rng = np.random.default_rng(4)
    a = rng.normal(0, 1, 200)
    b = a - 0.05 + rng.normal(0, 0.01, 200)
    apart = mean_interval(a).low < mean_interval(b).high
    paired = difference_interval(a, b)
    assert apart and paired.low > 0 and paired.value == pytest.approx(0.05, abs=0.01)
    backwards = difference_interval(b, a)
    assert backwards.low == pytest.approx(-paired.high, abs=1e-3)


def test_how_it_reads():
    interval = Interval(0.114, 0.1, 0.125)
    assert f"{interval:.2f}" == "0.11 [0.10, 0.12]"
    assert interval.to_dict() == {"value": 0.114, "low": 0.1, "high": 0.125}


def test_misuse_says_what_to_do():
    with pytest.raises(DigitError, match="more images"):
        mean_interval([1.0])
    with pytest.raises(DigitError, match="NaN"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(DigitError, match="confidence is 95"):
        mean_interval([1.0, 2.0], confidence=95)
    with pytest.raises(DigitError, match="no proportion"):
        proportion_interval(3, 2)
    with pytest.raises(DigitError, match="same images"):
        difference_interval([1.0, 2.0], [1.0])
