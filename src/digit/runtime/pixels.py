"""The one check of images that callers give as tensors, arrays or lists of them.

What is accepted, everywhere: RGB images as uint8 in 0..255, or as floats in 0..1. A range cannot be seen for certain:
floats of -1..1 or 0..255 whose values all happen to lie in 0..1, such as a black image, are taken for floats of 0..1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError
from digit.runtime.scalars import shown

Pixels = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]
WANTED = "wanted RGB images (B, 3, H, W), uint8 in 0..255 or floats in 0..1"


def as_uint8(images: Pixels) -> Tensor:
    """Images as (B, 3, H, W) uint8; a tensor that is so already is returned as it is.

    Args:
        images: a tensor (B, 3, H, W); an array with the channels first or last, (B, 3, H, W) or (B, H, W, 3); or a list
            of single images of one size, (3, H, W) or, arrays alone, (H, W, 3). uint8 in 0..255, or floats in 0..1,
            which are multiplied by 255 and rounded.

    Raises DigitError for any other type, shape or range: wider integers, booleans, floats outside 0..1, NaN.
    """
    if isinstance(images, list | tuple):
        return _joined([_single(image, place) for place, image in enumerate(images)])
    pixels = as_pixels(images)
    return pixels if pixels.dtype == torch.uint8 else (pixels.detach().float() * 255).round().to(torch.uint8)


def as_pixels(images: Pixels) -> Tensor:
    """As `as_uint8`, of a tensor or array; floats in 0..1 stay floats."""
    if isinstance(images, np.ndarray):
        images = _from_array(images)
    if not isinstance(images, Tensor):
        raise DigitError(f"images are {shown(images)}: {WANTED}")
    if images.dtype != torch.uint8:
        _check_floats(images)
    if images.ndim != 4 or images.shape[1] != 3 or (len(images) and not images.numel()):
        raise DigitError(f"images are {_described(images)}{_advice_on_shape(images.shape)}: {WANTED}")
    return images


def _single(image: Tensor | np.ndarray, place: int) -> Tensor:
    """One image of a list as (1, 3, H, W) uint8."""
    if not isinstance(image, Tensor | np.ndarray):
        raise DigitError(f"image {place} of the list is {shown(image)}: {WANTED}, as a tensor or an array each")
    try:
        return as_uint8(image[None])
    except DigitError as error:
        raise DigitError(f"image {place} of the list, as a batch of one: {error}") from error


def _joined(images: list[Tensor]) -> Tensor:
    sizes = sorted({tuple(image.shape[2:]) for image in images})
    if len(sizes) != 1:
        found = ", ".join(f"{height} x {width}" for height, width in sizes[:4]) or "no image"
        raise DigitError(f"the list holds {found}: wanted one or more images of one size, resize them first")
    return torch.cat(images)


def _from_array(array: np.ndarray) -> Tensor:
    """A tensor with the channels first, in memory of its own where the array's cannot be shared."""
    if array.dtype.kind not in "fiub":
        raise DigitError(f"images are an array of {array.dtype}: {WANTED}")
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        raise DigitError(_not_pixels(torch.from_numpy(array.astype(np.float64)), str(array.dtype)))
    if array.ndim == 4 and array.shape[3] == 3:
        if array.shape[1] == 3:
            raise DigitError(f"images have shape {array.shape}, channels first or last? give a tensor (B, 3, H, W)")
        array = array.transpose(0, 3, 1, 2)
    dtype = np.float32 if array.dtype.kind == "f" else array.dtype
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def _check_floats(images: Tensor) -> None:
    """Raise DigitError for anything but floats in 0..1."""
    if not images.is_floating_point():
        raise DigitError(_not_pixels(images, str(images.dtype).removeprefix("torch.")))
    if not images.numel():
        return
    low, high = _span(images)
    if not 0 <= low <= high <= 1:  # false for NaN too
        raise DigitError(f"images are {_described(images)}: {WANTED}; {_advice_on_range(low, high)}")


def _not_pixels(images: Tensor, kind: str) -> str:
    """What to say of numbers of a type that images do not have."""
    if kind == "bool":
        advice = "convert them to uint8 and multiply by 255"
    elif images.is_complex() or not images.numel():
        advice = "convert them to uint8"
    else:
        low, high = _span(images)
        advice = "convert them to uint8" if low >= 0 and high <= 255 else "scale them to floats in 0..1"
    return f"images are {_described(images, kind)}: {WANTED}; {advice}"


def _advice_on_range(low: float, high: float) -> str:
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        return "NaN and infinity are no pixels"
    if low >= 0 and 2 <= high <= 255:
        return "if they span 0..255, divide them by 255"
    if low >= -0.2 and high <= 1.2:
        return "clamp what a resize left outside"
    return "if they span -1..1, give (images + 1) / 2" if low >= -1.2 and high <= 1.2 else "scale them to 0..1"


def _advice_on_shape(shape: Sequence[int]) -> str:
    if len(shape) == 4 and shape[3] == 3:
        return ", channels last (give images.permute(0, 3, 1, 2))"
    if len(shape) == 3 and 3 in (shape[0], shape[2]):
        return ", one image (give a list of it)"
    if len(shape) == 4 and shape[1] in (1, 4):
        return ", grey (repeat the channel three times)" if shape[1] == 1 else ", with alpha (leave it out)"
    return ""


def _described(images: Tensor, kind: str | None = None) -> str:
    """'float32 from -1 to 0.98 of shape (8, 3, 64, 64)'."""
    kind = kind or str(images.dtype).removeprefix("torch.")
    span = ""
    if images.numel() and not images.is_complex() and kind not in ("uint8", "bool"):
        span = " from {:.6g} to {:.6g}".format(*_span(images))
    return f"{kind}{span} of shape {tuple(images.shape)}"


def _span(images: Tensor) -> tuple[float, float]:
    """The smallest and the largest value."""
    low, high = torch.aminmax(images.detach() if images.is_floating_point() else images.double())
    return float(low), float(high)
