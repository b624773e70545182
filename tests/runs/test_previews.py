"""Pictures of a model in training: they change no bit of it, cost a bounded share, and end without ending it."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import SHAPES, pixel_recipe, tiny_recipe

from digit.runs import previews
from digit.runs.fit import Run, fit
from digit.runs.previews import Previews, grids_of, mean_patches, mosaic, previews_html, spread_over
from digit.runtime.files import load_tensors


def often(recipe, share: float):
    """Saved, and so shown, after every second update."""
    parts = ("vqgan_training", "prior_training", "renderer_training", "pixels_training")
    return replace(recipe, previews=share, **{part: replace(getattr(recipe, part), save_every=2) for part in parts})


@pytest.fixture
def always(monkeypatch):
    """No picture waits, whatever its share of the time."""
    monkeypatch.setattr(Previews, "last", property(lambda self: 0.0, lambda self, value: None), raising=False)


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("without")
    fit(Run(often(tiny_recipe(), 0.0), SHAPES, out))
    return out


def test_previews_change_no_weight(always, without, tmp_path):
    fit(Run(often(tiny_recipe(), 1.0), SHAPES, tmp_path))
    assert not (without / "previews").exists()
    for name in ("vqgan/vqgan", "prior/model", "renderer/model"):
        one, two = (load_tensors(out / f"{name}.safetensors") for out in (without, tmp_path))
        assert one.keys() == two.keys() and all(torch.equal(two[key], value) for key, value in one.items()), name
    for stage, steps in (("vqgan", [2, 3]), ("prior", [2, 4]), ("renderer", [2, 4])):
        assert [step for step, _ in grids_of(tmp_path / "previews", stage)] == steps
        grown = Image.open(tmp_path / "previews" / f"{stage}_growth.png")
        rows = len(steps) + (stage == "vqgan")  # the pictures stand below their reconstructions
        assert grown.height == 2 + rows * (96 + 2) and grown.width == 56 + 8 * (96 + 2)
    page = previews_html(tmp_path)
    assert "How it grew" in page and 'src="previews/prior_growth.png"' in page and "prior_00000004.png" in page
    assert previews_html(without) == ""


@pytest.mark.parametrize(
    "recipe", [pixel_recipe(), tiny_recipe(renderer_kind="masked"), tiny_recipe(class_conditional=False)]
)
def test_every_kind_of_renderer_is_shown(always, tmp_path, recipe):
    run = Run(often(recipe, 1.0), SHAPES, tmp_path)
    fit(run)
    name = run.recipe.model_names[1]
    assert [step for step, _ in grids_of(tmp_path / "previews", name)] == [2, 4]


def test_a_vq_only_model_is_shown(always, tmp_path):
    run = Run(often(tiny_recipe(), 1.0), SHAPES, tmp_path)
    run.train_model("vq_ar_epochs")
    assert len(grids_of(tmp_path / "previews", "vq_ar_epochs")) == 2


def test_a_picture_waits_until_its_share_allows_it(without, tmp_path):
    run = Run(often(tiny_recipe(), 0.1), SHAPES, tmp_path, reuse={"vqgan": without / "vqgan"})
    shown, vqgan = Previews(run, "vqgan", 100), run.train_vqgan().vqgan
    assert shown(vqgan, 1), "the first never waits"
    shown.spent = shown.last = 1.0
    assert shown(vqgan, 2) == {}, "a tenth of no time"
    shown.started = time.monotonic() - 21.0
    assert shown(vqgan, 3)
    shown.spent = shown.last = 100.0
    assert shown(vqgan, 99) == {} and shown(vqgan, 100), "the last never waits"
    assert [step for step, _ in grids_of(tmp_path / "previews", "vqgan")] == [1, 3, 100]


def test_an_error_ends_the_pictures_and_not_the_training(tmp_path, monkeypatch, caplog):
    def broken(previews, network):
        raise RuntimeError("out of paint")

    monkeypatch.setitem(previews.ROWS, "prior", broken)
    run = Run(often(tiny_recipe(), 1.0), SHAPES, tmp_path)
    model = run.train_model("prior")
    assert run.is_done("prior") and model is not None
    assert caplog.text.count("no more previews of prior: out of paint") == 1


def test_the_parameters_stay_trainable(without, tmp_path):
    run = Run(often(tiny_recipe(), 1.0), SHAPES, tmp_path, reuse={"vqgan": without / "vqgan"})
    vqgan = run.train_vqgan().vqgan
    first = next(vqgan.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in vqgan.parameters()]
    assert Previews(run, "vqgan", 100)(vqgan, 1) and [p.requires_grad for p in vqgan.parameters()] == flags
    assert not first.requires_grad


def test_tensorboard_shows_them(always, tmp_path):
    pytest.importorskip("tensorboard")
    Run(often(tiny_recipe(), 1.0), SHAPES, tmp_path).train_model("prior")
    (events,) = (tmp_path / "prior" / "tensorboard").glob("events*")
    assert events.read_bytes().count(b"previews/prior") == 2 and b"\x89PNG" in events.read_bytes()


def test_a_code_is_shown_as_the_mean_of_its_patches(without):
    patches = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2) * 100
    tokens = torch.tensor([[0, 1, 2, 0]])
    shown = mosaic(tokens, (2, 2), patches, 4)
    assert shown.shape == (1, 3, 4, 4) and shown[0, 0, ::2, ::2].tolist() == [[0, 100], [200, 0]]
    run = Run(often(tiny_recipe(), 0.0), SHAPES, without)
    found = mean_patches(run)
    assert found.shape == (12, 3, 16, 16) and found.min() >= 0 and found.max() <= 255
    store = run.write_tokens()
    first = run.crops_of(torch.arange(len(store)).numpy())[:, :, :16, :16].float()
    codes = torch.from_numpy(store.discriminative[:, 0].astype(int))
    only = [
        code for code in codes.unique() if not (torch.from_numpy(store.discriminative[:, 1:].astype(int)) == code).any()
    ]
    for code in only:  # codes that stand in the upper left corner alone
        assert torch.allclose(found[code], first[codes == code].mean(0), atol=1e-3)


def test_the_strip_keeps_the_first_and_the_last():
    found = [(step, Path(f"{step}.png")) for step in range(1, 31)]
    chosen = spread_over(found, 8)
    assert len(chosen) == 8 and chosen[0] == found[0] and chosen[-1] == found[-1]
    assert spread_over(found[:3], 8) == found[:3] and spread_over([], 8) == []
