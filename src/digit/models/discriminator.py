"""Patch discriminator: judges overlapping patches of an image as real or reconstructed (Isola et al. 2017)."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

SMALLEST_SIDE = 16  # pixels: three layers leave two a side, and the last convolution needs those


class PatchDiscriminator(nn.Module):
    """Stride-2 4x4 convolutions with spectral norm, then one score per patch.

    Spectral norm rather than the original's batch norm: it needs no statistics over the batch, which is small here.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [3] + [channels * min(2**n, 8) for n in range(num_layers)]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 P Q"]:
        """Scores of images in [0, 1]: positive for real. A score sees 46 pixels a side with three layers."""
        return self.layers(images * 2 - 1)
