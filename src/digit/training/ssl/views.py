"""Random views of images: crop, flip, colours, blur, for a whole batch at once by tensor operations.

What view i of a batch looks like depends on the generator and on image i alone: the same numbers are drawn for every
image, used or not, one row of `NUM_DRAWS` an image.

Shapes: B images, H side of the images, S side of the views.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from digit.errors import DigitError

LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in the grey value (ITU-R BT.601)
ASPECT = 4 / 3  # crops are at most so much wider than high, or higher than wide
CROP_DRAWS, COLOUR_DRAWS, BLUR_DRAWS = 5, 6, 2
NUM_DRAWS = CROP_DRAWS + COLOUR_DRAWS + BLUR_DRAWS
MAX_BLUR = 1 / 3  # outer tap of the three; a third is the mean of three pixels, sigma 0.8 px


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How strongly views differ. The colours are those of MoCo v3, DINO and iBOT (BYOL's, without solarisation)."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Area of the crop as a fraction of the image, from and to; its aspect is 3:4 to 4:3."""
    flip: bool = True
    """Mirror left-right with probability 0.5; off where left and right mean something."""
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue change."""
    brightness: float = 0.4
    """Factor on the brightness: 1 - brightness to 1 + brightness."""
    contrast: float = 0.4
    """Factor on the distance to the mean grey value."""
    saturation: float = 0.2
    """Factor on the distance to the pixel's own grey value."""
    hue: float = 0.1
    """Turn of the colours about the grey axis, in turns, either way."""
    grey: float = 0.2
    """Probability that the view has no colour."""
    blur: float = 0.5
    """Probability of a slight blur, sigma 0 to 0.8 pixels."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise DigitError(f"scale of the views is {self.scale}: wanted two areas in (0, 1], the smaller first")


def random_views(
    images: UInt8[Tensor, "B 3 H H"], size: int, cfg: ViewConfig, generator: torch.Generator
) -> Float[Tensor, "B 3 S S"]:
    """One view of each image, float32 in 0..1, S = `size`; `generator` is on the CPU, whatever the images' device."""
    draws = torch.rand(len(images), NUM_DRAWS, generator=generator).to(images.device)
    crop, colour, blur = draws.split((CROP_DRAWS, COLOUR_DRAWS, BLUR_DRAWS), dim=1)
    views = random_crops(images.float() / 255, crop, size, cfg)
    if cfg.jitter or cfg.grey:
        views = random_colours(views, colour, cfg)
    return random_blur(views, blur, cfg) if cfg.blur else views


def random_crops(images: Tensor, draws: Tensor, size: int, cfg: ViewConfig) -> Tensor:
    """Random resized crops (Szegedy et al. 2015) with flips, bilinear: (B, 3, H, H) -> (B, 3, size, size)."""
    area, aspect, x, y, flip = draws.unbind(1)  # (B,) each
    area = cfg.scale[0] + (cfg.scale[1] - cfg.scale[0]) * area
    aspect = ASPECT ** (2 * aspect - 1)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    mirror = torch.where(flip < 0.5, -1.0, 1.0) if cfg.flip else torch.ones_like(flip)
    zero = torch.zeros_like(width)
    rows = [width * mirror, zero, (1 - width) * (2 * x - 1), zero, height, (1 - height) * (2 * y - 1)]
    places = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def random_colours(images: Tensor, draws: Tensor, cfg: ViewConfig) -> Tensor:
    """Saturation, hue, brightness and greyness as one 3 x 3 matrix per image, then contrast; clipped to 0..1."""
    chosen, grey = draws[:, 0] < cfg.jitter, draws[:, 1] < cfg.grey  # (B,)
    strength = draws.new_tensor([cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue])
    change = torch.where(chosen[:, None], strength * (2 * draws[:, 2:] - 1), 0.0)  # (B, 4)
    brightness, contrast, saturation, hue = (1 + change).view(-1, 4, 1, 1).unbind(1)  # (B, 1, 1) each
    luma = draws.new_tensor([LUMA])  # (1, 3)
    to_grey = luma.expand(3, 3)
    colour = brightness * (saturation * turn_hue(hue - 1) + (1 - saturation) * to_grey)  # (B, 3, 3)
    colour = torch.where(grey[:, None, None], to_grey @ colour, colour)
    pixels = colour @ images.flatten(2)  # (B, 3, S * S)
    mean = (luma @ pixels.mean(2, keepdim=True)).view(-1, 1, 1)
    return torch.lerp(mean, pixels, contrast).clamp(0, 1).view_as(images)


def turn_hue(turns: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that turn RGB about the grey axis by `turns` (B, 1, 1)."""
    # R = cos t I + sin t [u]_x + (1 - cos t) u u^T,  u = (1, 1, 1) / sqrt 3  (Rodrigues)
    cross = turns.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cosine, sine = (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()
    return cosine * torch.eye(3, device=turns.device) + sine * cross + (1 - cosine) / 3


def random_blur(images: Tensor, draws: Tensor, cfg: ViewConfig) -> Tensor:
    """Three taps (a, 1 - 2a, a) along rows and columns, a from 0 to MAX_BLUR: variance 2a px^2."""
    outer = torch.where(draws[:, 0] < cfg.blur, MAX_BLUR * draws[:, 1], 0.0).view(-1, 1, 1, 1)
    for rows, columns in ((0, 1), (1, 0)):
        padded = F.pad(images, (columns, columns, rows, rows), mode="replicate")
        size = images.shape[-1]
        before, after = padded[..., :size, :size], padded[..., 2 * rows :, 2 * columns :]
        images = images + outer * (before + after - 2 * images)
    return images
