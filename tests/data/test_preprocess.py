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
