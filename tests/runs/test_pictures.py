"""Masks that people paint, and the folders of completions and variations."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from digit.data.images import open_source
from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.runs.pictures import (
    dim_hidden,
    load_images,
    read_keep,
    read_mask,
    require_free,
    write_completions,
    write_variations,
)


def save(path, mask: np.ndarray, mode: str) -> None:
    if mode == "RGBA":
        pixels = np.full((*mask.shape, 4), 90, np.uint8)
        pixels[..., 3] = 255 * mask
        Image.fromarray(pixels, "RGBA").save(path)
    else:
        Image.fromarray((255 * mask).astype(np.uint8)).convert(mode).save(path)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "RGBA"])
def test_white_or_opaque_is_kept(tmp_path, mode):
    mask = np.ones((32, 32), bool)
    mask[8:16, 4:20] = False
    save(tmp_path / "mask.png", mask, mode)
    assert torch.equal(read_mask(tmp_path / "mask.png", 32), torch.from_numpy(mask))


def test_a_mask_is_cropped_as_its_picture_is(tmp_path):
    mask = np.zeros((64, 128), bool)
    mask[:, 64:] = True
    save(tmp_path / "mask.png", mask, "L")
    assert (
        read_mask(tmp_path / "mask.png", 32)[:, :16].sum() == 0 and read_mask(tmp_path / "mask.png", 32)[:, 16:].all()
    )


@pytest.mark.parametrize(("value", "told"), [(0, "keeps nothing"), (1, "keeps everything")])
def test_masks_that_say_nothing(tmp_path, value, told):
    save(tmp_path / "mask.png", np.full((8, 8), value, bool), "L")
    with pytest.raises(DigitError, match=told):
        read_mask(tmp_path / "mask.png", 32)


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_small_black_and_white_mask_is_one_however_far_it_is_enlarged(tmp_path, side, mode):
    mask = np.indices((side, side)).sum(0) % 2 == 0  # a chessboard
    save(tmp_path / "mask.png", mask, mode)
    cells = read_mask(tmp_path / "mask.png", 64)[64 // side // 2 :: 64 // side, 64 // side // 2 :: 64 // side]
    assert torch.equal(cells, torch.from_numpy(mask))


def test_a_photograph_is_no_mask(tmp_path):
    levels = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    Image.fromarray(levels).save(tmp_path / "photo.png")
    with pytest.raises(DigitError, match="is no mask: 7[0-9]% of its pixels are neither black nor white"):
        read_mask(tmp_path / "photo.png", 32)


@pytest.mark.parametrize("num", [0, -3])
def test_at_least_one_picture_is_read(num):
    with pytest.raises(DigitError, match=f"num is {num}: it must be at least 1"):
        load_images(open_source("shapes:num=4,size=32"), PreprocessConfig(image_size=32), num)


def test_what_keep_may_be(tmp_path):
    assert read_keep("0.25", 32) == 0.25 and read_keep("left", 32) == "left"
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DigitError, match="cannot be read as a mask"):
        read_keep(str(tmp_path / "text.png"), 32)
    with pytest.raises(DigitError, match="--keep nowhere.png: give a fraction, one of upper, .*, or the file"):
        read_keep("nowhere.png", 32)


def test_several_completions_of_each_picture_stand_in_one_row(tmp_path):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    kept = torch.zeros(16, 16, dtype=torch.bool)
    kept[:8] = True
    write_completions(tmp_path, images, images.repeat_interleave(2, 0), kept, {"keep": "upper"})
    assert len(list(tmp_path.glob("0*.png"))) == 6
    assert json.loads((tmp_path / "completions.json").read_text()) == {"num": 6, "each": 2, "keep": "upper"}
    width, height = Image.open(tmp_path / "grid.png").size
    assert width // 130 == 4 and height // 130 == 3  # original, kept part, two completions
    write_completions(tmp_path, images[:1], images[:1], kept, {"keep": 0.5})
    assert [path.name for path in tmp_path.glob("0*.png")] == ["00000.png"]
    hidden = dim_hidden(images, kept)
    assert torch.equal(hidden[:, :, :8], images[:, :, :8]) and hidden[:, :, 8:].min() >= 200


def test_variations_do_not_replace_completions(tmp_path):
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    write_variations(tmp_path, images, images.expand(4, -1, -1, -1), {"keep_vq": 0.0})
    require_free(tmp_path, "variations.json")
    with pytest.raises(DigitError, match="holds 00000.png but no completions.json"):
        require_free(tmp_path)
