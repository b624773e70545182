"""Verdicts: over seeds where there are enough, over images where there are not."""

import math

import pytest
import torch

from digit.reproduce.claims import FAILS, HOLDS, UNDECIDED, images_claim, top1_difference
from digit.reproduce.latent import distances, to_table

DIFFERENCE = {"value": -5.0, "low": -6.0, "high": -4.0}


def test_one_seed_is_decided_over_images():
    claim = images_claim([9.1], [14.1], DIFFERENCE, lower_is_better=True)
    assert (claim["verdict"], claim["interval_over"]) == (HOLDS, "images")
    assert images_claim([9.1], [14.1], DIFFERENCE, lower_is_better=False)["verdict"] == FAILS
    assert images_claim([9], [9], DIFFERENCE | {"high": 1.0}, lower_is_better=True)["verdict"] == UNDECIDED
    missing = {"value": 0.0, "low": None, "high": None, "missing": "all equal"}
    assert images_claim([9], [9], missing, lower_is_better=True)["verdict"] == UNDECIDED


def test_newcombes_interval_is_his():
    """Newcombe (1998), table II: 56 of 70 against 48 of 80, method 10: 0.2000 [0.0524, 0.3339]."""
    from digit.metrics.intervals import proportion_interval

    first, second = (proportion_interval(*pair).to_dict() for pair in ((56, 70), (48, 80)))
    found = top1_difference(first, second)
    assert [found.value, found.low, found.high] == pytest.approx([20.0, 5.24, 33.39], abs=0.01)
    assert top1_difference(second, first).low == pytest.approx(-found.high)


def test_the_generated_images_lie_within_the_bound_of_the_equations():
    rng = torch.Generator().manual_seed(0)
    images, own, generated = (torch.randn(400, 6, generator=rng) * (1 + k) + k for k in range(3))
    found = distances(images, own, generated)
    assert found["sum"] == pytest.approx(found["D_H"] + found["D_G"])
    assert found["sum"] < found["generated"] <= found["bound"]  # squares obey no triangle inequality, roots do


def test_the_table_of_the_equations():
    row = {"D_H": 1.67, "D_G": 16.0, "sum": 17.67, "generated": 24.38, "bound": (math.sqrt(1.67) + 4) ** 2}
    table = to_table({"VQ-only AR": row, "DiGIT + AR": row})
    assert "| VQ-only AR | 1.67 | 16 | 17.67 | 24.38 | 28.01 | 1.67, 24.38 |" in table
