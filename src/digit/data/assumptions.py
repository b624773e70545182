"""What decoding assumes, drops or ignores in an image, as `digit inspect` says and counts it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from digit.data import deep_pixels, pixel_range
from digit.data.decode import EXIF_ORIENTATION, read_header
from digit.data.deep_pixels import Stream

NEARLY_BLACK = f"no value above {pixel_range.NEARLY_BLACK} of 255: nearly black"
SRGB = (b"sRGB", "sRGB".encode("utf-16-be"))  # in the name of a profile
STANDARD_GAMMA = 0.45455  # 1 / 2.2
EXTRA_SAMPLES, UNSPECIFIED = 338, 0  # a tag of TIFF and its value for channels that are neither colour nor alpha


def describe_image(data: bytes | str | Path) -> tuple[str, list[str]]:
    """('JPEG RGB' as stored, phrases such as 'several frames or pages: the first is used'), by the header.

    Raises BadImageError without one.
    """

    def describe(image: ImageFile, stream: Stream) -> tuple[str, list[str]]:
        kind = f"{image.format or '?'} {image.mode}"  # before the assumptions, which may read further
        return kind, list(_assumptions(image, stream))

    return read_header(data, describe)


def is_nearly_black(image: Image.Image) -> bool:
    """Whether a decoded image is too dark to show anything, as where its white is not the one assumed."""
    return int(np.max(image.getextrema())) <= pixel_range.NEARLY_BLACK


def _assumptions(image: ImageFile, stream: Stream) -> Iterator[str]:
    tags = image.tag_v2 if image.format == "TIFF" else {}  # pyright: ignore[reportAttributeAccessIssue]
    if deep_pixels.is_deep(image):
        stated = deep_pixels.states_white(image, stream)
        yield f"more than 8 bits per channel, of which 8 are used{', by the range that the file states' * bool(stated)}"
    if image.has_transparency_data:
        yield "transparency: it lies over white"
    if image.mode == "CMYK":
        yield "CMYK: converted without a colour profile"
        if image.format == "JPEG" and "adobe" not in image.info:
            yield "CMYK in a JPEG without Adobe's marker: read as Adobe writes it, 255 for no ink"
    if image.mode == "LAB":
        yield "CIE Lab: converted to sRGB"
    if UNSPECIFIED in tags.get(EXTRA_SAMPLES, ()):
        yield "channels that are neither colour nor alpha: left out"
    yield from _ignored(image)
    if getattr(image, "is_animated", False):
        yield "several frames or pages: the first is used"


def _ignored(image: ImageFile) -> Iterator[str]:
    profile = image.info.get("icc_profile")
    if profile and not any(name in profile for name in SRGB):
        yield "a colour profile (ICC) other than sRGB: ignored"
    if "srgb" not in image.info and abs(image.info.get("gamma", STANDARD_GAMMA) - STANDARD_GAMMA) > 0.01:
        yield "a PNG gamma other than 1/2.2: ignored"
    try:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) not in (None, 1)
    except Exception:  # damaged EXIF raises nearly any type
        yield "EXIF that cannot be read: taken as upright"
    else:
        if turned:
            yield "an EXIF orientation: turned upright"
