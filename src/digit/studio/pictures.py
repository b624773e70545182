"""Pictures that travel between page and server: PNGs that carry the settings they were made with."""

import base64
import binascii
import io
import json
import re
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from digit.data.decode import decode_image, read_header
from digit.data.preprocess import Fit, fit_batch
from digit.errors import BadImageError, DigitError
from digit.runtime.plots import to_pil

CHUNK = "digit"  # keyword of the PNG text chunk
MAX_UPLOAD_PIXELS = 32_000_000  # of a picture that somebody drops onto the page: 92 MiB as RGB
MAX_SETTINGS = 20_000  # characters
DATA_URL = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def png(image: Tensor, settings: dict[str, Any] | None = None) -> bytes:
    """(3, H, W) uint8 as PNG; `settings` go into a text chunk."""
    about = PngImagePlugin.PngInfo()
    if settings is not None:
        about.add_itxt(CHUNK, json.dumps(settings, ensure_ascii=False))
    out = io.BytesIO()
    to_pil(image).save(out, format="PNG", pnginfo=about)
    return out.getvalue()


def data_url(data: bytes) -> str:
    """PNG bytes as a data URL, which an <img> shows and a browser saves unchanged."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def settings_in(data: bytes) -> dict[str, Any] | None:
    """What `png` wrote into a picture's text chunk; None where there is nothing, or no such settings."""
    try:
        text = read_header(data, lambda image, _: image.info.get(CHUNK))
        found = json.loads(text) if isinstance(text, str) and len(text) <= MAX_SETTINGS else None
    except (BadImageError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_upload(data: bytes, size: int, fit: Fit = "crop") -> Tensor:
    """A picture as it was dropped onto the page -> (3, size, size) uint8, cut as the pipeline's `fit` says.

    Raises BadImageError for what is no picture, or has more than MAX_UPLOAD_PIXELS pixels.
    """
    image = decode_image(data, name="the picture", max_pixels=MAX_UPLOAD_PIXELS)
    return fit_batch([image], size, fit)[0]


def read_data_url(text: str, size: int) -> Tensor:
    """A picture that the page sends back: a PNG of exactly this size as a data URL -> (3, size, size) uint8.

    Raises DigitError for anything else.
    """
    match = DATA_URL.fullmatch(text)
    try:
        data = base64.b64decode(match[1], validate=True) if match else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise DigitError("the picture is no PNG as a data URL: drop a picture onto the page")
    image = decode_image(data, name="the picture", max_pixels=size * size)
    if image.size != (size, size):
        raise DigitError(f"the picture has {image.width} x {image.height} pixels, the model takes {size} x {size}")
    return fit_batch([image], size)[0]


def sheet(images: Tensor) -> Image.Image:
    """(B, 3, H, W) uint8 side by side."""
    wide = torch.cat(list(images), dim=2) if len(images) else torch.zeros(3, 1, 1, dtype=torch.uint8)
    return to_pil(wide)


def png_of(image: Image.Image) -> bytes:
    """A Pillow picture as PNG bytes."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()
