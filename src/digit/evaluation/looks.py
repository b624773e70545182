"""What the pixels of a set are like on average: colours, contrast, extremes, fine detail, JPEG's blocks, frames.

Faults of saving and resizing change these in one direction for all images, whatever the images show. They are measured
on the pixels that the network receives. Statistics hold them, so that they are warned about as images are.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

BLOCK = 8  # px of a JPEG block
AT_ONCE = 64  # images in float32 at a time
Mean = tuple[float, float]  # a value, and its standard error over images


@dataclass(frozen=True, kw_only=True)
class Look:
    """Averages over the images of a set, each with its standard error; colours in grey levels 0..255."""

    red: Mean
    green: Mean
    blue: Mean
    contrast: Mean
    """Standard deviation of all values about their mean."""
    extreme: Mean
    """Share of values that are 0 or 255."""
    detail: Mean
    """Mean squared difference of neighbours over that of pixels two apart: 0.25 for smooth ramps, 1 for noise."""
    blocks: Mean
    """Mean squared difference across the borders of 8 x 8 blocks over that elsewhere: about 1 without JPEG."""
    framed: Mean
    """Share of images with two opposite sides of one colour."""

    @classmethod
    def of(cls, looks: Float32[Tensor, "N 10"]) -> Self:
        """Average the rows of `measure_looks`."""
        red, green, blue, square, extreme, near, far, across, inside, framed = looks.double().T
        grey = (red + green + blue) / 3
        contrast = math.sqrt(max(float(square.mean() - grey.mean() ** 2), 0.0))
        influence = (square - 2 * grey.mean() * grey) / (2 * contrast) if contrast else torch.zeros_like(square)
        return cls(
            red=_mean(red),
            green=_mean(green),
            blue=_mean(blue),
            contrast=(contrast, _mean(influence)[1]),
            extreme=_mean(extreme),
            detail=_ratio(near, far),
            blocks=_ratio(across, inside),
            framed=_mean(framed),
        )


def _mean(values: Tensor) -> Mean:
    return float(values.mean()), float(values.std(correction=0)) / math.sqrt(len(values))


def _ratio(a: Tensor, b: Tensor) -> Mean:
    """sum a / sum b, and its standard error by the influence of each image; 1 for images without any difference."""
    if not b.sum() > 0:
        return 1.0, 0.0
    ratio = float(a.sum() / b.sum())
    return ratio, _mean((a - ratio * b) / b.mean())[1]


def measure_looks(images: UInt8[Tensor, "N 3 H W"]) -> Float32[Tensor, "N 10"]:
    """What `Look.of` averages, for each image. Images smaller than two blocks have no blocks: these values are 0."""
    return torch.cat([_looks(part) for part in images.cpu().split(AT_ONCE)])


def _looks(images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B 10"]:
    x = images.float()
    extreme = ((images == 0) | (images == 255)).flatten(1).float().mean(1)
    near, far, across, inside = (sum(parts) / 2 for parts in zip(*(_steps(x, dim) for dim in (2, 3)), strict=True))
    rows, columns = images[:, :, [0, -1]], images[:, :, :, [0, -1]].transpose(2, 3)  # (B, 3, 2, L)
    framed = (_is_one_colour(rows) | _is_one_colour(columns)).float()
    columns_of = [*x.mean((2, 3)).T, x.square().flatten(1).mean(1), extreme, near, far, across, inside, framed]
    return torch.stack(columns_of, 1)


def _is_one_colour(edges: UInt8[Tensor, "B 3 2 L"]) -> Bool[Tensor, " B"]:
    """Whether all pixels of two edges have one colour."""
    return (edges == edges[:, :, :1, :1]).flatten(1).all(1)


def _steps(x: Float32[Tensor, "B 3 H W"], dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean squared difference (B,) of neighbours, of pixels two apart, across block borders, and elsewhere."""
    length, none = x.shape[dim], x.new_zeros(len(x))
    if length < 3:
        return none, none, none, none
    near = (x.narrow(dim, 1, length - 1) - x.narrow(dim, 0, length - 1)).square()
    far = (x.narrow(dim, 2, length - 2) - x.narrow(dim, 0, length - 2)).square()
    by_place = near.mean((1, 5 - dim))  # (B, length - 1)
    border = torch.arange(1, length) % BLOCK == 0
    parts = (by_place[:, border].mean(1), by_place[:, ~border].mean(1)) if length >= 2 * BLOCK else (none, none)
    return by_place.mean(1), far.flatten(1).mean(1), *parts
