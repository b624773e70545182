"""A folder answers one request; another one is refused by the name of a setting and both its values."""

import re

import pytest

from digit.errors import MismatchError
from digit.runtime.files import plain
from digit.runtime.request import require_same_request, shown

RECORDED = {"recipe": {"seed": 1, "betas": [0.9, 0.98]}, "data": {"name": "photos", "fingerprint": "0" * 64}}


def test_the_same_request_is_accepted():
    require_same_request("run", RECORDED, plain({**RECORDED, "recipe": {"seed": 1, "betas": (0.9, 0.98)}}), "stop")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"recipe": {"seed": 2, "betas": [0.9, 0.98]}}, "recipe.seed = 1, now asked for 2"),
        ({"recipe": {"seed": 1, "betas": [0.9, 0.99]}}, "recipe.betas = [0.9, 0.98], now asked for [0.9, 0.99]"),
        ({"recipe": {"betas": [0.9, 0.98]}}, "recipe.seed = 1, now asked for None"),
        ({"labels": 3}, "labels = None, now asked for 3"),
        ({"data": {"name": "photos", "fingerprint": "1" * 64}}, f"fingerprint = {'0' * 12}, now asked for {'1' * 12}"),
    ],
)
def test_another_request_is_refused_by_name_and_both_values(changed, text):
    with pytest.raises(MismatchError, match=re.escape(text)) as error:
        require_same_request("run", RECORDED, RECORDED | changed, "choose another --out")
    assert str(error.value).startswith("run was made with ") and str(error.value).endswith(": choose another --out")


def test_settings_that_may_differ_are_passed_over():
    request = {"recipe": {"seed": 2, "betas": [0.9, 0.98]}, "data": RECORDED["data"]}
    require_same_request("run", RECORDED, request, "", ignore={"recipe.seed"}.__contains__)
    require_same_request("run", RECORDED, request, "", ignore=re.compile(r"recipe\.s.*").fullmatch)
    with pytest.raises(MismatchError, match=r"recipe\.seed"):
        require_same_request("run", RECORDED, request, "", ignore={"seed"}.__contains__)


@pytest.mark.parametrize("existing", [None, [], "text", 3])
def test_a_file_that_records_no_request_is_refused(existing):
    with pytest.raises(MismatchError, match=r"seed = None, now asked for 1"):
        require_same_request("run", existing, {"seed": 1}, "choose another --out")


def test_long_values_are_cut_short():
    assert shown([1] * 1000).endswith(" ...") and len(shown([1] * 1000)) < 100
    assert shown(None) == "None" and shown("a" * 64) == "a" * 12 and shown("g" * 64) == "g" * 64
