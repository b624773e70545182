"""A folder answers one request; another one is refused by the name of a setting and both its values."""

import re
from dataclasses import asdict, dataclass, field

import pytest

from digit.errors import MismatchError
from digit.runtime.files import plain
from digit.runtime.request import defaults_of, require_same_request, shown

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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A nested config of the next one."""

    order: str = "confidence"
    steps: int = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A config whose younger settings a recorded request may lack."""

    size: int
    betas: tuple[float, float] = (0.9, 0.98)
    stage: Stage = field(default_factory=Stage)


def test_a_setting_that_an_older_version_lacks_has_its_default():
    usual = defaults_of(Settings)
    assert usual == {"betas": [0.9, 0.98], "stage": {"order": "confidence", "steps": 8}}
    older = {"size": 3, "stage": {"steps": 4}}
    now = plain(asdict(Settings(size=3, stage=Stage(steps=4))))
    require_same_request("run", older, now, "stop", defaults=usual)
    require_same_request("run", {"size": 3}, plain(asdict(Settings(size=3))), "stop", defaults=usual)
    for other, text in (
        (Settings(size=3, stage=Stage(steps=4, order="halton")), "stage.order = confidence, now asked for halton"),
        (Settings(size=3, stage=Stage(steps=5)), "stage.steps = 4, now asked for 5"),
        (Settings(size=3, stage=Stage(steps=4), betas=(0.5, 0.9)), "betas = [0.9, 0.98], now asked for [0.5, 0.9]"),
    ):
        with pytest.raises(MismatchError, match=re.escape(text)):
            require_same_request("run", older, plain(asdict(other)), "stop", defaults=usual)
    with pytest.raises(MismatchError, match=r"size = None, now asked for 3"):  # it has no default
        require_same_request("run", {"stage": {}}, now, "stop", defaults=usual)
    with pytest.raises(MismatchError, match=r"order = confidence, now asked for None"):  # one that is no more
        require_same_request(
            "run", plain(asdict(Settings(size=3))), {"size": 3, "stage": {"steps": 8}, "betas": [0.9, 0.98]}, ""
        )


def test_long_values_are_cut_short():
    assert shown([1] * 1000).endswith(" ...") and len(shown([1] * 1000)) < 100
    assert shown(None) == "None" and shown("a" * 64) == "a" * 12 and shown("g" * 64) == "g" * 64
