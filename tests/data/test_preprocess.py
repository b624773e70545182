"""The one preprocessing: sizes, the two released paths, and randomness as a pure function of (seed, index, crop)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from digit.data.preprocess import (
    PreprocessConfig,
    centre_crop,
    crop_image,
    fit_batch,
    kept_share,
    place_crop,
    resize_short_side,
    resized_size,
)
from digit.errors import BadImageError, DigitError

CFG = PreprocessConfig(image_size=16, encoder_size=12)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_long_side_is_truncated_as_released():
    assert resized_size(500, 375, 256) == (341, 256)  # 341.33
    assert resized_size(375, 500, 256) == (256, 341)
    assert resized_size(3, 2, 7) == (10, 7)  # 10.5
    assert resized_size(64, 64, 64) == (64, 64)


def test_a_picture_of_the_right_size_is_untouched():
    image = picture(16, 23)
    assert resize_short_side(image, 16) is image


def test_released_is_pil_bicubic_then_a_crop():
    resized = np.asarray(picture().resize((21, 16), Image.Resampling.BICUBIC))
    left, top, flipped = place_crop(21, 16, CFG, seed=3, index=5, crop=2)
    wanted = resized[top : top + 16, left : left + 16]
    got = crop_image(picture(), CFG, seed=3, index=5, crop=2)
    np.testing.assert_array_equal(got, wanted[:, ::-1] if flipped else wanted)
    assert got.shape == (16, 16, 3) and got.dtype == np.uint8


def test_paths_have_their_own_crop_size():
    assert CFG.crop_size == 16 and replace(CFG, path="released_kmeans").crop_size == 12
    assert crop_image(picture(), replace(CFG, path="released_kmeans"), seed=0, index=0, crop=0).shape == (12, 12, 3)
    assert PreprocessConfig().crop_size == 256 and PreprocessConfig(path="released_kmeans").crop_size == 224


def test_centre_crop_rounds_as_released():
    resized = np.asarray(picture(19, 16))
    centre = replace(CFG, random_crop=False, flip=False)
    wanted = resized[:, 2:18]  # round((19 - 16) / 2) = round(1.5) = 2
    for crop in (-1, 0, 7):
        np.testing.assert_array_equal(crop_image(picture(19, 16), centre, seed=9, index=1, crop=crop), wanted)
    np.testing.assert_array_equal(crop_image(picture(19, 16), CFG, seed=9, index=1, crop=-1), wanted)
    np.testing.assert_array_equal(centre_crop(picture(19, 16), 16), wanted)


def test_places_depend_on_seed_index_and_crop_alone():
    def places(seed, index=0, crop=0):
        return place_crop(400, 300, CFG, seed=seed, index=index, crop=crop)

    assert places(1, 2, 3) == places(1, 2, 3)
    grid = {places(seed, index, crop) for seed in (0, 1, -1) for index in range(20) for crop in range(20)}
    assert len(grid) > 1150  # of 1200: they are different samples, not shifted copies of one


def test_places_are_uniform_and_reach_the_borders():
    crops = [place_crop(18, 16, CFG, seed=0, index=i, crop=0) for i in range(3000)]
    lefts = np.bincount([left for left, _, _ in crops], minlength=3)
    flips = sum(flipped for *_, flipped in crops)
    assert len(lefts) == 3 and lefts.min() > 900 and 1400 < flips < 1600
    assert {top for _, top, _ in crops} == {0}


def test_flip_and_random_crop_can_be_switched_off_alone():
    only_crop, only_flip = replace(CFG, flip=False), replace(CFG, random_crop=False)
    crops = [place_crop(99, 16, only_crop, seed=0, index=i, crop=0) for i in range(50)]
    assert len({left for left, _, _ in crops}) > 20 and not any(flipped for *_, flipped in crops)
    crops = [place_crop(99, 16, only_flip, seed=0, index=i, crop=0) for i in range(50)]
    assert len({left for left, _, _ in crops}) == 1 and {flipped for *_, flipped in crops} == {True, False}


def test_a_line_of_pixels_is_refused_before_it_fills_memory():
    with pytest.raises(BadImageError, match="too long and thin"):
        crop_image(Image.new("RGB", (200_000, 1)), PreprocessConfig(), seed=0, index=0, crop=0)


def test_one_pixel_becomes_a_crop():
    assert (crop_image(Image.new("RGB", (1, 1), (9, 8, 7)), CFG, seed=0, index=0, crop=0) == (9, 8, 7)).all()


def test_wrong_configs_are_refused(unchecked):
    with pytest.raises(DigitError, match="path is 'other': it must be released or released_kmeans"):
        PreprocessConfig(path="other")
    with pytest.raises(DigitError, match="image_size is 0"):
        PreprocessConfig(image_size=0)


def test_fit_batch_brings_any_batch_to_size():
    images = torch.from_numpy(np.asarray(picture(40, 30)).transpose(2, 0, 1).copy())[None]
    fitted = fit_batch(images, 16)
    assert fitted.shape == (1, 3, 16, 16) and fitted.dtype == torch.uint8
    np.testing.assert_array_equal(fitted[0].permute(1, 2, 0).numpy(), centre_crop(picture(40, 30), 16))
    assert fit_batch(fitted, 16) is fitted
    assert fit_batch(images[:0], 16).shape == (0, 3, 16, 16)
    for wrong in (images.float(), images[0], images[:, :1]):
        with pytest.raises(DigitError, match=r"wanted RGB images \(B, 3, H, W\), uint8"):
            fit_batch(wrong, 16)


# -------------------------------------------------------------------- pictures that are not square


def test_squeeze_is_one_resize_of_the_whole_picture():
    cfg = replace(CFG, fit="squeeze", flip=False)
    wanted = np.asarray(picture().resize((16, 16), Image.Resampling.BICUBIC))
    for crop in (-1, 0, 3):
        np.testing.assert_array_equal(crop_image(picture(), cfg, seed=1, index=2, crop=crop), wanted)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (7, 100), (100, 1), (16, 16), (17, 16)])
def test_pad_keeps_the_whole_picture_between_bars_of_its_edges_colour(width, height):
    cfg = replace(CFG, fit="pad", flip=False)
    got = crop_image(picture(width, height), cfg, seed=0, index=0, crop=0)
    inner = [max(1, round(side * 16 / max(width, height))) for side in (width, height)]
    whole = np.asarray(picture(width, height).resize(inner, Image.Resampling.BICUBIC))
    left, top = (16 - inner[0]) // 2, (16 - inner[1]) // 2
    np.testing.assert_array_equal(got[top : top + inner[1], left : left + inner[0]], whole)
    if top:
        assert (got[0] == whole[0].mean(0).round()).all() and (got[-1] == whole[-1].mean(0).round()).all()
    if left:
        assert (got[:, 0] == whole[:, 0].mean(0).round()).all() and (got[:, -1] == whole[:, -1].mean(0).round()).all()


def test_only_mirroring_is_left_where_nothing_is_cut():
    cfg = replace(CFG, fit="pad")
    plain = crop_image(picture(), replace(cfg, flip=False), seed=0, index=0, crop=0)
    crops = [crop_image(picture(), cfg, seed=0, index=0, crop=crop) for crop in range(8)]
    assert all(np.array_equal(crop, plain) or np.array_equal(crop, plain[:, ::-1]) for crop in crops)
    assert cfg.distinct_crops == 2 and replace(cfg, flip=False).deterministic and CFG.distinct_crops is None


def test_the_shares_that_are_kept():
    assert kept_share(40, 30, "crop") == kept_share(30, 40, "crop") == 0.75
    assert kept_share(40, 30, "pad") == kept_share(40, 30, "squeeze") == kept_share(9, 9, "crop") == 1


def test_the_released_way_is_described_as_before():
    assert "fit" not in CFG.described() and replace(CFG, fit="pad").described()["fit"] == "pad"


def test_a_batch_is_fitted_as_a_crop_is():
    batch = torch.from_numpy(np.asarray(picture()).transpose(2, 0, 1)[None].copy())
    got = fit_batch(batch, 16, "pad")[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(got, crop_image(picture(), replace(CFG, fit="pad"), seed=0, index=0, crop=-1))
