"""What decoding assumes, drops or ignores is counted by `digit inspect`."""

import io
import json

import numpy as np
import pytest
from deep_files import png_16, tiff
from PIL import Image, ImageCms

from digit.data.assumptions import describe_image, is_nearly_black
from digit.data.decode import decode_image
from digit.data.images import open_source
from digit.data.inspect import inspect_source

GREY = np.zeros((2, 2), dtype=np.uint16)
FIRST, UPRIGHT = "several frames or pages: the first is used", "an EXIF orientation: turned upright"
WHITE, CMYK = "transparency: it lies over white", "CMYK: converted without a colour profile"
PROFILE, GAMMA = "a colour profile (ICC) other than sRGB: ignored", "a PNG gamma other than 1/2.2: ignored"
DEEP = "more than 8 bits per channel, of which 8 are used"


def find_assumptions(data: bytes) -> list[str]:
    return describe_image(data)[1]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def flat(mode: str = "RGB", colour: int | tuple = 0) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def profile(name: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def without_adobe_marker(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")  # APP14
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_or_page(kind):
    frames = [flat(colour=(shade, 0, 0)) for shade in (10, 200)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert find_assumptions(data) == [FIRST] and decode_image(data).getpixel((0, 0))[0] < 20


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation(kind):
    assert find_assumptions(encode(flat(), kind, exif=exif(6))) == [UPRIGHT]
    assert find_assumptions(encode(flat(), kind, exif=exif(1))) == []


def test_transparency():
    for data in (encode(flat("RGBA"), "PNG"), encode(flat("LA"), "PNG"), encode(flat("P"), "GIF", transparency=0)):
        assert find_assumptions(data) == [WHITE]
    for mode in ("1", "L", "P", "RGB"):
        assert find_assumptions(encode(flat(mode), "PNG")) == []


def test_profiles_and_gamma():
    assert find_assumptions(encode(flat(), "JPEG", icc_profile=profile("XYZ"))) == [PROFILE]
    assert find_assumptions(encode(flat(), "PNG", icc_profile=profile("sRGB"))) == []
    assert find_assumptions(png_16(GREY, (b"gAMA", (100_000).to_bytes(4, "big")))) == [DEEP, GAMMA]
    assert find_assumptions(png_16(GREY, (b"gAMA", (45_455).to_bytes(4, "big")))) == [DEEP]


def test_printed_and_laboratory_colours():
    assert find_assumptions(encode(flat("CMYK"), "TIFF")) == [CMYK]
    marked = encode(flat("CMYK"), "JPEG")
    assert find_assumptions(marked) == [CMYK]
    unmarked = find_assumptions(without_adobe_marker(marked))
    assert len(unmarked) == 2 and "without Adobe's marker" in unmarked[1]
    lab = tiff(np.array([[[136, 81, 70]]], dtype=np.uint8), 8)  # the red of sRGB: L 53, a 81, b 70
    assert find_assumptions(lab) == ["CIE Lab: converted to sRGB"]
    np.testing.assert_allclose(decode_image(lab).getpixel((0, 0)), (254, 0, 0), atol=6)


def test_deep_pixels_and_further_channels():
    stated = f"{DEEP}, by the range that the file states"
    assert find_assumptions(tiff(GREY)) == [DEEP]
    assert find_assumptions(png_16(GREY, (b"sBIT", b"\x0c"))) == [stated]
    assert find_assumptions(b"P5 2 2 4095\n" + bytes(8)) == [stated]
    four = np.zeros((2, 2, 4), dtype=np.uint8)
    assert find_assumptions(tiff(four, 2, tags={338: (3, (0,))})) == [
        "channels that are neither colour nor alpha: left out"
    ]


def test_nearly_black():
    assert is_nearly_black(flat(colour=(16, 0, 3))) and not is_nearly_black(flat(colour=(0, 17, 0)))


def test_inspect_counts_each_kind_and_says_what_is_white(tmp_path):
    for number in range(2):
        encoded = encode(flat(), "GIF", save_all=True, append_images=[flat(colour=(9, 9, 9))])
        (tmp_path / f"{number}.gif").write_bytes(encoded)
    (tmp_path / "x.png").write_bytes(png_16(np.array([[0, 4095]], dtype=np.uint16)))
    (tmp_path / "y.png").write_bytes(encode(flat("RGBA", (255, 255, 255, 9)), "PNG"))
    report = inspect_source(open_source(tmp_path))
    assert report.assumed[FIRST] == 2 and report.assumed[WHITE] == report.assumed[DEEP] == 1
    text = report.to_text()
    assert f"assumed      2 with {FIRST}" in text
    assert "white        pixels of more than 8 bits: white is 4095 (largest value of 1 image probed: 4095)" in text
    found = json.loads(json.dumps(report.to_dict()))
    assert found["assumed"][WHITE] == 1 and "4095" in found["pixel_range"]
