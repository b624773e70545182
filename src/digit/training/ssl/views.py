"""Random views of images: crop, flip, colours and blur of a whole batch by tensor operations.

View i of a batch depends only on the generator and image i: every image takes one row of `NUM_UNIFORMS` random numbers,
whether the settings use them or not.

Shapes: B images, H side of the images, S side of the views.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from digit.errors import DigitError
from digit.runtime.settings import check_settings, within

LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in the grey value (ITU-R BT.601)
ASPECT = 4 / 3  # the largest ratio of a crop's longer side to its shorter one
NUM_CROP, NUM_COLOUR, NUM_BLUR = 5, 6, 2  # random numbers per image
NUM_UNIFORMS = NUM_CROP + NUM_COLOUR + NUM_BLUR
MAX_BLUR = 1 / 3  # largest outer tap of three; 1/3 averages three pixels, sigma 0.8 px


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Strength of the random views. Colours as in MoCo v3, DINO and iBOT (BYOL's, without solarisation)."""

    scale: tuple[float, float] = within("(0, 1]", (0.2, 1.0))
    """Smallest and largest area of the crop, as fractions of the image. Its aspect ratio is 3:4 to 4:3."""
    flip: bool = True
    """Flip left and right with probability 0.5. Turn it off for images in which left and right matter."""
    jitter: float = within("[0, 1]", 0.8)
    """Probability that brightness, contrast, saturation and hue change."""
    brightness: float = within("[0, 1]", 0.4)
    """Brightness is multiplied by 1 - brightness to 1 + brightness."""
    contrast: float = within("[0, 1]", 0.4)
    """The distance to the mean grey value is multiplied by 1 - contrast to 1 + contrast."""
    saturation: float = within("[0, 1]", 0.2)
    """The distance to the pixel's grey value is multiplied by 1 - saturation to 1 + saturation."""
    hue: float = within("[0, 0.5]", 0.1)
    """Largest rotation of the colours about the grey axis, in turns, in either direction."""
    grey: float = within("[0, 1]", 0.2)
    """Probability that the view is grey."""
    blur: float = within("[0, 1]", 0.5)
    """Probability of a slight blur, sigma 0 to 0.8 pixels."""

    def __post_init__(self) -> None:
        check_settings(self, of="the views")
        low, high = self.scale
        if low > high:
            raise DigitError(f"scale of the views is {self.scale}: it must be two areas in (0, 1], the smaller first")


def random_views(
    images: UInt8[Tensor, "B 3 H H"], size: int, cfg: ViewConfig, generator: torch.Generator
) -> Float[Tensor, "B 3 S S"]:
    """One view of each image, float32 in 0..1, S = `size`; `generator` is on the CPU, whatever the images' device."""
    uniforms = torch.rand(len(images), NUM_UNIFORMS, generator=generator).to(images.device)
    crop, colour, blur = uniforms.split((NUM_CROP, NUM_COLOUR, NUM_BLUR), dim=1)
    views = random_crops(images.float() / 255, crop, size, cfg)
    if cfg.jitter or cfg.grey:
        views = random_colours(views, colour, cfg)
    return random_blur(views, blur, cfg) if cfg.blur else views


def random_crops(images: Tensor, uniforms: Tensor, size: int, cfg: ViewConfig) -> Tensor:
    """Random resized crops (Szegedy et al. 2015) with flips, bilinear: (B, 3, H, H) -> (B, 3, size, size)."""
    area, aspect, x, y, flip = uniforms.unbind(1)  # (B,) each
    area = cfg.scale[0] + (cfg.scale[1] - cfg.scale[0]) * area
    aspect = ASPECT ** (2 * aspect - 1)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    sign = torch.where(flip < 0.5, -1.0, 1.0) if cfg.flip else torch.ones_like(flip)
    zero = torch.zeros_like(width)
    rows = [width * sign, zero, (1 - width) * (2 * x - 1), zero, height, (1 - height) * (2 * y - 1)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def random_colours(images: Tensor, uniforms: Tensor, cfg: ViewConfig) -> Tensor:
    """Saturation, hue, brightness and greyness as one 3 x 3 matrix per image, then contrast; clipped to 0..1."""
    jittered, grey = uniforms[:, 0] < cfg.jitter, uniforms[:, 1] < cfg.grey  # (B,)
    strength = uniforms.new_tensor([cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue])
    change = torch.where(jittered[:, None], strength * (2 * uniforms[:, 2:] - 1), 0.0)  # (B, 4)
    brightness, contrast, saturation, hue = (1 + change).view(-1, 4, 1, 1).unbind(1)  # (B, 1, 1) each
    luma = uniforms.new_tensor([LUMA])  # (1, 3)
    to_grey = luma.expand(3, 3)
    colour = brightness * (saturation * turn_hue(hue - 1) + (1 - saturation) * to_grey)  # (B, 3, 3)
    colour = torch.where(grey[:, None, None], to_grey @ colour, colour)
    pixels = colour @ images.flatten(2)  # (B, 3, S * S)
    mean = (luma @ pixels.mean(2, keepdim=True)).view(-1, 1, 1)
    return torch.lerp(mean, pixels, contrast).clamp(0, 1).view_as(images)


def turn_hue(turns: Tensor) -> Tensor:
    """R = cos t I + sin t [u]_x + (1 - cos t) u u^T: rotations of RGB about the grey axis u = (1, 1, 1) / sqrt 3.

    t = 2 pi `turns`, (B, 1, 1) -> (B, 3, 3); Rodrigues' formula.
    """
    cross = turns.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cosine, sine = (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()
    return cosine * torch.eye(3, device=turns.device) + sine * cross + (1 - cosine) / 3


def random_blur(images: Tensor, uniforms: Tensor, cfg: ViewConfig) -> Tensor:
    """Three taps (a, 1 - 2a, a) along rows and columns, a from 0 to MAX_BLUR: variance 2a px^2."""
    outer = torch.where(uniforms[:, 0] < cfg.blur, MAX_BLUR * uniforms[:, 1], 0.0).view(-1, 1, 1, 1)
    for rows, columns in ((0, 1), (1, 0)):
        padded = F.pad(images, (columns, columns, rows, rows), mode="replicate")
        size = images.shape[-1]
        before, after = padded[..., :size, :size], padded[..., 2 * rows :, 2 * columns :]
        images = images + outer * (before + after - 2 * images)
    return images
