"""Pixels of more than 8 bits per channel: which images have them, which value is white, and their reduction to 8 bits.

The white of an image is, in this order: what the user says, what its file states, what the other images of its source
show (`PixelRange`), and 65535. Pillow alone keeps the upper 8 of 16 bits: values of 12 bits would come out black.
"""

import io
import re
import warnings
from collections.abc import Callable
from sys import byteorder
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from digit.data.pixel_range import FULL, PixelRange, usual_white
from digit.errors import BadImageError

RAW_16 = re.compile(r"(LA|RGB|RGBA|RGBa|RGBX|CMYK);16([BLN])")  # Pillow's names of 16 bits in several channels
NATIVE = {"I;32BS": "I;32NS", "I;16BS": "I;16NS", "F;32BF": "F;32NF"}  # libtiff swaps the bytes, Pillow would again
BITS, PHOTOMETRIC, DESCRIPTION, PLANAR, FORMAT, LARGEST = 258, 262, 270, 284, 339, (281, 341)  # tags of TIFF
WHITE_IS_ZERO, SIGNED, PLANES = 0, 2, 2  # values of these tags
WITH_ALPHA = ("LA", "RGBA", "RGBa")
SIGNIFICANT_BITS = re.compile(r'SignificantBits="(\d{1,2})"')  # in the description of an OME-TIFF
PNG_SIGNATURE = 8  # bytes
ADVICE = "give --pixel_max, the value of white"
Stream = io.BytesIO | io.BufferedReader


def is_deep(image: ImageFile) -> bool:
    """Whether an opened image, of which only the header has been read, holds more than 8 bits or signed values."""
    if image.format == "TIFF":
        return max(_tags(image).get(BITS, (1,))) > 8 or SIGNED in _tags(image).get(FORMAT, ())
    raw, maxval = _arguments(image)
    if image.format == "PPM" and image.mode == "RGB":
        return maxval == FULL  # Pillow scales a smaller one to 255
    return image.mode in ("I", "F") or image.mode.startswith("I;") or bool(RAW_16.fullmatch(raw))


def states_white(image: ImageFile, stream: Stream) -> int | None:
    """The white of Pillow's values that a deep image's header states; None if it states none.

    PNG's sBIT is the number of significant bits: see `reduce`.
    """
    if image.format == "JPEG2000":
        return FULL  # Pillow scales values by the precision of the header
    if image.format == "PPM":
        _, maxval = _arguments(image)
        return FULL if maxval not in (None, FULL) else None  # Pillow scales values by maxval
    if image.format == "PNG":
        bits = _significant_bits(stream)
        return 2**bits - 1 if bits and bits < 16 else None
    bits = max(_tags(image).get(BITS, (1,)))
    if found := SIGNIFICANT_BITS.search(str(_tags(image).get(DESCRIPTION, ""))):
        bits = int(found[1])
    if bits in range(9, 16):
        return 2**bits - 1
    values = [value for tag in LARGEST for value in np.atleast_1d(_tags(image).get(tag, ()))]
    whole = [int(value) for value in values if value >= 1 and value == int(value)]
    return next((value for value in whole if value & (value + 1) == 0), None)  # 2**n - 1; others are statistics


def largest_value(image: ImageFile, stream: Stream) -> int:
    """The largest value of a deep image's colours."""
    return int(_colours(read_values(image, stream), _reduced_mode(image)).max())


def reduce(image: ImageFile, stream: Stream, pixel_max: int | PixelRange | None, name: str) -> Image.Image:
    """Decodes a deep image to 8 bits, of mode L, LA, RGB, RGBA, RGBa or CMYK; 0..white becomes 0..255, rounded.

    Raises BadImageError where no white is known, and for values below 0 or above white.
    """
    values, mode = read_values(image, stream), _reduced_mode(image)
    shown, stated = _colours(values, mode), states_white(image, stream)
    if image.format == "PNG" and stated and _fills_16_bits(shown, stated.bit_length()):
        stated = FULL
    white = _white(shown, stated, pixel_max, name)
    eight = _scaled(values, white, truncate=values.ndim == 3 and image.format != "PPM")
    if mode in WITH_ALPHA and values[..., -1].max() > white:
        eight[..., -1] = _scaled(values[..., -1], FULL, truncate=True)  # the colours alone have fewer bits
    if _tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        eight = 255 - eight
    if (clear := image.info.get("transparency")) is not None:
        eight[values == clear if values.ndim == 2 else (values == clear).all(-1)] = 255
    reduced = Image.frombytes(mode, eight.shape[1::-1], np.ascontiguousarray(eight).tobytes())
    if image.format == "PNG" and "exif" in image.info:  # Pillow itself turns a TIFF upright
        reduced.info["exif"] = image.info["exif"]
    return reduced


