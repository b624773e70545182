"""Images of more than 8 bits per channel come out as bright as they are, or are refused."""

import io
import warnings

import numpy as np
import pytest
from deep_files import png_16, tiff
from PIL import Image

from digit.data.decode import decode_image
from digit.data.pixel_range import PixelRange
from digit.errors import BadImageError

RAMP = np.linspace(0, 1, 32)[None].repeat(4, axis=0)  # (4, 32), from black to white
COLOURS = np.random.default_rng(0).random((6, 8, 3))
COLOURS[0, 0], COLOURS[0, 1] = 0, 1


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def deep(share: np.ndarray, white: int, dtype: type = np.uint16) -> np.ndarray:
    return np.rint(share * white).astype(dtype)


def assert_shows(data: bytes, share: np.ndarray, **how) -> None:
    """The decoded image is `share` of 255, in all three channels if it is grey."""
    found = np.asarray(decode_image(data, **how))
    np.testing.assert_allclose(found, 255 * (share if share.ndim == 3 else share[..., None]) + np.zeros(3), atol=1.01)


ALONE = {
    "10 bits in a PNG": (lambda: encode(Image.fromarray(deep(RAMP, 1023)), "PNG"), RAMP),
    "12 bits in a PNG": (lambda: encode(Image.fromarray(deep(RAMP, 4095)), "PNG"), RAMP),
    "14 bits in a TIFF": (lambda: tiff(deep(RAMP, 16383), order=">"), RAMP),
    "0..255 in 32 bits": (lambda: tiff(deep(RAMP, 255, np.int32)), RAMP),
    "a mask of 0 and 1": (lambda: encode(Image.fromarray(deep(RAMP > 0.5, 1)), "PNG"), RAMP > 0.5),
    "12 bits, colour, PNG": (lambda: png_16(deep(COLOURS, 4095)), COLOURS),
    "12 bits, colour, TIFF": (lambda: tiff(deep(COLOURS, 4095), 2), COLOURS),
    "12 bits, colour, packed TIFF": (lambda: tiff(deep(COLOURS, 4095), 2, deflate=True, order=">"), COLOURS),
    "12 bits, colour, planes": (lambda: tiff(deep(COLOURS, 4095), 2, planes=True), COLOURS),
    "12 bits, colour, PPM": (
        lambda: b"P6 8 6 65535\n" + deep(COLOURS, 4095).astype(">u2").tobytes(), COLOURS,
    ),
    "10 bits, colour, PPM as text": (
        lambda: b"P3 8 6 65535\n# c\n" + " ".join(map(str, deep(COLOURS, 1023).ravel())).encode(), COLOURS,
    ),
    "10 bits in a PGM of 65535": (lambda: b"P5 32 4 65535\n" + deep(RAMP, 1023).astype(">u2").tobytes(), RAMP),
}  # fmt: skip


@pytest.mark.parametrize("case", ALONE)
def test_an_image_alone_is_scaled_by_its_largest_value_with_a_warning(case):
    data, share = ALONE[case][0](), ALONE[case][1]
    with pytest.warns(UserWarning, match="white is taken to be"):
        assert_shows(data, share, name="scan.png")


