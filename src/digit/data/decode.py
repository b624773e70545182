"""Decodes encoded bytes or an image file to RGB. A broken file raises BadImageError that names it.

Colour profiles (ICC) are ignored, as in the released code (PIL convert).
"""

import io
import os
import stat
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from digit.errors import BadImageError
from digit.runtime.files import as_path

MAX_PIXELS = 178_956_970 // 2  # 256 MiB of RGB, Pillow's own warning limit
# Formats to open. Others (EPS, PDF, WMF ...) start external programs or hold no photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "MPO")
EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".j2k", ".avif", ".tga", ".mpo",
))  # fmt: skip
EXIF_ORIENTATION = 0x0112
WHITE = (255, 255, 255, 255)


def decode_image(data: bytes | str | Path, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes to a PIL image of mode RGB: upright, alpha over white, 16 bits scaled, first frame of an animation.

    Args:
        data: the encoded bytes, or the path of a file.
        name: name of the image in errors; the path by default.
        max_pixels: an image whose header claims more is refused before its pixels are decoded.

    Raises:
        BadImageError: names the image: not an image, truncated, too many pixels, a pixel type that RGB cannot express.
    """
    name = name or ("image bytes" if isinstance(data, bytes) else os.fspath(data))
    try:
        with _stream(data) as stream, Image.open(stream, formats=_formats()) as image:
            _check_pixels(image, max_pixels)
            image.load()
            return _to_rgb(_upright(image))
    except BadImageError as error:
        raise BadImageError(f"{name}: {error}") from None
    except Exception as error:  # decoders raise nearly any type on damaged bytes
        raise BadImageError(f"{name}: {_reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An open picture of any mode as RGB, the way `decode_image` makes it. Raises BadImageError as that does."""
    return _to_rgb(_upright(image))


def probe_image(data: bytes | str | Path) -> tuple[str, str, tuple[int, int]]:
    """(format, PIL mode, (width, height)) from the header alone. Raises BadImageError if there is none."""
    try:
        with _stream(data) as stream, Image.open(stream, formats=_formats()) as image:
            return image.format or "?", image.mode, image.size
    except Exception as error:
        raise BadImageError(_reason(error)) from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _stream(data: bytes | str | Path) -> IO[bytes]:
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
        return "not an image of a known format"
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
    if image.mode == "F":
        raise BadImageError("floating-point pixels have no known range: save it with 8 or 16 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;"):
        return _scale_16_bit(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, WHITE), layer).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """Scales 0..65535 to 0..255 by 1/257, rounded (65535 = 255 * 257); Pillow's own conversion clips at 255."""
    values = np.asarray(image)  # (H, W) uint16 or int32
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BadImageError(f"32-bit pixels {low}..{high} have no known range: save it with 8 or 16 bits per channel")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")
