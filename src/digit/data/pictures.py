"""Images as callers give them, Pillow pictures among them, as tensors; and tensors as pictures."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from digit.data.decode import to_rgb
from digit.errors import DigitError
from digit.runtime.names import did_you_mean
from digit.runtime.pixels import as_uint8

Picture = Image.Image | Tensor | np.ndarray
Images = Picture | Sequence[Picture]
Output = Literal["torch", "numpy", "pil"]


def as_images(images: Images) -> Tensor:
    """Images as (B, 3, H, W) uint8; a tensor that is so already is returned as it is.

    Args:
        images: what `digit.runtime.pixels.as_uint8` takes; or a Pillow picture of any mode, or a list of pictures,
            tensors and arrays of one size. A picture becomes RGB as a file does: upright, transparent parts white.

    Raises DigitError for any other type, shape or range.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list | tuple):
        images = [np.array(to_rgb(image)) if isinstance(image, Image.Image) else image for image in images]
    return as_uint8(images)  # pyright: ignore[reportArgumentType]  # it refuses what is no image


def as_output(images: Tensor, output: Output) -> Tensor | np.ndarray | list[Image.Image]:
    """Images (B, 3, H, W) uint8 as they are, as an array (B, H, W, 3) uint8, or as a list of Pillow pictures."""
    check_output(output)
    if output == "torch":
        return images
    array = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())  # (B, H, W, 3)
    return array if output == "numpy" else [Image.fromarray(picture) for picture in array]


def check_output(output: str) -> None:
    """Raise DigitError for an unknown output."""
    if output not in get_args(Output):
        names = get_args(Output)
        raise DigitError(f"output is {output!r}{did_you_mean(str(output), names)}: choose {', '.join(names)}")