STATED = {
    "sBIT of 12": (lambda: png_16(deep(RAMP / 2, 4095), (b"sBIT", b"\x0c")), RAMP / 2),
    "sBIT of 10, stretched as the standard asks": (
        lambda: png_16(deep(RAMP / 2, 1023) << 6, (b"sBIT", b"\x0a")), RAMP / 2,
    ),
    "sBIT of 12, colour": (lambda: png_16(deep(COLOURS / 3, 4095), (b"sBIT", b"\x0c\x0c\x0c")), COLOURS / 3),
    "12 bits per sample": (
        lambda: tiff(np.array([[0, 0x08, 0xFF]] * 2, dtype=np.uint8), tags={256: (4, (2,)), 258: (3, (12,))}),
        np.array([[0, 2303 / 4095]] * 2),
    ),
    "MaxSampleValue": (lambda: tiff(deep(RAMP / 2, 1023), tags={281: (3, (1023,))}), RAMP / 2),
    "SMaxSampleValue of floats": (
        lambda: tiff((RAMP / 2).astype(np.float32), tags={341: (11, (1.0,))}), RAMP / 2,
    ),
    "OME SignificantBits": (
        lambda: tiff(deep(RAMP / 2, 4095), tags={270: (2, b'<Pixels SignificantBits="12"/>\0')}), RAMP / 2,
    ),
    "PGM of 4095": (lambda: b"P5 32 4 4095\n" + deep(RAMP / 2, 4095).astype(">u2").tobytes(), RAMP / 2),
    "PPM of 1023": (lambda: b"P6 8 6 1023\n" + deep(COLOURS / 3, 1023).astype(">u2").tobytes(), COLOURS / 3),
    "JPEG 2000": (
        lambda: encode(Image.fromarray(deep(RAMP / 2, 65535)), "JPEG2000", irreversible=False), RAMP / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATED)
def test_what_the_file_states_comes_before_what_its_values_show(case):
    data, share = STATED[case][0](), STATED[case][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_shows(data, share)
        assert_shows(data, share, pixel_max=PixelRange(65535, "as other images show"))


def test_a_largest_value_that_is_a_statistic_is_no_range():
    with pytest.warns(UserWarning, match="white is taken to be 65535"):
        assert_shows(tiff(deep(RAMP, 1500), tags={281: (3, (1500,))}), RAMP * 1500 / 65535)


def test_pixel_max_comes_before_all_else():
    assert_shows(png_16(deep(RAMP / 2, 4095), (b"sBIT", b"\x0c")), RAMP / 4, pixel_max=8190)
    assert_shows(tiff(RAMP.astype(np.float32)), RAMP, pixel_max=1)
    assert_shows(tiff(deep(RAMP, 100_000, np.int32)), RAMP, pixel_max=100_000)
    assert_shows(tiff(deep(RAMP, 3_000_000_000, np.uint32)), RAMP, pixel_max=3_000_000_000)
    assert_shows(png_16(deep(COLOURS, 1000)), COLOURS, pixel_max=1000)


@pytest.mark.parametrize("channels, colour", [(2, [0]), (4, [0, 1, 2])])
@pytest.mark.parametrize("opaque", [4095, 65535])
def test_alpha_lies_over_white_whether_it_has_12_bits_or_16(channels, colour, opaque):
    values = deep(np.random.default_rng(1).random((5, 6, channels)), 4095)
    share = values[..., colour] / 4095
    values[..., -1] = opaque
    values[:, 3:, -1] = 0
    share[:, 3:] = 1
    share = share if channels == 4 else share[..., 0]
    assert_shows(png_16(values), share, pixel_max=4095)


def test_premultiplied_alpha():
    values = np.array([[[1000, 2000, 0, 2048]]], dtype=np.uint16)
    data = tiff(values, 2, order=">", tags={338: (3, (1,))})
    expected = values[..., :3] / 4095 + (1 - 2048 / 4095)
    assert_shows(data, expected, pixel_max=4095)


def test_a_transparent_colour_of_16_bits_is_white():
    values = np.array([[[500, 600, 700], [500, 600, 701]]], dtype=np.uint16)
    data = png_16(values, (b"tRNS", values[0, 0].astype(">u2").tobytes()))
    found = np.asarray(decode_image(data, pixel_max=1023))
    assert found[0, 0].tolist() == [255] * 3 and found[0, 1].tolist() == [125, 150, 175]


def test_full_range_is_reduced_as_before():
    values = np.random.default_rng(2).integers(0, 65536, (7, 9, 3)).astype(np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (png_16(values), tiff(values, 2), tiff(values, 2, deflate=True, order=">")):
            np.testing.assert_array_equal(np.asarray(decode_image(data)), values >> 8)
        grey = np.asarray(decode_image(tiff(values[..., 0])))[..., 0]
    np.testing.assert_array_equal(grey, (values[..., 0].astype(int) + 128) // 257)


@pytest.mark.parametrize("values", [deep(RAMP, 65535), RAMP.astype(np.float32)])
def test_white_may_be_zero(values):
    """X-rays: Pillow shows 16 bits and floats of this kind as negatives."""
    assert_shows(tiff(values, 0), 1 - RAMP, pixel_max=65535 if values.dtype == np.uint16 else 1)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_big_endian_packed_values_keep_their_byte_order(dtype):
    assert_shows(tiff(deep(RAMP, 1000, dtype), order=">", deflate=True), RAMP, pixel_max=1000)


def test_signed_bytes_are_signed():
    assert_shows(tiff(deep(RAMP, 127, np.int8)), deep(RAMP, 127) / 127, pixel_max=127)
    with pytest.raises(BadImageError, match=r"8-bit pixels -5\.\.122"):
        decode_image(tiff(deep(RAMP, 127, np.int8) - 5), pixel_max=127)


def test_16_bits_are_turned_upright():
    values = deep(RAMP[:2, :3], 65535)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(np.rot90(values))
    for data in (tiff(stored, tags={274: (3, (6,))}), encode(Image.fromarray(stored), "PNG", exif=exif)):
        assert_shows(data, values / 65535, pixel_max=65535)


REFUSED = {
    "floats": (tiff(RAMP.astype(np.float32)), None, "floating-point pixels 0.0..1.0 have no known range"),
    "negative": (tiff(deep(RAMP, 255, np.int32) - 7), None, "-7..248"),
    "beyond 16 bits": (tiff(deep(RAMP, 70000, np.int32)), None, "0..70000 have no known range"),
    "above pixel_max": (png_16(deep(RAMP, 5000)), 4095, r"0..5000, wanted 0..4095 \(as pixel_max says\)"),
    "above what the file states": (tiff(deep(RAMP, 1500), tags={281: (3, (1023,))}), None, "as the file states"),
    "above its source's": (png_16(deep(RAMP, 5000)), PixelRange(4095, "others"), r"0..5000, wanted 0..4095 \(others\)"),
    "far below its source's": (png_16(deep(RAMP, 1023)), PixelRange(65535, "others"), "nearly black if white is 65535"),
    "unlike all that were probed": (png_16(deep(RAMP, 4095)), PixelRange(None, "none"), "have no known range"),
    "not a number": (tiff(np.full((2, 2), np.nan, np.float32)), 1, "nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_outside_their_range_are_refused_with_the_option(case):
    data, pixel_max, message = REFUSED[case]
    with pytest.raises(BadImageError, match=message) as caught:
        decode_image(data, name="x.tif", pixel_max=pixel_max)
    assert str(caught.value).startswith("x.tif: ") and "--pixel_max" in str(caught.value)


def test_a_dark_image_is_taken_where_its_range_is_certain():
    dark, black = png_16(deep(RAMP, 200)), png_16(deep(RAMP, 0))
    assert_shows(dark, RAMP * 200 / 65535, pixel_max=65535)
    assert_shows(black, RAMP * 0, pixel_max=PixelRange(65535, "others"))
    assert_shows(png_16(deep(RAMP, 65535)), RAMP, pixel_max=PixelRange(None, "none"))