# ---------------------------------------------------------------- which value is white


def _white(values: np.ndarray, stated: int | None, pixel_max: int | PixelRange | None, name: str) -> int:
    """The white of an image; BadImageError where none is known or values lie outside 0..white."""
    low, high = values.min().item(), values.max().item()
    kind = "floating-point" if values.dtype.kind == "f" else f"{8 * values.dtype.itemsize}-bit"
    if isinstance(pixel_max, int):
        pixel_max = PixelRange(pixel_max, "as pixel_max says", given=True)
    if pixel_max and pixel_max.given:
        white, reason = pixel_max.white, pixel_max.reason
    elif stated:
        white, reason = stated, "as the file states"
    elif kind == "floating-point":
        white, reason = None, ""
    elif pixel_max and (pixel_max.white or high <= FULL // 2):
        white, reason = pixel_max.white, pixel_max.reason
    else:
        white, reason = _white_of_one(int(high), None if pixel_max else name), "no depth of more bits is usual"
    if white is None:
        raise BadImageError(f"{kind} pixels {low}..{high} have no known range: {ADVICE}, or save it with 8 bits")
    if not (low >= 0 and high <= white):  # NaN too
        raise BadImageError(f"{kind} pixels {low}..{high}, wanted 0..{white} ({reason}): {ADVICE}")
    if pixel_max and pixel_max.misses(high) and not (pixel_max.given or stated):
        raise BadImageError(
            f"{kind} pixels {low}..{high}, nearly black if white is {white} ({reason}): give --pixel_max {white} if "
            "they are meant to be, or keep images of another range in a folder of their own and give theirs"
        )
    return white


def _white_of_one(largest: int, name: str | None) -> int | None:
    """The white of an image of which nothing else is known, and with a name, a warning where that is a guess."""
    white = usual_white(largest)
    if white is not None and 2 * largest <= white:
        white = FULL  # not even near a usual white
    if name and white and 0 < largest <= FULL // 2:
        text = f"{name}: pixels of more than 8 bits, white is taken to be {white} (largest value: {largest})"
        warnings.warn(f"{text}; decode_image(..., pixel_max=N) says otherwise", stacklevel=5)
    return white


def _significant_bits(stream: Stream) -> int | None:
    """The largest number in a PNG's sBIT, which stands before its pixels; None without one."""
    before = stream.tell()
    try:
        stream.seek(PNG_SIGNATURE)
        while len(head := stream.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind in (b"IDAT", b"IEND"):
                return None
            if kind == b"sBIT":
                return max(stream.read(min(length, 4)), default=0)
            stream.seek(length + 4, 1)  # and the checksum
        return None
    finally:
        stream.seek(before)  # where Pillow reads on


def _fills_16_bits(values: np.ndarray, bits: int) -> bool:
    """Whether values of so many bits were stretched to 16, as the PNG standard asks; many programs do not."""
    top = values >> (16 - bits)
    repeated = top << (16 - bits) | top >> max(0, 2 * bits - 16)
    return bool(((values == top << (16 - bits)) | (values == repeated)).all() or (values >> bits).any())


# ---------------------------------------------------------------- all bits of the values


def read_values(image: ImageFile, stream: Stream) -> np.ndarray:
    """Decodes all bits of a deep image: integers or float32, (H, W) of grey or (H, W, C) in the order of its mode."""
    raw, _ = _arguments(image)
    if image.format == "PPM" and image.mode == "RGB":
        return _ppm_values(image, stream)
    if match := RAW_16.fullmatch(raw):
        base = match[1].replace("a", "A")  # premultiplied values are read as they stand
        if base == "LA":
            four = _decode(image, stream, "RGBA").astype(np.uint16)  # (H, W, 4): both bytes of L, both of A
            return four[..., ::2] << 8 | four[..., 1::2]
        return _two_bytes(image, stream, match[2], lambda _, order: f"{base};16{order}")
    if _tags(image).get(PLANAR) == PLANES and image.mode not in ("L", "I", "F", "I;16", "I;16B"):
        order = "L" if _tags(image).prefix == b"II" else "B"
        return _two_bytes(image, stream, order, lambda raw, order: f"{raw};16{order}")  # Pillow would read 8 of 16 bits
    values = _decode(image, stream, NATIVE.get(raw, raw) if image.tile[0][0] == "libtiff" else raw)
    kind = np.uint32 if raw == "I;32N" else np.int8 if values.dtype == np.uint8 else values.dtype
    return values.view(kind)  # Pillow forgets the sign


def _two_bytes(image: ImageFile, stream: Stream, order: str, raw_mode: Callable[[str, str], str]) -> np.ndarray:
    """(H, W, C) uint16, decoded twice: Pillow keeps the upper byte of each value, in the other byte order the lower."""
    order = {"little": "L", "big": "B"}[byteorder] if order == "N" else order
    other = "B" if order == "L" else "L"
    upper = _decode(image, stream, lambda raw: raw_mode(raw, order)).astype(np.uint16)
    return upper << 8 | _decode(image, stream, lambda raw: raw_mode(raw, other))


def _decode(image: ImageFile, stream: Stream, raw_mode: str | Callable[[str], str]) -> np.ndarray:
    """Decodes the file with another of Pillow's raw modes; a function gives it for each tile's own."""
    stream.seek(0)
    with Image.open(stream, formats=[image.format or ""]) as again:
        again.tile = [tile._replace(args=_renamed(tile.args, raw_mode)) for tile in again.tile]
        again.load()
        image.info.update(again.info)  # what stands behind the pixels, such as EXIF
        return np.array(again)


def _renamed(args: Any, raw_mode: str | Callable[[str], str]) -> Any:
    """A tile's arguments, a raw mode alone or a tuple that begins with it, with another raw mode."""
    old = args if isinstance(args, str) else args[0]
    new = raw_mode if isinstance(raw_mode, str) else raw_mode(old)
    return new if isinstance(args, str) else (new, *args[1:])


def _ppm_values(image: ImageFile, stream: Stream) -> np.ndarray:
    """(H, W, 3) uint16 of a PPM, binary (P6) or as text (P3). Raises ValueError if it is cut short."""
    width, height = image.size
    stream.seek(image.tile[0][2])
    count, data = 3 * width * height, stream.read()
    if image.tile[0][0] == "ppm_plain":
        values = np.array(re.sub(rb"#[^\r\n]*", b"", data).split()[:count], dtype=np.uint16)
    else:
        values = np.frombuffer(data, ">u2", count)
    return values.reshape(height, width, 3).astype(np.uint16)


def _arguments(image: ImageFile) -> tuple[str, Any]:
    """(raw mode, maxval of a PPM or None) that Pillow found in the header."""
    args = (image.tile[0][3] if image.tile else None) or ""
    if isinstance(args, str):
        return args, None
    return str(args[0]), args[1] if image.format == "PPM" and len(args) == 2 else None


def _tags(image: ImageFile) -> Any:
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _reduced_mode(image: ImageFile) -> str:
    raw, _ = _arguments(image)
    if match := RAW_16.fullmatch(raw):
        return "RGB" if match[1] == "RGBX" else match[1]
    return "L" if image.mode in ("F", "L") or image.mode.startswith("I") else image.mode


def _colours(values: np.ndarray, mode: str) -> np.ndarray:
    return values[..., :-1] if mode in WITH_ALPHA else values


def _scaled(values: np.ndarray, white: int, *, truncate: bool) -> np.ndarray:
    """uint8; `truncate` keeps the upper byte of 16 bits, as Pillow does with several channels."""
    if white == FULL and truncate:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind == "f":
        return np.rint(values * (255 / white)).astype(np.uint8)
    wide = np.minimum(values, white).astype(np.uint32 if white <= FULL else np.uint64)
    return ((wide * 255 + white // 2) // white).astype(np.uint8)
