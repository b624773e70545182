"""Single numbers as people bring them, and names that are nearly right."""

import numpy as np
import pytest
import torch

from digit.errors import DigitError
from digit.runtime.names import did_you_mean
from digit.runtime.scalars import as_int, as_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3])])
def test_whole_numbers_of_any_type(value):
    number = as_int("num", value)
    assert number == 3 and type(number) is int and as_number("keep", value) == 3.0


@pytest.mark.parametrize(
    "value", [3.0, np.float32(3), "3", None, True, np.bool_(True), torch.tensor(True), torch.tensor(3.0), [3], [1, 2]]
)
def test_what_is_no_whole_number(value):
    with pytest.raises(DigitError, match="num is .*: it must be a whole number"):
        as_int("num", value)


def test_the_least():
    with pytest.raises(DigitError, match="num is 0: it must be at least 1"):
        as_int("num", np.int64(0), least=1)


def test_numbers():
    assert as_number("keep", np.float32(0.5)) == 0.5 == as_number("keep", torch.tensor(0.5))
    for value in ("0.5", None, True, float("nan"), float("inf"), [1, 2], 1j, 10**400):
        with pytest.raises(DigitError, match="keep is .*: it must be a finite number"):
            as_number("keep", value)


def test_names():
    assert did_you_mean("cub", ["sphere", "cube"]) == ": did you mean cube?" and did_you_mean("xyz", ["cube"]) == ""
