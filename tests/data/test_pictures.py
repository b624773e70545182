"""Images as people bring them: one check for tensors, arrays, Pillow pictures and lists; anything else is one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from digit.data.pictures import as_images, as_output
from digit.data.preprocess import centre_crop, fit_batch
from digit.errors import DigitError
from digit.runtime.pixels import as_pixels, as_uint8

IMAGES = torch.randint(0, 256, (4, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ARRAY = IMAGES.permute(0, 2, 3, 1).numpy()  # (4, 8, 6, 3)
PICTURES = [Image.fromarray(picture) for picture in ARRAY]


def test_a_uint8_tensor_is_not_copied():
    assert as_images(IMAGES) is IMAGES and as_uint8(IMAGES) is IMAGES and as_pixels(IMAGES) is IMAGES


@pytest.mark.parametrize(
    "brought",
    [
        pytest.param(IMAGES.float() / 255, id="float 0..1"),
        pytest.param(IMAGES.double() / 255, id="double"),
        pytest.param((IMAGES.float() / 255).half(), id="half"),
        pytest.param((IMAGES.float() / 255).requires_grad_(), id="with a gradient"),
        pytest.param(ARRAY, id="array, channels last"),
        pytest.param(IMAGES.numpy(), id="array, channels first"),
        pytest.param(ARRAY / 255, id="float64 array"),
        pytest.param((ARRAY / 255).astype(">f4"), id="big-endian array"),
        pytest.param(ARRAY[:, ::-1][:, ::-1], id="array with strides"),
        pytest.param(np.frombuffer(ARRAY.tobytes(), np.uint8).reshape(ARRAY.shape), id="read-only array"),
        pytest.param(PICTURES, id="pictures"),
        pytest.param(tuple(PICTURES), id="tuple of pictures"),
        pytest.param(list(IMAGES), id="list of tensors"),
        pytest.param(list(ARRAY), id="list of arrays"),
        pytest.param([IMAGES[0], ARRAY[1], PICTURES[2], IMAGES[3].float() / 255], id="a bit of all"),
        pytest.param([picture.convert("RGBA") for picture in PICTURES], id="opaque RGBA"),
    ],
)
def test_every_kind_gives_the_same_images(brought):
    assert torch.equal(as_images(brought), IMAGES)


def test_pictures_become_rgb_as_files_do():
    grey, clear = Image.new("L", (4, 4), 100), Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert (as_images(grey) == 100).all() and (as_images([clear]) == 255).all()
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6  # shown upright, it is higher than wide
    assert as_images(turned).shape == (1, 3, 4, 2)


def test_no_images_stay_none():
    assert as_images(IMAGES[:0]).shape == (0, 3, 8, 6) and as_images(IMAGES[:0].float()).dtype == torch.uint8


@pytest.mark.parametrize(
    "brought, said",
    [
        (IMAGES.float(), "float32 from 0 to 255 of shape .*divide them by 255"),
        (IMAGES.float() / 127.5 - 1, r"float32 from -1 to 1 .*\(images \+ 1\) / 2"),
        (IMAGES.float() / 250 - 0.01, "from -0.01 to 1.01 .*clamp"),
        (IMAGES.float() * 1000, "scale them to 0..1"),
        (IMAGES.float() * float("nan"), "NaN and infinity"),
        (torch.full((1, 3, 2, 2), float("inf")), "NaN and infinity"),
        (IMAGES.long(), "int64 from 0 to 255 .*convert them to uint8"),
        (IMAGES.short() - 128, "int16 from -128 to 127 .*scale them"),
        (IMAGES > 127, "bool .*multiply by 255"),
        (IMAGES.to(torch.complex64), "complex64"),
        (ARRAY.astype(np.uint16) * 257, "uint16 from 0 to 65535 .*scale them to floats"),
        (ARRAY.astype(object), "array of object"),
        (IMAGES.permute(0, 2, 3, 1), r"channels last .*permute\(0, 3, 1, 2\)"),
        (IMAGES[0], r"\(3, 8, 6\), one image \(give a list of it\)"),
        (ARRAY[0], "one image"),
        (IMAGES[:, :1], "grey"),
        (torch.cat([IMAGES, IMAGES[:, :1]], 1), "with alpha"),
        (IMAGES[:, :2], r"\(4, 2, 8, 6\): wanted RGB"),
        (np.zeros((2, 3, 3, 3), np.uint8), "channels first or last"),
        ([], "no image"),
        ([IMAGES[0], IMAGES[0, :, :4]], "4 x 6, 8 x 6: wanted one or more images of one size"),
        ([IMAGES[0], IMAGES[1].float()], "image 1 of the list.*from [0-9] to 2"),
        ([IMAGES], r"image 0 of the list.*\(1, 4, 3, 8, 6\)"),
        ("cat.jpg", "'cat.jpg': wanted RGB"),
        (["cat.jpg"], "image 0 of the list is 'cat.jpg'"),
        (None, "images are None"),
        (Image.new("F", (4, 4)), "a picture of mode F has no known range"),
        (Image.new("I;16", (4, 4)), "a picture of mode I;16 has no known range"),
        ([Image.new("I", (4, 4))], "a picture of mode I has no known range"),
    ],
)
def test_anything_else_is_one_line(brought, said, unchecked):
    with pytest.raises(DigitError, match=said) as caught:
        as_images(brought)
    assert "\n" not in str(caught.value)


def test_floats_stay_floats_for_encoders():
    floats = IMAGES.float() / 255
    assert as_pixels(floats) is floats
    with pytest.raises(DigitError, match="from 0 to 255"):
        as_pixels(IMAGES.float())


def test_a_list_of_any_sizes_is_cropped_to_one():
    wide = Image.effect_noise((30, 20), 60).convert("RGB")
    crops = fit_batch([PICTURES[0], wide, ARRAY[1], IMAGES[2]], 6)
    assert crops.shape == (4, 3, 6, 6)
    np.testing.assert_array_equal(crops[1].permute(1, 2, 0).numpy(), centre_crop(wide, 6))
    assert torch.equal(crops[2:], fit_batch(IMAGES[1:3], 6))


def test_images_go_out_as_they_are_asked_for(unchecked):
    assert as_output(IMAGES, "torch") is IMAGES
    np.testing.assert_array_equal(as_output(IMAGES, "numpy"), ARRAY)
    pictures = as_output(IMAGES, "pil")
    assert pictures == PICTURES and torch.equal(as_images(pictures), IMAGES)
    with pytest.raises(DigitError, match="output is 'PIL': did you mean pil\\?|choose torch, numpy, pil"):
        as_output(IMAGES, "PIL")
