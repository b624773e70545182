"""Features of several layers of one encoder, in one pass: normalised, and concatenated or summed.

Shapes: B images, S input side, layer l with D_l channels on its grid; N cells of the first named layer's grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.errors import DigitError

Combine = Literal["concat", "sum"]


class LayeredNet(Protocol):
    """What an encoder's network has so that several of its layers can be taken."""

    def layer_outputs(self, x: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[Tensor]:
        """Features (B, N_l, D_l) of each of these blocks, as a net cut behind that block gives them."""
        ...

    def layer_dim(self, layer: int) -> int:
        """Channels D_l of a block's features."""
        ...

    def layer_grid(self, layer: int, size: int) -> tuple[int, int]:
        """(rows, columns) of a block's features, of a square input of `size` pixels."""
        ...


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """A net, cut behind the last of the layers that are taken, and what is made of them."""

    net: str
    """Name of the net's kind in `tokenizers.encoders.NETS`."""
    config: dict[str, Any]
    """The net's own configuration."""
    layers: tuple[int, ...]
    """0-based blocks whose features are taken; the first one gives the grid."""
    combine: Combine = "concat"
    """Put the layers' channels side by side, or add them up."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise DigitError(f"layers are {self.layers}: name some blocks, each once")
        if self.combine not in ("concat", "sum"):
            raise DigitError(f"combine is {self.combine!r}: choose concat or sum")


class SeveralLayers(nn.Module):
    """An encoder's net whose features are those of several of its blocks.

    Each block's features are resampled to the grid of the first one (bilinear, with antialias where they are finer) and
    normalised to mean 0 and variance 1 over their channels, so that no layer outweighs another. Raises DigitError where
    layers of different widths should be added up.
    """

    def __init__(self, cfg: LayersConfig, net: nn.Module) -> None:
        super().__init__()
        self.cfg = cfg
        self.net: Any = net  # a LayeredNet
        self.dims = [self.net.layer_dim(layer) for layer in cfg.layers]
        if cfg.combine == "sum" and len(set(self.dims)) > 1:
            widths = " and ".join(map(str, self.dims))
            raise DigitError(f"layers of {widths} channels cannot be added up: set combine to concat")

    @property
    def dim(self) -> int:
        """Channels D of the features."""
        return sum(self.dims) if self.cfg.combine == "concat" else self.dims[0]

    def grid(self, size: int) -> tuple[int, int]:
        """(rows, columns) of the features of a square input of `size` pixels."""
        return self.net.layer_grid(self.cfg.layers[0], size)

    def forward(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N D"]:
        """Normalised images to features in raster order."""
        size, grid, parts = x.shape[-1], self.grid(x.shape[-1]), []
        for layer, features in zip(self.cfg.layers, self.net.layer_outputs(x, self.cfg.layers), strict=True):
            own = self.net.layer_grid(layer, size)
            features = resampled(features.float(), own, grid)  # (B, N, D_l)
            parts.append(F.layer_norm(features, features.shape[-1:]))
        return torch.cat(parts, -1) if self.cfg.combine == "concat" else torch.stack(parts).sum(0)


def resampled(
    features: Float[Tensor, "B M D"], grid: tuple[int, int], target: tuple[int, int]
) -> Float[Tensor, "B N D"]:
    """Features on one grid as those on another over the same picture."""
    if grid == target:
        return features
    maps = features.transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
    maps = F.interpolate(maps, target, mode="bilinear", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2)
