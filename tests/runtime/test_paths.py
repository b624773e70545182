"""A missing path is told from a model's name, and the one that may have been meant is named."""

import pytest

from digit.runtime.paths import is_path, nearest


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "runs" / "demo" / "vqgan").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "weights.pth").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/dem", "runs/demo"),
        ("run/demo", "runs/demo"),
        ("runs/Demo", "runs/demo"),
        ("runs/dmo/vqgan", "runs/demo/vqgan"),
        ("phots", "photos"),
        ("./photo", "photos"),
        ("weigths.pth", "weights.pth"),
        ("runs/dem/nothing", "runs/demo"),
    ],
)
def test_the_nearest_name_is_suggested(here, typed, meant):
    assert nearest(typed) == f" (did you mean {meant}?)"


@pytest.mark.parametrize("typed", ["entirely/other", "runs/xyz", "runs/demo", "a\0b", "/nowhere/at/all", ""])
def test_nothing_like_it_suggests_nothing(here, typed):
    assert nearest(typed) == ""


@pytest.mark.parametrize("typed", ["runs/dem", "./dem", "~/runs", "/data/x", "a/b/c", "photos", "runs/"])
def test_a_path_is_no_model(here, typed):
    assert is_path(typed)


@pytest.mark.parametrize("typed", ["DAMO-NLP-SG/DiGIT", "facebook/dinov2-small", "google/vit", "dinov2_vits14", "vgg"])
def test_a_model_is_no_path(here, typed):
    assert not is_path(typed)
