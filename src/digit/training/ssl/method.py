"""What the methods share: a ViT taken apart, heads, the network that follows another, and what training asks of them.

Shapes: B images, S side of a view, g = S / patch_size, N = g * g patches, D embed_dim.
"""

import copy
import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.vit import ViT
from digit.training.log import Metrics

Module = TypeVar("Module", bound=nn.Module)


class Method(nn.Module, ABC):
    """A self-supervised method around a ViT; its state dict is all that a resumed run needs beside the optimizer."""

    def __init__(self, vit: ViT):
        super().__init__()
        self.vit = vit

    @property
    def size(self) -> int:
        """Side in pixels of the views: that of the position table."""
        return self.vit.cfg.table_side * self.vit.cfg.patch_size

    @property
    def result(self) -> ViT:
        """The encoder that the run is for."""
        return self.vit

    @abstractmethod
    def views(self, images: UInt8[Tensor, "B 3 H H"], generator: torch.Generator) -> list[Tensor]:
        """What `loss` sees: one or more views of each image, float32 in 0..1; the caller normalises them."""

    @abstractmethod
    def loss(self, views: list[Tensor], generator: torch.Generator, progress: float) -> tuple[Tensor, Metrics]:
        """The loss, (), and metrics for the log; `progress` runs from 0 to 1 over the run."""

    def end_step(self, progress: float) -> None:
        """Called after the optimizer: where a momentum network follows."""


def embed(
    vit: ViT, images: Tensor, masked: Bool[Tensor, "B N"] | None = None, mask_token: Tensor | None = None
) -> Float[Tensor, "B N D"]:
    """Patches with their positions; those that are `masked` hold `mask_token` (1, 1, D) instead of their content."""
    side = images.shape[-1] // vit.cfg.patch_size
    patches = vit.patch_embed(images)  # (B, N, D)
    if masked is not None:
        patches = torch.where(masked[..., None], mask_token.to(patches.dtype), patches)
    return patches + vit.positions(side, side)[:, 1:]


def encode(vit: ViT, patches: Float[Tensor, "B M D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B M D"]]:
    """Embedded patches, all or some, through the ViT: its class token and its patches, behind the final norm."""
    start = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(patches), -1, -1)
    x = torch.cat((start, patches), dim=1)  # (B, 1 + M, D)
    for block in vit.blocks:
        x = block(x)
    x = vit.norm(x)
    return x[:, 0], x[:, 1:]


def initialise(module: nn.Module, vit: ViT | None = None) -> None:
    """Start weights: linear maps Xavier-uniform (as MAE and MoCo v3), tokens normal 0.02, positions sine and cosine."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if vit is not None:
        nn.init.normal_(vit.cls_token, std=0.02)
        with torch.no_grad():
            vit.pos_embed.copy_(sine_positions(vit.cfg.table_side, vit.dim))


def sine_positions(side: int, dim: int) -> Float[Tensor, "1 N+1 D"]:
    """Sines and cosines of row and column, a quarter of the channels each; the class token, first, has zeros."""
    # sin(p / 10000^(4k/D)), cos(p / 10000^(4k/D)), p the row, then the column  (Vaswani et al. 2017, in two dimensions)
    frequency = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * frequency  # (side, D/4)
    line = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, D/2)
    rows, columns = line[:, None].expand(-1, side, -1), line.expand(side, -1, -1)
    return torch.cat((torch.zeros(1, dim), torch.cat((rows, columns), dim=2).flatten(0, 1)))[None]


def multilayer(dims: list[int], norm: bool = False) -> nn.Sequential:
    """Linear maps between `dims`: batch norm and ReLU between them and a norm without factors behind (MoCo v3), or
    GELU between them (DINO)."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(inputs, outputs, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(outputs, affine=not last))
        if not last:
            layers.append(nn.ReLU() if norm else nn.GELU())
    return nn.Sequential(*layers)


def twin(module: Module) -> Module:
    """A copy of a network that no gradient reaches."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """Move a twin towards its source."""
    # theta_t <- m theta_t + (1 - m) theta_s  (He et al. 2020, Eq. 2)
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - momentum)


def momentum_at(progress: float, start: float) -> float:
    """The momentum of a twin, from `start` at the first step to 1 at the last."""
    # m = 1 - (1 - m_0) (1 + cos(pi s / S)) / 2  (Grill et al. 2020, C.1)
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def require(cfg: Any, name: str, holds: bool, wanted: str) -> None:
    """Raise DigitError where a field of a method's config is not one of those wanted."""
    if not holds:
        method = type(cfg).__name__.removesuffix("Config")
        raise DigitError(f"{name} of {method} is {getattr(cfg, name)!r}: it must be {wanted}")
