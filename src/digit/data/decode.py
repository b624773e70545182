"""Decodes encoded bytes or an image file to RGB. A broken file raises BadImageError that names it.

Colour profiles (ICC) are ignored, as in the released code (PIL convert).
"""

import io
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from digit.data import deep_pixels
from digit.data.deep_pixels import Stream
from digit.data.pixel_range import PixelRange
from digit.errors import BadImageError
from digit.runtime.files import as_path

T = TypeVar("T")
MAX_PIXELS = 178_956_970 // 2  # 256 MiB of RGB, Pillow's own warning limit
# Formats to open. Others (EPS, PDF, WMF ...) start external programs or hold no photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "MPO")
EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".j2k", ".avif", ".tga", ".mpo",
))  # fmt: skip
EXIF_ORIENTATION = 0x0112
WHITE = (255, 255, 255, 255)


def decode_image(
    data: bytes | str | Path,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    pixel_max: int | PixelRange | None = None,
) -> Image.Image:
    """Decodes to a PIL image of mode RGB: upright, alpha over white, scaled to 8 bits, first frame of an animation.

    Args:
        data: the encoded bytes, or the path of a file.
        name: name of the image in errors; the path by default.
        max_pixels: an image whose header claims more is refused before its pixels are decoded.
        pixel_max: the value that becomes 255 in an image of more than 8 bits per channel, or the range of its source.
            By default the file's own metadata says so, else the largest value if it is near the end of 8, 10, 12, 14
            or 16 bits, else 65535 is white; a warning says what was assumed.

    Raises:
        BadImageError: names the image: not an image, truncated, too many pixels, values of no known range, or beyond
            the white that was given or assumed.
    """
    name = name or ("image bytes" if isinstance(data, bytes) else os.fspath(data))
    try:
        with _stream(data) as stream, Image.open(stream, formats=_formats()) as image:
            _check_pixels(image, max_pixels)
            if deep_pixels.is_deep(image):
                return _to_rgb(_upright(deep_pixels.reduce(image, stream, pixel_max, name)))
            image.load()
            return _to_rgb(_upright(image))
    except BadImageError as error:
        raise BadImageError(f"{name}: {error}") from None
    except Exception as error:  # decoders raise nearly any type on damaged bytes
        raise BadImageError(f"{name}: {_reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An open picture of 8 bits in any mode as RGB, the way `decode_image` makes it.

    Raises BadImageError for a picture of more bits, whose white only its file or a person can say.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise BadImageError(
            f"a picture of mode {image.mode} has no known range: give its file to digit.data.images.decode_image (with "
            "pixel_max, the value of white), or a picture of 8 bits"
        )
    return _to_rgb(_upright(image))


def probe_image(data: bytes | str | Path) -> tuple[str, str, tuple[int, int]]:
    """(format, PIL mode, (width, height)) from the header alone. Raises BadImageError if there is none."""
    return read_header(data, lambda image, _: (image.format or "?", image.mode, image.size))


def deep_size(data: bytes | str | Path) -> int:
    """Pixels of an image of more than 8 bits whose file states no range, 0 of others. Raises as `probe_image` does."""

    def size(image: ImageFile, stream: Stream) -> int:
        deep = deep_pixels.is_deep(image) and image.mode != "F"
        return image.width * image.height if deep and not deep_pixels.states_white(image, stream) else 0

    return read_header(data, size)


def largest_value(data: bytes | str | Path) -> int:
    """The largest value of an image of more than 8 bits, decoded. Raises BadImageError if it cannot be read."""

    def largest(image: ImageFile, stream: Stream) -> int:
        _check_pixels(image, MAX_PIXELS)
        return deep_pixels.largest_value(image, stream)

    return read_header(data, largest)


def read_header(data: bytes | str | Path, read: Callable[[ImageFile, Stream], T]) -> T:
    """read(opened image, its stream); its pixels are not decoded yet. Raises BadImageError for anything that fails."""
    try:
        with _stream(data) as stream, Image.open(stream, formats=_formats()) as image:
            return read(image, stream)
    except BadImageError:
        raise
    except Exception as error:
        raise BadImageError(_reason(error)) from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _stream(data: bytes | str | Path) -> Stream:
    if isinstance(data, bytes):
        return io.BytesIO(data)
    data = as_path(data)
    if not stat.S_ISREG(os.stat(data).st_mode):
        raise OSError("not a regular file")  # reading a pipe would block, reading a device would never end
    return open(data, "rb")


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(f"{width}x{height} pixels, more than {max_pixels} (a decompression bomb?): refused")
    if width < 1 or height < 1:
        raise BadImageError(f"{width}x{height} pixels: empty")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format, or its pixels are of a type that cannot be read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "too many pixels (a decompression bomb?): refused"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    """Undoes the EXIF rotation; an image with damaged EXIF stays as stored."""
    try:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) not in (None, 1)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, WHITE), layer).convert("RGB")
    return image.convert("RGB")
